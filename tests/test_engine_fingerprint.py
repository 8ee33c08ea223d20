"""A model's fingerprint: equal for equal models, another for any byte, name, shape, dtype or setting."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import tiny, tiny_model
from torch import nn

from finback.engine.fingerprint import fingerprint


class Holder(nn.Module):
    """One parameter or buffer of any kind."""

    def __init__(self, tensor: torch.Tensor, name: str = "x") -> None:
        super().__init__()
        self.register_buffer(name, tensor)


def test_equal_models_have_equal_fingerprints_and_extra_counts():
    model = tiny_model(tiny())
    mark = fingerprint(model, "int8")
    assert len(mark) == 64 and int(mark, 16) >= 0
    assert fingerprint(copy.deepcopy(model), "int8") == mark
    assert fingerprint(model, "fp8") != mark


def test_every_parameter_and_buffer_counts():
    model = tiny_model(tiny())
    mark = fingerprint(model)
    tensors = [*model.parameters(), *model.buffers()]
    assert len(tensors) > 10
    for tensor in tensors:
        flat = tensor.data.view(-1)
        old = flat[-1].clone()
        flat[-1] = torch.nextafter(old, torch.tensor(torch.inf)) if tensor.is_floating_point() else old + 1
        assert fingerprint(model) != mark
        flat[-1] = old
    assert fingerprint(model) == mark


@given(
    numbers=st.integers(1, 3 * 512 * 256 * 8 // 2),
    where=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 15),
    dtype=st.sampled_from([torch.int16, torch.uint8]),
)
def test_any_flipped_bit_changes_it(numbers, where, bit, dtype):
    """Tables are 512 x 256 words: sizes below, at and above one, and with rests."""
    data = torch.arange(numbers, dtype=torch.int32).mul_(40503).to(dtype)
    mark = fingerprint(Holder(data))
    bit %= 8 * dtype.itemsize
    data[int(where * numbers)] ^= torch.tensor(1 << bit, dtype=torch.int32).to(dtype)
    assert fingerprint(Holder(data)) != mark


@pytest.mark.parametrize("distance", [1, 4, 256 * 4, 512 * 256 * 4])
def test_numbers_that_change_places_change_it(distance):
    """Within a word, within a row, between rows, between tables: plain sums would not see most of them."""
    data = torch.arange(2 * 512 * 256 * 4 + 1000, dtype=torch.int32).div_(77, rounding_mode="floor").to(torch.int16)
    data[7] = -1
    mark = fingerprint(Holder(data))
    data[[7, 7 + distance]] = data[[7 + distance, 7]]
    assert fingerprint(Holder(data)) != mark


def test_name_shape_dtype_and_config_count():
    data = torch.arange(64, dtype=torch.int16)
    tensors = [data, data.view(8, 8), data.view(torch.bfloat16), data[:63]]
    marks = {fingerprint(Holder(tensor)) for tensor in tensors} | {fingerprint(Holder(data, "y"))}
    assert len(marks) == 5
    first, second = tiny_model(tiny()), tiny_model(tiny())
    second.config = tiny(rope_theta=2 * tiny().rope_theta)
    assert fingerprint(first) != fingerprint(second)


def test_odd_tensors_are_read():
    whole = torch.arange(64, dtype=torch.uint8)
    values = {
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3.0),
        "view": whole[3:50],
        "strided": whole.view(8, 8).t(),
        "fp8": torch.ones(5).to(torch.float8_e4m3fn),
        "bool": torch.tensor([True, False]),
    }
    marks = {name: fingerprint(Holder(tensor)) for name, tensor in values.items()}
    assert len(set(marks.values())) == len(marks)
    assert marks["view"] == fingerprint(Holder(whole[3:50].clone()))
    assert marks["strided"] == fingerprint(Holder(whole.view(8, 8).t().contiguous()))
