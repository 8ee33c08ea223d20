"""The latent cache: its size by the law of V2 TR 2.1, and that rows keep what is theirs."""

import pytest
import torch
from tiny_model import tiny, tiny_model, tokens

from finback.engine import Engine, Sampling
from finback.engine.cache import LatentCache

CONFIG = tiny()


def fill(cache: LatentCache, row: int, length: int) -> torch.Tensor:
    """Write a row of random entries to every layer; returns [layer, length, C]."""
    entries = torch.randn(cache.layers, 1, length, cache.width)
    window = cache.window(row, torch.arange(length)[None], length)
    for layer in range(cache.layers):
        window.write(layer, entries[layer])
    return entries[:, 0]


def read(cache: LatentCache, row: int, length: int) -> torch.Tensor:
    window = cache.window(row, torch.arange(length)[None], length)
    return torch.stack([window.read(layer)[0] for layer in range(cache.layers)])


@pytest.mark.parametrize("mtp", [0, 1])
def test_a_token_costs_latent_and_rope_times_layers(mtp):
    config = tiny(num_nextn_predict_layers=mtp, max_position_embeddings=64)
    engine = Engine(tiny_model(config), max_batch=4)
    prompts = [tokens(n, seed=n).tolist() for n in (5, 9, 2, 7)]
    list(engine.generate(prompts, Sampling(max_tokens=50, ignore_eos=True)))
    _, rows, slots, _ = engine.cache.storage.shape
    assert (rows, slots) == (4, 64)
    assert engine.cache.storage.numel() == 4 * 64 * (config.kv_lora_rank + config.qk_rope_head_dim) * 3
    assert engine.cache.bytes_per_token == 4 * (14 + 8) * 3


def test_v3_costs_70272_bytes_a_token_in_bf16():
    from finback.model import Config

    assert LatentCache(Config(), 1, torch.bfloat16).bytes_per_token == 70_272


def test_growth_keeps_every_row():
    cache = LatentCache(CONFIG, 9)
    written = [fill(cache, row, length) for row, length in enumerate((3, 70, 1, 130, 5))]
    for row, entries in enumerate(written):
        assert torch.equal(read(cache, row, entries.shape[1]), entries)


def test_growth_stops_at_the_rows_and_the_context():
    cache = LatentCache(CONFIG, 5)
    cache.reserve(4, 200)
    cache.reserve(5, 201)
    assert cache.storage.shape[1:3] == (5, 256)
    with pytest.raises(AssertionError):
        cache.reserve(1, 257)
    with pytest.raises(AssertionError):
        cache.reserve(6, 1)


def test_move_overwrites_one_row_and_leaves_the_others():
    cache = LatentCache(CONFIG, 3)
    first, second, third = (fill(cache, row, 6) for row in range(3))
    cache.move(2, 0, 6)
    assert torch.equal(read(cache, 0, 6), third)
    assert torch.equal(read(cache, 1, 6), second)
    assert not torch.equal(first, third)


def test_ragged_positions_reach_their_own_slots():
    cache = LatentCache(CONFIG, 2)
    positions = torch.tensor([[4, 5], [0, 1]])
    entry = torch.randn(2, 2, cache.width)
    window = cache.window(0, positions, 6)
    window.write(1, entry)
    expected = torch.zeros(2, 6, cache.width)
    expected[0, 4:6], expected[1, 0:2] = entry[0], entry[1]
    assert torch.equal(window.read(1), expected)
    assert not window.read(0).any()
