"""After something went wrong midway: interrupted steps, drafters and disks that fail, wishes that make no sense."""

import pytest
import torch
from tiny_model import tiny, tiny_model, tokens

from finback.engine import Engine, Options, QueueFull, Sampling
from finback.engine.fingerprint import fingerprint
from finback.errors import UserError

CONFIG = tiny(num_nextn_predict_layers=1)
GREEDY = Sampling(max_tokens=12, temperature=0, ignore_eos=True)
PROMPTS = [tokens(n, seed=n).tolist() for n in (9, 20, 35)]
BLOCK_BYTES = 4 * 22 * 3 * 16


def alone(prompt, sampling=GREEDY) -> list[int]:
    return next(Engine(tiny_model(CONFIG)).generate([prompt], sampling)).token_ids


def drain(engine: Engine, most: int = 2000) -> int:
    steps = 0
    while engine.busy:
        engine.step()
        steps += 1
        assert steps < most, "requests that never end"
    assert engine.core.pool.used == 0
    return steps


@pytest.mark.parametrize("place", ["hidden", "logits", "choose"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("once")])
@pytest.mark.parametrize("n", [1, 3])
def test_a_step_that_is_cut_off_anywhere_changes_no_token(monkeypatch, place, error, n):
    """Once in the prompt's pass, once while decoding: what follows is as if it had not been.

    An error of the pass is isolated; one of choosing, which handles each request's own, is ours and leaves the step.
    """
    leaves = isinstance(error, KeyboardInterrupt) or place == "choose"
    for after in (0, 4):
        engine = Engine(tiny_model(CONFIG), max_batch=6)
        sampling = Sampling(max_tokens=12, temperature=1, ignore_eos=True)
        wishes = {"prompt_logprobs": True, "routing": True}
        requests = [engine.submit(prompt, sampling, n=n, **wishes) for prompt in PROMPTS[:2]]
        requests += [follower for request in requests for follower in request.followers]
        for _ in range(after):
            engine.step()
        runner = engine.core.runner
        plain = getattr(runner, place)

        def once(*args, plain=plain, runner=runner):
            monkeypatch.setattr(runner, place, plain)
            raise error

        monkeypatch.setattr(runner, place, once)
        if leaves:
            with pytest.raises(type(error)):
                engine.step()
        drain(engine)
        for request in requests:
            expected = next(
                Engine(tiny_model(CONFIG)).generate(
                    [request.ids[: request.prompt_tokens]], sampling, choice=request.wishes.choice
                )
            )
            completion = request.completion()
            assert completion.token_ids == expected.token_ids
            assert len(completion.prompt_logprobs) == request.prompt_tokens - 1
            assert {len(experts) for experts in completion.routing.values()} == {len(request.ids) - 1}


class Broken:
    """A drafter that fails on its third call."""

    layers = 0
    calls = 0

    def draft(self, advances) -> None:
        self.calls += 1
        if self.calls >= 3:
            raise RuntimeError("no idea")


def test_a_drafter_that_fails_is_left_out():
    for length in (2, 3, 12):
        engine = Engine(tiny_model(CONFIG), drafter=Broken(), options=Options(adaptive=False))
        sampling = Sampling(max_tokens=length, temperature=0, ignore_eos=True)
        requests = [engine.submit(prompt, sampling) for prompt in PROMPTS]
        if length > 2:
            with pytest.warns(UserWarning, match="speculation failed .* no idea"):
                drain(engine)
        else:
            drain(engine)
        assert [len(request.choices) for request in requests] == [length] * 3


def test_a_guess_whose_numbers_are_not_finite_does_not_harm_its_request():
    model = tiny_model(CONFIG)
    model.decoder.embed_tokens.weight.data[52] = float("nan")
    plain = Sampling(max_tokens=12, temperature=0, ignore_eos=True, logit_bias={52: -100})

    class Bad:
        layers = 0

        def draft(self, advances) -> None:
            for advance in advances:
                if advance.request.speculating and not advance.request.done and advance.request.pending == 1:
                    advance.request.drafts = [52]

    engine = Engine(model, drafter=Bad(), options=Options(adaptive=False))
    prompt = [i % 50 for i in PROMPTS[1]]
    (completion,) = engine.generate([prompt], plain)
    assert completion.finish_reason == "length" and completion.token_ids == alone(prompt, plain)


def test_a_disk_that_fails_keeps_nobody_in_the_engine(tmp_path, monkeypatch):
    engine = Engine(tiny_model(CONFIG), options=Options(prefix_folder=tmp_path))
    request = engine.submit(PROMPTS[2], GREEDY)
    monkeypatch.setattr(engine.core.cache, "payload", lambda block: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        drain(engine)
    assert request.done and not engine.busy and engine.core.pool.used == 0


def test_one_failure_among_forks_in_a_small_cache_ends_nothing(monkeypatch):
    """Forks share blocks; computed again each needs its own, and the cache holds fewer than all of them."""
    engine = Engine(tiny_model(CONFIG), max_batch=4, options=Options(cache_memory=12 * BLOCK_BYTES))
    sampling = Sampling(max_tokens=10, temperature=1, ignore_eos=True)
    prompt = tokens(100, seed=3).tolist()
    leader = engine.submit(prompt, sampling, n=4)
    group = [leader, *leader.followers]
    while not leader.choices:
        engine.step()
    hidden = engine.core.runner.hidden

    def once(works):
        monkeypatch.setattr(engine.core.runner, "hidden", hidden)
        raise MemoryError("once")

    monkeypatch.setattr(engine.core.runner, "hidden", once)
    drain(engine)
    assert [request.completion().finish_reason for request in group] == ["length"] * 4


def test_a_request_that_fails_late_runs_alone_until_there():
    """Its next chunks are fine: it must not be let back among the others before the one that failed."""
    model = tiny_model(CONFIG)
    forward = model.decoder.forward

    def guarded(ids, **rest):
        if (ids == 52).any():
            raise RuntimeError("poison")
        return forward(ids, **rest)

    model.decoder.forward = guarded
    engine = Engine(model, max_batch=2, options=Options(step_tokens=32, prefix_cache=False))
    good = engine.submit([3] * 20, Sampling(max_tokens=100, ignore_eos=True, logit_bias={52: -100}))
    bad = engine.submit([5] * 150 + [52], GREEDY)
    steps = 0
    while not bad.done:
        engine.step()
        steps += 1
    assert bad.completion().finish_reason == "error" and steps < 40
    drain(engine)
    assert len(good.choices) == 100


def test_a_pass_that_leaves_nonsense_and_raises_harms_no_later_request():
    """Its blocks are given to others, whose masked slots would meet 0 x NaN."""
    model = tiny_model(CONFIG)
    engine = Engine(model, max_batch=2, options=Options(cache_memory=8 * BLOCK_BYTES, prefix_cache=False))
    forward = model.decoder.forward

    def leaving(ids, *, cache, **rest):
        if (ids == 52).any():
            engine.core.cache._slots[0].index_fill_(0, cache._slots_N, float("nan"))
            raise RuntimeError("half way")
        return forward(ids, cache=cache, **rest)

    model.decoder.forward = leaving
    plain = Sampling(max_tokens=8, temperature=0, ignore_eos=True, logit_bias={52: -100})
    bad = engine.submit([5] * 60 + [52], plain)
    drain(engine)
    assert bad.completion().finish_reason == "error"
    for prompt in PROMPTS:
        ids = [i % 50 for i in prompt]
        (completion,) = engine.generate([ids], plain)
        assert completion.token_ids == alone(ids, plain)


def test_many_completions_of_one_prompt_pass_through_a_narrow_engine():
    engine = Engine(tiny_model(CONFIG), max_batch=2, options=Options(step_tokens=32))
    prompts = [tokens(100, seed=4).tolist(), PROMPTS[0]]
    done = list(engine.generate(prompts, Sampling(max_tokens=6, temperature=1, ignore_eos=True), n=7))
    assert sorted((c.index, c.choice) for c in done) == [(i, k) for i in range(2) for k in range(7)]
    assert {c.finish_reason for c in done} == {"length"}


@pytest.mark.parametrize(
    "wish, message",
    [
        ({"tenant": 5}, "tenant is 5"), ({"deadline_s": "soon"}, "deadline_s is 'soon'"), ({"choice": -1}, "choice"),
        ({"deadline_s": float("nan")}, "deadline_s is nan"), ({"routing": 1}, "routing is 1"), ({"n": 0}, "n is 0"),
        ({"n": True}, "n is True"), ({"n": "x"}, "n is 'x'"), ({"colour": 1}, "colour is nothing that a request can"),
    ],
)  # fmt: skip
def test_wishes_that_make_no_sense_are_refused_before_anything_runs(wish, message):
    engine = Engine(tiny_model(CONFIG))
    with pytest.raises(UserError, match=message):
        engine.submit(PROMPTS[0], GREEDY, **wish)
    assert not engine.busy


def test_the_bounds_of_the_queue_count_every_completion():
    engine = Engine(tiny_model(CONFIG), max_batch=2, options=Options(max_queue=2, max_queue_tokens=60))
    with pytest.raises(UserError, match="n is 9; max_queue 2 and max_batch 2 allow less"):
        engine.submit(PROMPTS[0], GREEDY, n=9)
    engine.submit(PROMPTS[0], GREEDY)
    with pytest.raises(QueueFull, match="this request has 70"):
        engine.submit(PROMPTS[2], GREEDY, n=2)
    for _ in range(3):
        engine.submit([3], GREEDY)
    with pytest.raises(QueueFull, match="4 requests wait"):
        engine.stream(PROMPTS[0], GREEDY)
    drain(engine)


def test_idle_hours_do_not_count_into_when_to_come_again(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("finback.engine.stats.time.monotonic", lambda: now[0])
    engine = Engine(tiny_model(CONFIG), max_batch=1)
    for _ in range(3):
        requests = [engine.submit(PROMPTS[0], Sampling(max_tokens=2, ignore_eos=True)) for _ in range(3)]
        while not all(request.done for request in requests):
            now[0] += 1
            engine.step()
        now[0] += 30_000
    assert engine.stats().retry_after_s <= 3


def test_prompts_are_admitted_as_far_as_blocks_are_not_promised():
    """Eight prompts of which the cache holds three: none is begun only to be thrown out again."""
    engine = Engine(tiny_model(CONFIG), max_batch=8, options=Options(cache_memory=24 * BLOCK_BYTES, step_tokens=32))
    for seed in range(8):
        engine.submit(tokens(100, seed=seed).tolist(), Sampling(max_tokens=4, ignore_eos=True))
    drain(engine)
    assert engine.stats().preemptions == 0


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_an_8_bit_cache_reads_the_same_however_a_prompt_is_cut(form):
    prompt, results = tokens(120, seed=5).tolist(), []
    for step_tokens in (16, 48, 400):
        engine = Engine(tiny_model(CONFIG), options=Options(step_tokens=step_tokens, cache_format=form))
        (completion,) = engine.generate([prompt], Sampling(max_tokens=8, temperature=0, ignore_eos=True))
        results.append(torch.tensor(completion.logprobs))
    for other in results[1:]:
        # Sums in another order may move a number to the next code; read back unrounded they were 0.09 to 0.45 apart.
        torch.testing.assert_close(other, results[0], atol=2e-3, rtol=0)


@pytest.mark.parametrize("hidden", [32, 33, 36])
def test_bits_do_not_depend_on_where_a_row_lies(hidden):
    model = tiny_model(tiny(hidden_size=hidden))
    each = Sampling(max_tokens=10, temperature=1, ignore_eos=True)
    options = Options(batch_invariant=True)
    single = [next(Engine(model, options=options).generate([p], each)).logprobs for p in PROMPTS]
    together = sorted(Engine(model, max_batch=3, options=options).generate(PROMPTS, each), key=lambda c: c.index)
    assert [c.logprobs for c in together] == single


def test_what_was_computed_otherwise_is_not_read_from_disk(tmp_path):
    """Blocks of an engine without fixed order must not reach one with it."""
    first = Engine(tiny_model(CONFIG), options=Options(prefix_folder=tmp_path))
    next(first.generate([PROMPTS[2]], GREEDY))
    first.close()
    second = Engine(tiny_model(CONFIG), options=Options(prefix_folder=tmp_path, batch_invariant=True))
    assert next(second.generate([PROMPTS[2]], GREEDY)).cached_tokens == 0


def test_experts_on_disk_are_part_of_the_fingerprint(tmp_path):
    from finback.weights import load, save

    prints = []
    for change in (0.0, 0.5):
        model = tiny_model(tiny(hidden_size=32, moe_intermediate_size=16))
        model.decoder.layers["1"].mlp.experts.down.value.data[3, 2, 1] += change
        save(model, None, folder := tmp_path / f"model-{change}")
        prints.append(fingerprint(load(folder, expert_memory=10**6)))
    assert prints[0] != prints[1]
