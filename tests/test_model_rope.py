"""Rotary positions and YaRN: the paper's numbers, DeepSeek's complex-number layout, and when YaRN is on."""

import math

import pytest
import torch
from tiny_model import tiny, tiny_model, tokens

from finback.kernels import dispatch
from finback.model import Config, RopeScaling
from finback.model.rope import correction_range, inverse_frequencies, rotation, softmax_scale

V3_SCALING = RopeScaling(factor=40, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0)
V3 = Config(max_position_embeddings=163840, rope_scaling=V3_SCALING)


def test_v3_ramp_runs_from_pair_10_to_pair_23():
    assert correction_range(V3_SCALING, 64, 10000.0) == (10, 23)


def test_v3_softmax_scale():
    assert softmax_scale(V3) == pytest.approx(0.135234, abs=5e-7)
    assert math.sqrt(softmax_scale(V3) * 192**0.5) == pytest.approx(1.36889, abs=5e-6)


def test_v2_lite_softmax_scale():
    scaling = RopeScaling(factor=40, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.707)
    config = Config(max_position_embeddings=163840, rope_scaling=scaling)
    assert softmax_scale(config) == pytest.approx(0.114721, abs=5e-7)


def test_softmax_scale_follows_mscale_all_dim_not_mscale():
    scaling = RopeScaling(factor=40, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=0.0)
    assert softmax_scale(Config(max_position_embeddings=163840, rope_scaling=scaling)) == pytest.approx(192**-0.5)


def test_v3_frequencies_follow_the_definition():
    """Pairs up to the ramp turn as before, pairs after it 40 times slower, between them a linear mix."""
    expected = []
    for pair in range(32):
        plain = 10000.0 ** (-2 * pair / 64)
        ramp = min(max((pair - 10) / 13, 0.0), 1.0)
        expected.append(plain * (1 - ramp) + plain / 40 * ramp)
    torch.testing.assert_close(inverse_frequencies(V3), torch.tensor(expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("mscale", "all_dim", "factor"), [(1.0, 1.0, 1.0), (1.0, 0.0, 1.36889), (0.5, 1.0, 0.86526)])
def test_cos_and_sin_carry_the_ratio_of_the_two_magnitudes(mscale, all_dim, factor):
    scaling = RopeScaling(40, 4096, mscale=mscale, mscale_all_dim=all_dim)
    config = Config(max_position_embeddings=163840, rope_scaling=scaling)
    lengths = rotation(config, torch.tensor([[0, 3, 100000]])).abs()
    torch.testing.assert_close(lengths, torch.full_like(lengths, factor), rtol=1e-4, atol=0)


def test_yarn_is_off_until_the_context_is_extended():
    """DeepSeek's own code: both parts apply only past the original length; a model trained at 4K is not scaled."""
    short = Config(max_position_embeddings=4096, rope_scaling=V3_SCALING)
    plain = Config(max_position_embeddings=4096)
    assert softmax_scale(short) == softmax_scale(plain) == pytest.approx(192**-0.5)
    assert torch.equal(inverse_frequencies(short), inverse_frequencies(plain))
    longer = Config(max_position_embeddings=4097, rope_scaling=V3_SCALING)
    assert softmax_scale(longer) == softmax_scale(V3)
    assert torch.equal(inverse_frequencies(longer), inverse_frequencies(V3))


def test_rotation_turns_neighbouring_pairs():
    """(x0, x1), (x2, x3), … each by position · frequency: the checkpoint's layout, not the two halves of Llama's."""
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0))
    angle = torch.arange(7)[:, None] * inverse_frequencies(V3)
    expected = torch.empty_like(x)
    expected[..., 0::2] = x[..., 0::2] * angle.cos() - x[..., 1::2] * angle.sin()
    expected[..., 1::2] = x[..., 0::2] * angle.sin() + x[..., 1::2] * angle.cos()
    turned = dispatch.rotate(x, rotation(V3, torch.arange(7).expand(2, -1)))
    torch.testing.assert_close(turned, expected, rtol=1e-5, atol=1e-5)


def test_only_distances_matter():
    """Shifting every position by the same amount leaves the logits as they are."""
    model = tiny_model(tiny())
    ids, positions = tokens(2, 12), torch.arange(12).expand(2, -1)
    with torch.no_grad():
        near, far = model(ids, positions=positions), model(ids, positions=positions + 150)
        stretched = model(ids, positions=positions * 2)
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)
    assert (near - stretched).abs().max() > 1e-2
