"""The paged cache: its size by the law of V2 TR 2.1, that sequences keep what is theirs, and its 8-bit formats."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import Sequence, advance, paged
from tiny_model import tiny, tiny_model, tokens

from finback.engine import Engine, Options, Sampling
from finback.engine.blocks import BLOCK
from finback.engine.cache import PagedCache
from finback.errors import UserError
from finback.model import Config

CONFIG = tiny()


@pytest.mark.parametrize("speculate, layers", [("off", 3), ("mtp", 4)])
def test_a_token_costs_latent_and_rope_times_layers(speculate, layers):
    """The MTP module's layer is only there where it is used."""
    config = tiny(num_nextn_predict_layers=1)
    engine = Engine(tiny_model(config), max_batch=4, options=Options(speculate=speculate))
    cache = engine.core.cache
    assert cache.bytes_per_token == engine.stats().bytes_per_token == 4 * (14 + 8) * layers
    assert cache.storage.nbytes == cache.bytes_per_token * BLOCK * (cache.blocks + 1)


def test_v3_costs_70272_bytes_a_token_in_bf16():
    assert PagedCache(Config(), 61, 1, torch.bfloat16).bytes_per_token == 70_272


def test_v3_costs_40016_bytes_a_token_in_fp8():
    assert PagedCache(Config(), 61, 1, torch.bfloat16, form="fp8").bytes_per_token == 61 * 656


def test_memory_is_what_was_given_or_what_all_rows_need():
    model = tiny_model(CONFIG)
    block = 4 * 22 * 3 * BLOCK
    assert Engine(model, max_batch=2).core.pool.count == 2 * (256 // BLOCK + 1)
    assert Engine(model, max_batch=2, options=Options(cache_memory=7 * block + 5)).core.pool.count == 7
    with pytest.raises(UserError, match=rf"cache_memory is 99 bytes; a block of 16 tokens takes {block:,}"):
        Engine(model, options=Options(cache_memory=99))


def test_a_prompt_that_the_cache_cannot_hold_is_refused_with_the_counts():
    block = 4 * 22 * 3 * BLOCK
    engine = Engine(tiny_model(CONFIG), options=Options(cache_memory=6 * block))
    with pytest.raises(
        UserError, match=r"prompt has 60 tokens and max_tokens is 30, .* 80 tokens that the cache holds"
    ):
        engine.submit([7] * 60, Sampling(max_tokens=30))
    with pytest.raises(UserError, match="cache holds"):
        engine.submit([7] * 80, Sampling(max_tokens=None))
    (completion,) = engine.generate([[7] * 60], Sampling(max_tokens=None, ignore_eos=True))
    assert (len(completion.token_ids), completion.finish_reason) == (20, "length")


@settings(max_examples=25)
@given(st.data())
def test_passes_over_any_mixture_of_sequences_equal_whole_ones(data):
    """Prefill, chunks and single tokens of sequences of any length, in one flat pass each time."""
    model = tiny_model(CONFIG)
    cache, pool = paged(CONFIG)
    rows = [Sequence(tokens(64, seed=i).tolist()) for i in range(data.draw(st.integers(1, 5)))]
    said = {row: [] for row in rows}
    with torch.no_grad():
        for _ in range(data.draw(st.integers(1, 4))):
            open_rows = [row for row in rows if row.cached < 64]
            chosen = [row for row in open_rows if data.draw(st.booleans())] or open_rows[:1]
            counts = {row: data.draw(st.integers(1, min(25, 64 - row.cached))) for row in chosen}
            for row, hidden in advance(model, cache, pool, counts).items():
                said[row].append(hidden)
        for row in rows:
            if said[row]:
                whole = model.decoder(torch.tensor([row.ids[: row.cached]]))[0]
                torch.testing.assert_close(torch.cat(said[row]), whole, rtol=1e-4, atol=1e-4)


def test_a_copied_block_is_equal_and_its_own():
    cache, pool = paged(CONFIG)
    entry = torch.randn(BLOCK, CONFIG.cache_width)
    source, target = pool.take(), pool.take()
    for layer in range(3):
        cache.write(layer, torch.arange(BLOCK) + source * BLOCK, entry + layer)
    cache.copy(source, target)
    cache.write(1, torch.tensor([source * BLOCK]), torch.zeros(1, CONFIG.cache_width))
    for layer in range(3):
        assert torch.equal(cache.read(layer, torch.tensor([[target]]))[0], entry + layer)


def test_a_payload_restores_a_block():
    cache, pool = paged(CONFIG, form="int8")
    first, second = pool.take(), pool.take()
    entry = torch.randn(BLOCK, CONFIG.cache_width)
    for layer in range(3):
        cache.write(layer, torch.arange(BLOCK) + first * BLOCK, entry)
    payload = cache.payload(first)
    assert payload.dtype == torch.uint8 and payload.nbytes == cache.block_bytes
    cache.clear([first])
    assert not cache.read(0, torch.tensor([[first]])).any()
    cache.load(second, payload)
    assert (cache.read(2, torch.tensor([[second]]))[0] - entry).abs().max() < 0.05


@pytest.mark.parametrize("form, bound", [("int8", 0.02), ("fp8", 0.12), ("bfloat16", 0.02), ("float32", 0.0)])
@pytest.mark.parametrize("grouped", [False, True])
def test_8_bit_caches_change_the_logits_little(form, bound, grouped):
    """Against the cache that keeps entries as computed; float32 is that."""
    from families import FAMILIES

    config = Config.from_dict(FAMILIES["R1-Distill-Qwen"]) if grouped else CONFIG
    model, ids = tiny_model(config), tokens(60, seed=3).tolist()
    results = []
    with torch.no_grad():
        for kind in (None, form):
            cache, pool = paged(config, form=kind)
            row = Sequence(ids)
            advance(model, cache, pool, {row: 59})
            results.append(model.decoder.logits(advance(model, cache, pool, {row: 1})[row])[0].log_softmax(-1))
    divergence = torch.nn.functional.kl_div(results[1], results[0], log_target=True, reduction="sum").item()
    assert -1e-6 <= divergence <= bound
    assert form == "float32" or divergence > 0
