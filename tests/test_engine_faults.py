"""Faults: one request's failure, a full queue, deadlines, steps that hang. The others go on as if nothing had been."""

import threading
import time

import pytest
import torch
from text_samples import trained
from tiny_model import tiny, tiny_model, tokens

from finback.engine import Engine, Grammar, Options, QueueFull, Sampling, Watchdog
from finback.engine.stats import Counters
from finback.errors import UserError
from finback.text import prompt_ids

CONFIG = tiny()
POISON = 52  # a token id that the prompts below do not have
GREEDY = Sampling(max_tokens=12, temperature=0, ignore_eos=True, logit_bias={POISON: -100})
PROMPTS = [[i % 50 for i in tokens(n, seed=n).tolist()] for n in (9, 20, 35)]
TOKENIZER = trained()


def poisoned() -> torch.nn.Module:
    """A model in which one token's embedding is not finite."""
    model = tiny_model(CONFIG)
    model.decoder.embed_tokens.weight.data[POISON] = float("nan")
    return model


def failing(model, error: Exception):
    """Passes with the poison in them raise."""
    forward = model.decoder.forward

    def guarded(ids, **rest):
        if (ids == POISON).any():
            raise error
        return forward(ids, **rest)

    model.decoder.forward = guarded
    return model


def alone(prompt, options=None) -> list[int]:
    return next(Engine(tiny_model(CONFIG), options=options).generate([prompt], GREEDY)).token_ids


def drain(engine: Engine) -> None:
    for _ in range(500):
        if engine.busy:
            engine.step()
    assert not engine.busy and engine.core.pool.used == 0


@pytest.mark.parametrize("place", [0, 20, 34])
def test_numbers_that_are_not_finite_end_their_request_and_reach_no_other(place):
    """Its blocks are used again by others, whose masked slots would meet 0 x NaN."""
    block = 4 * 22 * 3 * 16
    engine = Engine(poisoned(), max_batch=3, options=Options(cache_memory=12 * block, step_tokens=32))
    bad = [*PROMPTS[2]]
    bad[place] = POISON
    requests = [engine.submit(p, GREEDY) for p in (PROMPTS[0], bad, PROMPTS[1], PROMPTS[2], bad, PROMPTS[0])]
    drain(engine)
    reasons = [request.completion().finish_reason for request in requests]
    assert reasons == ["length", "error", "length", "length", "error", "length"]
    assert "not finite" in requests[1].completion().error
    for request in (requests[0], requests[2], requests[3], requests[5]):
        assert request.completion().token_ids == alone(request.ids[: request.prompt_tokens])
    assert engine.core.cache.storage.isfinite().all()
    assert engine.stats().failed == 2 and engine.stats().finished == 4


def test_a_failed_request_is_told_of_and_gone_in_the_step_in_which_it_failed():
    engine = Engine(poisoned(), max_batch=1)
    bad, good = engine.submit([3, POISON], GREEDY), engine.submit(PROMPTS[0], GREEDY)
    assert engine.step() == [bad] and bad.completion().finish_reason == "error"
    assert engine.core.pool.used == 0 and engine.core.scheduler.running == []
    assert engine.step() == [good], "its row is free"
    drain(engine)


def test_a_failed_request_leaves_shared_blocks_as_they_are():
    """Two begin alike; the one that fails at its end must not wipe what the other still reads."""
    engine = Engine(poisoned(), max_batch=3, options=Options(step_tokens=400))
    good = engine.submit(PROMPTS[2], GREEDY)
    engine.step()
    bad = engine.submit([*PROMPTS[2][:32], 7, POISON], GREEDY)
    drain(engine)
    assert bad.completion().finish_reason == "error" and bad.completion().cached_tokens == 32
    assert good.completion().token_ids == alone(PROMPTS[2])


@pytest.mark.parametrize("error", [MemoryError("no memory"), RuntimeError("kernel broke"), IndexError("oops")])
def test_a_pass_that_raises_ends_only_the_request_that_made_it(error):
    engine = Engine(failing(tiny_model(CONFIG), error), max_batch=4)
    requests = [engine.submit(p, GREEDY) for p in (PROMPTS[0], [*PROMPTS[1], POISON], PROMPTS[2])]
    late = engine.submit([3, POISON], GREEDY)
    drain(engine)
    assert [r.completion().finish_reason for r in requests] == ["length", "error", "length"]
    assert late.completion().error.startswith(type(error).__name__)
    for request in (requests[0], requests[2]):
        assert request.completion().token_ids == alone(request.ids[: request.prompt_tokens])


def test_after_a_failure_even_the_last_gets_its_blocks():
    """Three shared a prompt's blocks; each alone computes it again, and the cache is too small for three of them."""
    model, passes = tiny_model(CONFIG), []
    forward = model.decoder.forward

    def once(ids, **rest):
        passes.append(ids)
        if len(passes) == 3:
            raise RuntimeError("once")
        return forward(ids, **rest)

    model.decoder.forward = once
    engine = Engine(model, max_batch=4, options=Options(prefix_cache=False, cache_memory=6 * 4 * 22 * 3 * 16))
    request = engine.submit(PROMPTS[2], GREEDY, n=3)
    requests = [request, *request.followers]
    for _ in range(200):
        engine.step()
    assert [r.completion().token_ids for r in requests] == [alone(PROMPTS[2])] * 3


def test_a_failure_while_decoding_leaves_the_others_whole():
    """Tokens they already have stay; what was lost is computed again."""
    model = tiny_model(CONFIG)
    engine = Engine(failing(model, RuntimeError("late")), max_batch=3)
    victim = engine.submit(PROMPTS[0], Sampling(max_tokens=30, temperature=0, ignore_eos=True))
    others = [engine.submit(p, GREEDY) for p in PROMPTS[1:]]
    for _ in range(5):
        engine.step()
    victim.ids[-1] = POISON
    sizes: list[int] = []
    guarded = model.decoder.forward
    model.decoder.forward = lambda ids, **rest: sizes.append(ids.numel()) or guarded(ids, **rest)
    drain(engine)
    assert sizes[-1] == 2, "the others decode together again"
    assert victim.completion().finish_reason == "error" and len(victim.completion().token_ids) == 5
    assert [r.completion().token_ids for r in others] == [alone(p) for p in PROMPTS[1:]]


def test_generate_tells_of_a_failure_and_goes_on_and_stream_raises_it():
    engine = Engine(poisoned())
    done = sorted(engine.generate([[POISON], PROMPTS[0]], GREEDY), key=lambda c: c.index)
    assert "not finite" in done[0].error and done[0].finish_reason == "error"
    assert done[1].token_ids == alone(PROMPTS[0])
    with pytest.raises(UserError, match="not finite"):
        list(engine.stream([POISON], GREEDY))
    assert not engine.busy


def test_a_tokenizer_that_fails_ends_its_request_alone(monkeypatch):
    model = tiny_model(tiny(vocab_size=TOKENIZER.vocab_size))
    engine = Engine(model, TOKENIZER, max_batch=2)
    bad, good = (engine.submit(p, GREEDY) for p in ("hm", "well"))

    def explode(token):
        raise ValueError("no such piece")

    monkeypatch.setattr(bad._transcript, "push", explode)
    drain(engine)
    assert bad.completion().error == "ValueError: no such piece"
    assert good.completion().finish_reason == "length"


def test_a_deadline_ends_a_request_wherever_it_is():
    engine = Engine(tiny_model(CONFIG), max_batch=1)
    running = engine.submit(PROMPTS[0], GREEDY, deadline_s=1000)
    waiting = engine.submit(PROMPTS[1], GREEDY, deadline_s=1000)
    free = engine.submit(PROMPTS[2], GREEDY)
    engine.step()
    running.deadline = waiting.deadline = time.monotonic() - 1
    assert {running, waiting} <= set(engine.step())
    assert {r.completion().finish_reason for r in (running, waiting)} == {"deadline"}
    drain(engine)
    assert free.completion().token_ids == alone(PROMPTS[2])
    first = engine.submit(PROMPTS[0], GREEDY, deadline_s=0.0)
    assert engine.step() == [first] and first.completion().token_ids == []


def test_a_full_queue_refuses_with_the_counts_and_when_to_come_again():
    engine = Engine(tiny_model(CONFIG), max_batch=1, options=Options(max_queue=2, max_queue_tokens=60))
    accepted = [engine.submit(PROMPTS[0], GREEDY) for _ in range(3)]
    with pytest.raises(QueueFull, match=r"3 requests wait already, max_queue is 2") as caught:
        engine.submit(PROMPTS[0], GREEDY)
    assert caught.value.retry_after_s > 0
    engine.step()
    engine.cancel(accepted[2])
    with pytest.raises(QueueFull, match=r"9 prompt tokens wait already, this request has 100, max_queue_tokens is 60"):
        engine.submit([3] * 100, GREEDY)
    with pytest.raises(QueueFull, match=r"this request has 52"):
        engine.submit([3] * 52, GREEDY)
    engine.submit([3] * 51, GREEDY)
    drain(engine)


def test_when_to_come_again_is_the_time_between_two_that_leave():
    counters = Counters()
    assert counters.retry_after() == 1.0
    counters.ends.extend([10.0, 12.0, 13.0, 19.0])
    assert counters.retry_after() == 3.0


def test_the_first_of_an_empty_queue_is_taken_whatever_its_length():
    engine = Engine(tiny_model(CONFIG), options=Options(max_queue_tokens=10))
    engine.submit([3] * 50, GREEDY)
    drain(engine)


def test_a_hanging_step_is_told_once_and_seen_by_other_threads():
    told: list[float] = []
    release = threading.Event()
    engine = Engine(tiny_model(CONFIG))
    forward = engine.model.decoder.forward
    engine.model.decoder.forward = lambda *a, **k: release.wait(20) and forward(*a, **k)
    engine.submit(PROMPTS[0], GREEDY)
    with Watchdog(engine.heartbeat, 0.05, told.append):
        thread = threading.Thread(target=engine.step)
        thread.start()
        while not told:
            time.sleep(0.01)
        assert engine.heartbeat.running_s >= 0.05 and engine.stats().heartbeat_s >= 0.05
        time.sleep(0.2)
        release.set()
        thread.join()
    assert len(told) == 1 and told[0] >= 0.05
    assert engine.heartbeat.running_s == 0
    drain(engine)


def test_by_default_a_watchdog_prints_every_stack(capfd):
    engine = Engine(tiny_model(CONFIG))
    with Watchdog(engine.heartbeat, 0.02), engine.heartbeat:
        time.sleep(0.2)
    assert "a step has been running" in (err := capfd.readouterr().err)
    assert "test_engine_faults.py" in err


def thinking(budget: int | None, **more):
    model = tiny_model(tiny(vocab_size=TOKENIZER.vocab_size))
    engine = Engine(model, TOKENIZER)
    question = [{"role": "user", "content": "What is 1 + 1?"}]
    assert prompt_ids(TOKENIZER, question)[-1] != TOKENIZER.end_think_id
    sampling = Sampling(max_tokens=40, temperature=1, ignore_eos=True, thinking_tokens=budget, **more)
    return next(engine.generate([question], sampling))


@pytest.mark.parametrize("budget", [0, 1, 7])
def test_a_thinking_budget_closes_the_thinking_and_goes_on_with_the_answer(budget):
    free, bound = thinking(None), thinking(budget)
    assert TOKENIZER.end_think_id not in free.token_ids
    assert bound.token_ids[budget] == TOKENIZER.end_think_id
    assert bound.token_ids[:budget] == free.token_ids[:budget]
    assert bound.reasoning_tokens == budget + 1 and len(bound.token_ids) == 40
    assert bound.logprobs[budget] == 0.0, "it was the only one allowed"
    assert bound.text and free.reasoning_tokens == 40


def test_a_grammar_binds_the_answer_and_not_the_thinking():
    completion = thinking(5, grammar=Grammar("regex", "(ab|ba){4}"))
    assert len(completion.text) == 8 and {completion.text[i : i + 2] for i in range(0, 8, 2)} <= {"ab", "ba"}
    assert completion.finish_reason == "stop" or completion.token_ids[-1] == TOKENIZER.eos_id


def test_a_grammar_that_does_not_compile_is_refused_before_anything_runs():
    engine = Engine(tiny_model(tiny(vocab_size=TOKENIZER.vocab_size)), TOKENIZER)
    with pytest.raises(UserError):
        engine.submit("hm", Sampling(grammar=Grammar("regex", "(((")))
    assert not engine.busy
    with pytest.raises(UserError, match="needs the tokenizer"):
        Engine(tiny_model(CONFIG)).submit([3], Sampling(max_tokens=9, grammar=Grammar("regex", "a")))


def test_statistics_add_up():
    engine = Engine(tiny_model(CONFIG), max_batch=2)
    requests = [engine.submit(p, GREEDY) for p in PROMPTS]
    engine.step()
    stats = engine.stats()
    assert (stats.waiting, stats.running, stats.requests) == (1, 2, 3)
    assert stats.blocks_used == sum(len(r.blocks) for r in requests)
    engine.cancel(requests[2])
    drain(engine)
    stats = engine.stats()
    assert (stats.finished, stats.cancelled, stats.failed) == (2, 1, 0)
    assert stats.generated_tokens == 24 and stats.prompt_tokens == 29
    assert stats.tokens_per_s > 0 and 0 < stats.step_s <= stats.step_p95_s
    assert set(stats.to_dict()) > {"acceptance", "waiting"}
