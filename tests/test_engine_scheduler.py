"""The scheduler held to a model of the allocator: whatever comes, leaves, forks or has to give back its blocks."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_model import ScriptedModel
from tiny_model import tiny, tiny_model, tokens

from finback.engine import Engine, Options, Request, Sampling
from finback.engine.blocks import BLOCK, BlockPool, child_key, root_key
from finback.engine.scheduler import Cost
from finback.errors import UserError

CONFIG = tiny(num_nextn_predict_layers=1)
BLOCK_BYTES = 4 * 22 * 3 * BLOCK
MODEL = tiny_model(CONFIG)
PROMPTS = [tokens(n, seed=n).tolist() for n in (3, 16, 33, 70, 16, 48)]
PROMPTS[4] = [*PROMPTS[3][:32], 5, 6, 7]  # begins as another does
SOLO: dict = {}


def solo(prompt: list[int], sampling: Sampling, choice: int) -> tuple:
    """What a request gives alone, in an engine of its own."""
    key = (tuple(prompt), sampling.seed, sampling.temperature, sampling.max_tokens, choice)
    if key not in SOLO:
        engine = Engine(MODEL, max_batch=1, options=Options(prefix_cache=False))
        (completion,) = engine.generate([prompt], sampling, choice=choice)
        SOLO[key] = (completion.token_ids, completion.finish_reason)
    return SOLO[key]


def check_blocks(engine: Engine) -> None:
    """Every block is used as often as sequences have it, or kept, or free; nothing is in two of these."""
    pool, scheduler = engine.core.pool, engine.core.scheduler
    held = Counter(block for request in scheduler.running for block in request.blocks)
    assert all(pool.references(block) == held[block] for block in range(1, pool.count + 1))
    assert 0 not in held
    assert not any(request.blocks for request in scheduler.waiting)
    assert pool.used == len(held)
    free, kept = set(pool._free), set(pool._kept)
    assert not free & kept and not (free | kept) & held.keys()
    assert len(free) + len(kept) + len(held) == pool.count
    assert kept <= pool._keys.keys() and set(pool._by_key.values()) == pool._keys.keys()
    for request in scheduler.running:
        assert len(request.blocks) * BLOCK >= request.cached


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_whatever_happens_no_block_is_lost_and_every_request_gives_what_it_gives_alone(data):
    """Arrivals, cancels, forks, a cache so small that requests must give back their blocks, tiny chunks."""
    blocks = data.draw(st.integers(9, 24), "blocks")
    options = Options(
        cache_memory=blocks * BLOCK_BYTES,
        step_tokens=data.draw(st.sampled_from([16, 40, 300]), "budget"),
        prefix_cache=data.draw(st.booleans(), "prefixes"),
        speculate=data.draw(st.sampled_from(["off", "ngram"]), "speculate"),
    )
    engine = Engine(MODEL, max_batch=data.draw(st.integers(1, 5), "rows"), options=options)
    known: list[Request] = []
    for _ in range(data.draw(st.integers(5, 30), "events")):
        event = data.draw(st.sampled_from(["submit", "fork", "step", "step", "step", "cancel"]))
        if event in ("submit", "fork"):
            prompt = data.draw(st.sampled_from(PROMPTS))
            sampling = Sampling(
                max_tokens=data.draw(st.integers(1, 40)),
                temperature=data.draw(st.sampled_from([0.0, 1.0])),
                seed=data.draw(st.integers(0, 2)),
                ignore_eos=True,
            )
            request = engine.submit(prompt, sampling, n=3 if event == "fork" else 1)
            known += [request, *request.followers]
        elif event == "cancel" and known:
            engine.cancel(data.draw(st.sampled_from(known)))
        else:
            engine.step()
        check_blocks(engine)
    for _ in range(3000):
        if not engine.busy:
            break
        engine.step()
        check_blocks(engine)
    assert not engine.busy and engine.core.pool.used == 0
    for request in known:
        completion = request.completion()
        expected, reason = solo(request.ids[: request.prompt_tokens], request.sampling, completion.choice)
        if completion.finish_reason == "cancelled":
            assert completion.token_ids == expected[: len(completion.token_ids)]
        else:
            assert (completion.token_ids, completion.finish_reason) == (expected, reason)


def test_a_full_cache_preempts_the_last_and_loses_nothing(monkeypatch):
    engine = Engine(MODEL, max_batch=4, options=Options(cache_memory=12 * BLOCK_BYTES, prefix_cache=False))
    scheduler, last = engine.core.scheduler, []
    requeue = scheduler.requeue

    def observed(request: Request) -> None:
        last.append(request.arrival == max(other.arrival for other in scheduler.running))
        requeue(request)

    monkeypatch.setattr(scheduler, "requeue", observed)
    each = [Sampling(max_tokens=80, temperature=1, seed=i, ignore_eos=True) for i in range(4)]
    done = sorted(engine.generate(PROMPTS[:4], each), key=lambda c: c.index)
    assert engine.stats().preemptions == len(last) > 0 and all(last)
    assert engine.stats().prompt_tokens == sum(map(len, PROMPTS[:4])), "counted once, however often computed"
    for prompt, sampling, completion in zip(PROMPTS, each, done, strict=False):
        assert completion.token_ids == solo(prompt, sampling, 0)[0]


def test_a_thousand_cancels_at_any_moment_leave_no_block_used():
    draw = random.Random(1)
    script = [2 + i % 50 for i in range(512)]
    for speculate in ("off", "ngram"):
        engine = Engine(ScriptedModel(script), max_batch=8, options=Options(speculate=speculate, step_tokens=64))
        for _ in range(500):
            prompt = [draw.randrange(2, 50) for _ in range(draw.choice([1, 15, 16, 17, 200]))]
            request = engine.submit(prompt, Sampling(max_tokens=60, ignore_eos=True), n=draw.choice([1, 1, 3]))
            followers = request.followers
            for _ in range(draw.randrange(6)):
                engine.step()
            for each in (request, *followers):
                engine.cancel(each)
            if draw.random() < 0.2:
                check_blocks(engine)
        assert engine.core.pool.used == 0 and not engine.busy
        assert engine.stats().cancelled >= 500


def test_a_cancelled_request_frees_its_blocks_at_once():
    engine = Engine(MODEL, max_batch=2)
    request = engine.submit(PROMPTS[3], Sampling(max_tokens=50))
    engine.step()
    assert engine.core.pool.used == 5
    engine.cancel(request)
    assert engine.core.pool.used == 0


def works(engine: Engine) -> dict[int, int]:
    """What the next step would compute: tokens by prompt length."""
    return {work.request.prompt_tokens: work.count for work in engine.core.scheduler.plan()}


def test_a_short_prompt_goes_before_the_rest_of_a_long_one():
    engine = Engine(ScriptedModel([5], context=4096), max_batch=4, options=Options(step_tokens=64))
    engine.submit([7] * 3000, Sampling(max_tokens=5))
    for _ in range(10):
        engine.step()
    short = engine.submit([8] * 40, Sampling(max_tokens=5))  # nothing of it is in the cache
    engine.step()
    assert len(short.choices) == 1
    assert works(engine)[40] == 1, "it decodes in every further step"


def test_a_long_prompt_is_not_passed_over_for_ever():
    engine = Engine(ScriptedModel([5], context=4096), max_batch=4, options=Options(step_tokens=48))
    long = engine.submit([7] * 300, Sampling(max_tokens=1))
    steps = 0
    while not long.done:
        while len(engine.core.scheduler.waiting) < 4:
            engine.submit([8] * 48, Sampling(max_tokens=1, ignore_eos=True))
        engine.step()
        steps += 1
        assert steps < 150


def test_decoding_goes_on_in_every_step_of_a_long_prompt():
    engine = Engine(ScriptedModel([5], context=4096), max_batch=4, options=Options(step_tokens=32))
    short = engine.submit([7] * 3, Sampling(max_tokens=80))
    engine.step()
    engine.submit([7] * 1000, Sampling(max_tokens=2))
    for count in range(2, 40):
        engine.step()
        assert len(short.choices) == count


def test_an_exhausted_budget_still_moves_the_prompts_on():
    """Decoding alone costs more than the budget: prompts get a block a step all the same."""
    engine = Engine(ScriptedModel([5], context=4096), max_batch=40, options=Options(step_tokens=16))
    for _ in range(39):
        engine.submit([7] * 2, Sampling(max_tokens=300))
    for _ in range(50):
        engine.step()
    late = engine.submit([9] * 64, Sampling(max_tokens=1))
    for _ in range(6):
        engine.step()
    assert late.done


@given(st.floats(16, 4000), st.integers(0, 60_000), st.integers(1, 5000))
def test_chunks_cost_no_more_than_the_budget(budget, depth, limit):
    cost = Cost(near=1 / 1500, expand=0.06, far=1 / 5000)
    count = cost.most(budget, depth, limit)
    assert 1 <= count <= limit
    assert count <= BLOCK or cost.of(count, depth) <= budget
    assert cost.of(count + 2 * BLOCK, depth) > budget or count == limit, "nor much less"


def test_the_cheaper_form_of_attention_sets_the_cost():
    """Facts 1.5: below L(n+v)/(2L-n-v) new tokens the absorbed form is cheaper, 85.3 for (M), 170.7 for V3."""
    from finback.engine.options import cost_of
    from finback.model import Config

    cost, depth = cost_of(Config()), 10_000

    def absorbed(count: int) -> float:
        return count * (depth + count / 2) * cost.near + count

    assert cost.of(160, depth) == pytest.approx(absorbed(160))
    assert cost.of(200, depth) < absorbed(200)


@settings(max_examples=60)
@given(st.data())
def test_the_pool_against_a_model(data):
    """Take, share, release, publish, find, forget, in any order."""
    pool = BlockPool(5)
    references: dict[int, int] = {}
    keys: dict[bytes, int] = {}
    ever: set[bytes] = set()
    kept: list[int] = []
    for number in range(data.draw(st.integers(1, 60))):
        action = data.draw(st.sampled_from(["take", "take", "release", "release", "share", "publish", "forget"]))
        if action == "take":
            block = pool.take()
            if len(references) == 5:
                assert block is None
                continue
            fresh = set(range(1, 6)) - references.keys() - set(kept)
            assert block in fresh if fresh else block == kept[0], "the longest unused goes first"
            if block in kept:
                kept.remove(block)
                keys = {key: b for key, b in keys.items() if b != block}
            references[block] = 1
        elif action == "share":
            candidates = [*references, *kept]
            if candidates:
                block = data.draw(st.sampled_from(candidates))
                pool.share(block)
                references[block] = references.get(block, 0) + 1
                if block in kept:
                    kept.remove(block)
        elif references and action in ("release", "publish"):
            block = data.draw(st.sampled_from(sorted(references)))
            if action == "publish":
                done = pool.publish(block, key := child_key(root_key("t"), [number]))
                assert done == (block not in keys.values())
                ever.add(key)
                keys |= {key: block} if done else {}
                continue
            pool.release(block)
            references[block] -= 1
            if not references[block]:
                del references[block]
                kept += [block] if block in keys.values() else []
        elif action == "forget":
            pool.forget()
            keys, kept = {}, []
        assert pool.used == len(references) and pool.kept == len(kept) and pool.available == 5 - len(references)
        assert {key: found for key in ever if (found := pool.find(key)) is not None} == keys
        assert all(pool.published(block) == (block in keys.values()) for block in range(1, 6))


def test_equal_blocks_are_published_once():
    pool = BlockPool(3)
    first, second = pool.take(), pool.take()
    assert pool.publish(first, b"k") and not pool.publish(second, b"k")
    assert pool.find(b"k") == first


def test_keys_depend_on_all_tokens_before_and_on_the_tenant():
    ids = list(range(BLOCK))
    one = child_key(root_key("a"), ids)
    assert one == child_key(root_key("a"), ids)
    assert len({one, child_key(root_key("b"), ids), child_key(one, ids), child_key(root_key("a"), ids[::-1])}) == 4
    assert len(one) == 32


def test_options_that_make_no_sense_are_named():
    for field, value in [
        *(("step_tokens", 3), ("max_queue", 0), ("speculate", "magic"), ("cache_format", "int3")),
        *(("cache_memory", 0), ("draft_tokens", 1.5), ("prefix_limit", 0)),
    ]:
        with pytest.raises(UserError, match=rf"^{field} is "):
            Options(**{field: value})
