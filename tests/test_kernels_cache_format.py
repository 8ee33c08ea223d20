"""Cache formats: sizes, the bound of every format's error, hard numbers, and rows that stand alone."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from finback.errors import UserError
from finback.kernels import tiles
from finback.kernels.cache_format import CACHE_FORMATS, bytes_per_token, cache_format

SHAPES = [(512, 64, 128), (256, 32, 128), (1, 0, 128), (130, 6, 128), (257, 3, 128), (40, 8, 16), (97, 1, 32)]
SLACK = 1 + 2**-15  # a scale, a quotient and a product are each rounded to float32
EIGHT = {"int8": 127.0, "fp8": 448.0}


def scales(latent: np.ndarray, group: int, limit: float) -> np.ndarray:
    """Of every number, by a loop over the groups: ceil(L / group) of them, all but the last of one size."""
    count = -(-latent.shape[1] // group)
    size = -(-latent.shape[1] // count)
    out = np.empty(latent.shape)
    for start in range(0, latent.shape[1], size):
        part = latent[:, start : start + size]
        out[:, start : start + size] = np.maximum(np.abs(part).max(1, keepdims=True), 1e-12) / limit
    return out


def bound(name: str, entry: np.ndarray, latent: int, group: int) -> np.ndarray:
    """How far each number may come back from what it was."""
    size = np.abs(entry.astype(np.float64))
    wide = {"float32": 0 * size}.get(name, 2.0**-8 * size + 2.0**-134)  # bfloat16: 8 bits of significand
    if name in EIGHT:
        scale = scales(entry[:, :latent].astype(np.float64), group, EIGHT[name])
        near = scale / 2 if name == "int8" else np.maximum(2.0**-4 * size[:, :latent], 2.0**-10 * scale)
        wide[:, :latent] = near * SLACK
    return wide


@st.composite
def entries(draw):
    latent, rope, group = draw(st.sampled_from(SHAPES))
    rows = draw(st.integers(1, 5))
    shape = (rows, latent + rope)
    numbers = st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-4, 4, width=32)
    kind = draw(st.sampled_from(["drawn", "normal", "spread"]))
    if kind == "drawn":
        return draw(hnp.arrays(np.float32, shape, elements=numbers, fill=st.just(0.0))), latent, rope, group
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = random.normal(size=shape)
    return (x if kind == "normal" else x * 10.0 ** random.uniform(-9, 9, shape)).astype(np.float32), latent, rope, group


@pytest.mark.parametrize("name", CACHE_FORMATS)
@given(case=entries())
def test_error_is_bounded_number_by_number(name, case):
    entry, latent, rope, group = case
    layout = cache_format(name, latent, rope, group)
    packed = layout.pack(torch.from_numpy(entry))
    assert packed.shape == (len(entry), layout.width_bytes) and packed.dtype == torch.uint8
    back = layout.unpack(packed)
    assert back.dtype == torch.float32
    error = np.abs(back.double().numpy() - entry.astype(np.float64))
    assert (error <= bound(name, entry, latent, group)).all()
    assert (back.numpy()[entry == 0] == 0).all()


@pytest.mark.parametrize("name", CACHE_FORMATS)
@given(case=entries(), dtype=st.sampled_from([torch.bfloat16, torch.float64]))
def test_other_dtypes_are_the_float32_result_rounded_once(name, case, dtype):
    entry, latent, rope, group = case
    layout = cache_format(name, latent, rope, group)
    packed = layout.pack(torch.from_numpy(entry))
    assert torch.equal(layout.unpack(packed, dtype), layout.unpack(packed).to(dtype))
    # What comes in narrow is what it is in float32.
    narrow = torch.from_numpy(entry).bfloat16()
    assert torch.equal(layout.pack(narrow), layout.pack(narrow.float()))


def test_every_code_of_e4m3_is_read_as_torch_reads_it():
    layout = cache_format("fp8", 128, 0)
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128)
    rows = torch.zeros(2, layout.width_bytes, dtype=torch.uint8)
    rows[:, :128] = codes
    rows[:, 128:].view(torch.float32).fill_(3.0)
    want = codes.view(torch.float8_e4m3fn).float() * 3
    read, known = layout.unpack(rows), ~want.isnan()
    assert torch.equal(read[known], want[known]) and known.sum() == 254


@pytest.mark.parametrize("name", EIGHT)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_spoils_its_own_group_and_nothing_else(name, bad, dtype):
    entry = torch.randn(3, 256 + 8, generator=torch.Generator().manual_seed(0))
    entry[1, 130] = bad
    entry[2, 257] = bad  # in the roped key, which keeps it
    layout = cache_format(name, 256, 8)
    back = layout.unpack(layout.pack(entry), dtype)
    wrong = ~back.isfinite()
    assert wrong[1, 128:256].all() and wrong.sum() == 128 + 1
    assert torch.equal(back[2, 257].isnan(), torch.tensor(bad).isnan())


def test_sizes_are_those_that_deepseek_names():
    assert cache_format("fp8", 512, 64).width_bytes == 656  # FlashMLA's FP8 cache
    assert bytes_per_token("fp8", 512, 64, 61) == 61 * 656
    assert bytes_per_token("bfloat16", 512, 64, 61) == 70_272
    assert bytes_per_token("float32", 512, 64, 61) == 140_544
    assert bytes_per_token("int8", 1024, 0, 28, group=64) == 28 * (1024 + 16 * 4)


@pytest.mark.parametrize("name", CACHE_FORMATS)
@pytest.mark.parametrize(("latent", "rope", "group"), SHAPES)
def test_rows_stand_alone(name, latent, rope, group, monkeypatch):
    """A row's bytes do not depend on its neighbours; strides, dimensions, no rows and small tiles change nothing."""
    layout = cache_format(name, latent, rope, group)
    assert layout.width_bytes % 4 == 0
    entry = torch.randn(6, latent + rope, generator=torch.Generator().manual_seed(latent))
    packed = layout.pack(entry)
    assert torch.equal(torch.cat([layout.pack(row[None]) for row in entry]), packed)
    whole = layout.unpack(packed)
    monkeypatch.setattr(tiles, "_NUMBERS", 1)
    assert torch.equal(layout.unpack(packed), whole)
    storage = torch.full((6, 3, layout.width_bytes), 255, dtype=torch.uint8)  # [slot, layer, bytes]
    assert layout.pack(entry, storage[:, 1]) is not None
    assert torch.equal(layout.unpack(storage[:, 1]), whole)
    assert (storage[:, 0] == 255).all() and (storage[:, 2] == 255).all()
    square = layout.pack(entry.view(2, 3, -1))
    assert torch.equal(square.view(6, -1), packed) and torch.equal(layout.unpack(square).view(6, -1), whole)
    assert layout.unpack(packed[:0]).shape == (0, latent + rope)


def test_large_and_small_groups_keep_their_own_scale():
    """A latent whose second half is a million times smaller: one scale for both would make it zero."""
    entry = torch.randn(4, 256, generator=torch.Generator().manual_seed(1))
    entry[:, 128:] *= 1e-6
    for name in EIGHT:
        layout = cache_format(name, 256, 0)
        error = (layout.unpack(layout.pack(entry)) - entry)[:, 128:]
        assert error.norm() < 0.04 * entry[:, 128:].norm()


def test_the_roped_key_is_kept_to_bfloat16():
    entry = torch.randn(4, 128 + 64, generator=torch.Generator().manual_seed(2))
    for name in EIGHT:
        layout = cache_format(name, 128, 64)
        assert torch.equal(layout.unpack(layout.pack(entry))[:, 128:], entry[:, 128:].bfloat16().float())


def test_an_unknown_format_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"cache format 'int3': must be one of float32, bfloat16, int8, fp8"):
        cache_format("int3", 512, 64)
