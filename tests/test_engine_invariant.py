"""Batch invariance: with `batch_invariant` a request's log-probabilities are the same bits whatever else runs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import Sequence, paged
from tiny_model import tiny, tiny_model, tokens

from finback.engine import Completion, Engine, Options, Sampling
from finback.engine.batch import tile, tiles
from finback.engine.blocks import BLOCK
from finback.engine.scheduler import Work
from finback.kernels import dispatch, order

CONFIG = tiny(num_nextn_predict_layers=1, n_group=2, topk_group=1)
MODEL = tiny_model(CONFIG, seed=4)
PROMPTS = [tokens(n, seed=n).tolist() for n in (1, 5, 16, 33, 60, 18)]
BLOCK_BYTES = 4 * 22 * 4 * BLOCK


def complete(prompts, each, model=MODEL, max_batch=1, n=1, **options) -> list[Completion]:
    engine = Engine(model, max_batch=max_batch, options=Options(batch_invariant=True, **options))
    return sorted(engine.generate(prompts, each, n=n), key=lambda c: (c.index, c.choice))


def bits(completion: Completion) -> tuple:
    """Everything that must be equal, floats by their bits."""
    return completion.token_ids, [p.hex() for p in completion.logprobs], completion.finish_reason


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_bits_are_the_same_alone_and_in_any_company(data):
    """Other requests, chunks, preemption, prefixes, speculation: none of it changes a bit."""
    each = [
        Sampling(max_tokens=data.draw(st.integers(1, 24)), temperature=t, seed=i, ignore_eos=True)
        for i, t in enumerate([0.0, 1.0, 0.7, 1.0, 0.0, 1.0])
    ]
    alone = [complete([prompt], sampling)[0] for prompt, sampling in zip(PROMPTS, each, strict=True)]
    together = complete(
        PROMPTS,
        each,
        max_batch=data.draw(st.integers(2, 6)),
        step_tokens=data.draw(st.sampled_from([16, 48, 400])),
        cache_memory=data.draw(st.integers(8, 40)) * BLOCK_BYTES,
        speculate=data.draw(st.sampled_from(["off", "mtp", "ngram"])),
        draft_tokens=data.draw(st.integers(1, 3)),
        adaptive=False,
    )
    assert [bits(c) for c in together] == [bits(c) for c in alone]


def test_bits_are_the_same_when_the_prefix_comes_from_the_cache():
    sampling = Sampling(max_tokens=10, temperature=1, ignore_eos=True)
    first, second = complete([PROMPTS[4], PROMPTS[4]], sampling, max_batch=1)
    assert (first.cached_tokens, second.cached_tokens) == (0, 48)
    assert bits(first) == bits(second)


@pytest.mark.parametrize("changes", [{}, {"dtype": torch.bfloat16}])
def test_of_n_completions_each_has_the_bits_of_its_own(changes):
    model = tiny_model(CONFIG, seed=4).to(changes.get("dtype", torch.float32))
    sampling = Sampling(max_tokens=12, temperature=1, ignore_eos=True)
    alone = [
        next(Engine(model, options=Options(batch_invariant=True)).generate(PROMPTS[3:4], sampling, choice=choice))
        for choice in range(3)
    ]
    assert [bits(c) for c in complete(PROMPTS[3:4], sampling, model, max_batch=4, n=3)] == [bits(c) for c in alone]
    assert len({tuple(c.token_ids) for c in alone}) == 3


@given(st.integers(0, 100), st.integers(1, 70))
def test_tiles_cover_a_work_and_end_where_blocks_do(start, count):
    parts = tiles(Work(None, start, count))
    assert [part.start for part in parts] == [start, *(part.start + part.count for part in parts)][:-1]
    assert parts[-1].start + parts[-1].count == start + count
    assert all(part.start // BLOCK == (part.start + part.count - 1) // BLOCK for part in parts)
    assert len(parts) == (start + count - 1) // BLOCK - start // BLOCK + 1


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_every_pass_is_one_block_of_one_request_in_fixed_order(data):
    """Whoever runs, and whatever part of a block is new: the bits of some machines would not show it."""
    model = tiny_model(CONFIG, seed=4)
    forward, seen = model.decoder.forward, []

    def observed(ids_1N, **rest):
        seen.append((tuple(ids_1N.shape), len(rest["cache"].parts), rest["cache"].parts[0].rows, order._fixed))
        return forward(ids_1N, **rest)

    model.decoder.forward = observed
    sampling = Sampling(max_tokens=6, temperature=1, ignore_eos=True)
    max_batch, step_tokens = data.draw(st.integers(1, 6)), data.draw(st.sampled_from([16, 48, 400]))
    complete(PROMPTS, sampling, model, max_batch, data.draw(st.integers(1, 3)), step_tokens=step_tokens)
    assert set(seen) == {((1, BLOCK), 1, 1, True)}


def test_what_fills_a_tile_up_reaches_nobody():
    """Places that are not new hold other tokens, and their slots anything: the result of the new ones is the same."""
    cache, pool = paged(CONFIG)
    results = []
    for filler in (3, 50):
        row = Sequence(tokens(40, seed=1).tolist())
        row.blocks = [pool.take() for _ in range(3)]
        cache.storage[:, row.blocks] = filler
        for part in (Work(row, 0, 16), Work(row, 16, 7), Work(row, 23, 9)):
            batch = tile(cache, part)
            new = batch.spans[0]
            ids = batch.ids_1N.clone()
            ids[0, : new.start] = ids[0, new.stop :] = filler
            with torch.no_grad(), dispatch.fixed_order():
                hidden = MODEL.decoder(ids, positions=batch.positions_1N, cache=batch.view)[0, new]
        results.append(hidden)
    assert torch.equal(*results)
    with torch.no_grad():
        whole = MODEL.decoder(torch.tensor([row.ids[:32]]))[0, 23:]
    torch.testing.assert_close(results[0], whole, rtol=1e-4, atol=1e-4)


def test_without_it_sums_do_depend_on_the_company():
    """The test above could not fail otherwise: rounding differs between batches."""
    each = Sampling(max_tokens=20, temperature=1, ignore_eos=True)
    plain = Options(step_tokens=400)
    alone = [next(Engine(MODEL, options=plain).generate([prompt], each)) for prompt in PROMPTS]
    together = sorted(Engine(MODEL, options=plain).generate(PROMPTS, each), key=lambda c: c.index)
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert [bits(c) for c in together] != [bits(c) for c in alone]
