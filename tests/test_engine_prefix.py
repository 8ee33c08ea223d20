"""The prefix cache: what it finds, for whom, for how long, and that nothing changes but the time."""

from pathlib import Path

import pytest
import torch
from tiny_model import tiny, tiny_model, tokens

from finback.engine import Engine, Options, Sampling
from finback.engine.blocks import BLOCK

CONFIG = tiny(num_nextn_predict_layers=1)
MODEL = tiny_model(CONFIG, seed=2)
GREEDY = Sampling(max_tokens=10, temperature=0, ignore_eos=True)
BLOCK_BYTES = 4 * 22 * 3 * BLOCK
FIRST = tokens(50, seed=1).tolist()


def invariant(**options) -> Options:
    return Options(batch_invariant=True, **options)


def bits(completion) -> tuple:
    return completion.token_ids, [p.hex() for p in completion.logprobs]


def passes(engine: Engine, monkeypatch) -> list[int]:
    """Records how many tokens each pass of the model has."""
    seen: list[int] = []
    decoder, forward = engine.model.decoder, engine.model.decoder.forward
    monkeypatch.setattr(decoder, "forward", lambda ids, **rest: seen.append(ids.numel()) or forward(ids, **rest))
    return seen


def test_a_second_turn_computes_only_its_new_tokens(monkeypatch):
    engine = Engine(MODEL)
    (answer,) = engine.generate([FIRST], GREEDY)
    seen = passes(engine, monkeypatch)
    second = [*FIRST, *answer.token_ids, *tokens(9, seed=5).tolist()]
    (completion,) = engine.generate([second], GREEDY)
    assert completion.cached_tokens == 48, "all full blocks of the first turn, whose last token was never an input"
    assert seen[0] == len(second) - 48
    assert completion.token_ids == next(Engine(MODEL).generate([second], GREEDY)).token_ids
    assert engine.stats().hit_tokens == 48
    assert engine.stats().prompt_tokens == 50 + 69


@pytest.mark.parametrize("length", [16, 32, 47, 48])
def test_a_prompt_that_is_all_there_computes_one_token_or_the_last_block(length, monkeypatch):
    """Its last token is computed again, in a copy: the block that others may find must not change."""
    engine = Engine(MODEL, options=Options())
    first = next(engine.generate([FIRST[:length]], GREEDY))
    held = {block: engine.core.cache.payload(block) for block in engine.core.pool._kept}
    seen = passes(engine, monkeypatch)
    again = next(engine.generate([FIRST[:length]], GREEDY))
    assert seen[0] == (1 if length % BLOCK == 0 else length % BLOCK)
    assert again.token_ids == first.token_ids
    assert all(torch.equal(engine.core.cache.payload(block), payload) for block, payload in held.items())
    assert engine.core.pool.used == 0


def test_tenants_do_not_find_each_others_prefixes():
    engine = Engine(MODEL)
    for tenant, hits in [("a", 0), ("b", 0), ("a", 48), ("b", 48), ("", 0)]:
        assert next(engine.generate([FIRST], GREEDY, tenant=tenant)).cached_tokens == hits


def test_the_longest_unused_prefix_goes_first():
    engine = Engine(MODEL, max_batch=1, options=Options(cache_memory=8 * BLOCK_BYTES))
    prompts = [tokens(50, seed=s).tolist() for s in (11, 12, 13)]
    short = Sampling(max_tokens=2, temperature=0, ignore_eos=True)
    first, second = (next(engine.generate([p], short)).cached_tokens for p in prompts[:2])
    assert (first, second) == (0, 0)
    assert next(engine.generate(prompts[:1], short)).cached_tokens == 48
    next(engine.generate(prompts[2:], short))
    assert next(engine.generate(prompts[:1], short)).cached_tokens == 48
    assert next(engine.generate(prompts[1:2], short)).cached_tokens < 48


def test_the_end_of_a_prefix_goes_before_its_beginning():
    """Three blocks are kept and three free; the next prompt takes four."""
    engine = Engine(MODEL, options=Options(cache_memory=6 * BLOCK_BYTES))
    short = Sampling(max_tokens=2, temperature=0, ignore_eos=True)
    hits = [next(engine.generate([p], short)).cached_tokens for p in (FIRST, tokens(50, seed=12).tolist(), FIRST)]
    assert hits == [0, 0, 32]


def test_it_can_be_turned_off():
    engine = Engine(MODEL, options=Options(prefix_cache=False))
    assert [next(engine.generate([FIRST], GREEDY)).cached_tokens for _ in range(2)] == [0, 0]
    assert engine.stats().blocks_kept == 0


@pytest.mark.parametrize("wish", ["routing", "prompt_logprobs", "embedding"])
def test_who_asks_about_the_prompt_gets_it_computed(wish):
    engine = Engine(MODEL)
    plain, asked = (next(engine.generate([FIRST], GREEDY, **w)) for w in ({}, {wish: True}))
    assert asked.cached_tokens == 0 and asked.token_ids == plain.token_ids
    assert getattr(asked, wish) is not None


def test_prompt_logprobs_and_embedding_are_those_of_the_whole_pass():
    for step_tokens in (16, 400):
        engine = Engine(MODEL, options=Options(step_tokens=step_tokens))
        (completion,) = engine.generate([FIRST], GREEDY, prompt_logprobs=True, embedding=True)
        with torch.no_grad():
            hidden = MODEL.decoder(torch.tensor([FIRST]))
            expected = MODEL.decoder.logits(hidden)[0, :-1].log_softmax(-1).gather(1, torch.tensor(FIRST[1:])[:, None])
        assert len(completion.prompt_logprobs) == 49
        torch.testing.assert_close(torch.tensor(completion.prompt_logprobs), expected[:, 0], atol=1e-4, rtol=0)
        torch.testing.assert_close(completion.embedding, hidden[0, -1], atol=1e-4, rtol=1e-4)


def test_refresh_drops_every_prefix():
    model = tiny_model(CONFIG, seed=2)
    engine = Engine(model)
    next(engine.generate([FIRST], GREEDY))
    model.load_state_dict(tiny_model(CONFIG, seed=8).state_dict())
    engine.refresh()
    (completion,) = engine.generate([FIRST], GREEDY)
    assert completion.cached_tokens == 0
    assert completion.token_ids == next(Engine(model).generate([FIRST], GREEDY)).token_ids
    assert engine.stats().refresh_s > 0


def test_prefixes_survive_a_restart(tmp_path: Path, monkeypatch):
    options = invariant(prefix_folder=tmp_path / "prefix")
    first = Engine(MODEL, options=options)
    (before,) = first.generate([FIRST], GREEDY)
    first.close()
    second = Engine(MODEL, options=options)
    seen = passes(second, monkeypatch)
    (after,) = second.generate([FIRST], GREEDY)
    assert after.cached_tokens == 48 and seen[0] <= BLOCK
    assert bits(after) == bits(before)


@pytest.mark.parametrize("change", ["weights", "format", "speculation"])
def test_another_model_or_cache_finds_nothing_there(tmp_path: Path, change):
    first = Engine(MODEL, options=Options(prefix_folder=tmp_path))
    next(first.generate([FIRST], GREEDY))
    first.close()
    model, options = MODEL, {"prefix_folder": tmp_path}
    if change == "weights":
        model = tiny_model(CONFIG, seed=2)
        model.decoder.layers["0"].mlp.down_proj.weight.value.data[0, 0] += 0.01
    elif change == "format":
        options["cache_format"] = "int8"
    else:
        options["speculate"] = "mtp"
    assert next(Engine(model, options=Options(**options)).generate([FIRST], GREEDY)).cached_tokens == 0


def test_refresh_parts_with_what_the_old_weights_left_on_disk(tmp_path: Path):
    model = tiny_model(CONFIG, seed=2)
    engine = Engine(model, options=Options(prefix_folder=tmp_path))
    next(engine.generate([FIRST], GREEDY))
    model.load_state_dict(tiny_model(CONFIG, seed=8).state_dict())
    engine.refresh()
    assert next(engine.generate([FIRST], GREEDY)).cached_tokens == 0
    engine.close()


def test_a_damaged_block_on_disk_is_computed_again(tmp_path: Path):
    options = invariant(prefix_folder=tmp_path)
    first = Engine(MODEL, options=options)
    (before,) = first.generate([FIRST], GREEDY)
    first.close()
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > BLOCK_BYTES)
    assert len(files) == 3
    for file in files:
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
    (after,) = Engine(MODEL, options=options).generate([FIRST], GREEDY)
    assert after.cached_tokens == 0 and bits(after) == bits(before)


def test_n_completions_compute_their_prompt_once(monkeypatch):
    engine = Engine(MODEL, max_batch=4)
    seen = passes(engine, monkeypatch)
    sampling = Sampling(max_tokens=8, temperature=1, ignore_eos=True)
    done = sorted(engine.generate([FIRST], sampling, n=4), key=lambda c: c.choice)
    assert seen[0] == 50 and seen[1] == 4
    assert [c.choice for c in done] == [0, 1, 2, 3]
    assert (engine.stats().prompt_tokens, engine.stats().hit_tokens) == (200, 150)
    assert done[0].cached_tokens == 0 and all(c.cached_tokens == 50 for c in done[1:])
    for completion in done:
        alone = next(Engine(MODEL).generate([FIRST], sampling, choice=completion.choice))
        assert completion.token_ids == alone.token_ids


def test_n_completions_of_several_prompts_begin_with_their_own():
    sampling = Sampling(max_tokens=5, temperature=1, ignore_eos=True)
    prompts = [FIRST, tokens(20, seed=3).tolist()]
    for completion in Engine(MODEL, max_batch=4).generate(prompts, sampling, n=2):
        alone = Engine(MODEL).generate([prompts[completion.index]], sampling, choice=completion.choice)
        assert completion.token_ids == next(alone).token_ids


@pytest.mark.parametrize("rows", [2, 4])
def test_each_of_n_completions_learns_about_the_prompt(rows):
    """Those that share its blocks as well as those that have to compute it again."""
    sampling = Sampling(max_tokens=6, temperature=1, ignore_eos=True)
    wishes = {"routing": True, "prompt_logprobs": True, "embedding": True}
    for completion in Engine(MODEL, max_batch=rows).generate([FIRST], sampling, n=4, **wishes):
        alone = next(Engine(MODEL).generate([FIRST], sampling, choice=completion.choice, **wishes))
        assert completion.token_ids == alone.token_ids
        assert completion.prompt_logprobs == pytest.approx(alone.prompt_logprobs, abs=1e-4)
        torch.testing.assert_close(completion.embedding, alone.embedding, atol=1e-4, rtol=1e-4)
        for layer, experts in alone.routing.items():
            assert torch.equal(completion.routing[layer].sort(-1).values, experts.sort(-1).values)


def test_more_completions_than_rows_find_the_prompt_later(monkeypatch):
    engine = Engine(MODEL, max_batch=2)
    done = list(engine.generate([FIRST], Sampling(max_tokens=4, temperature=1, ignore_eos=True), n=5))
    assert sorted(c.choice for c in done) == [0, 1, 2, 3, 4]
    assert sorted(c.cached_tokens for c in done) == [0, 48, 48, 48, 50]
