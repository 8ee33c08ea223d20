"""What the scheduler plans, step by step: the budget, the order, and who gives back blocks to whom."""

from scripted_model import ScriptedModel

from finback.engine import Engine, Options, Request, Sampling
from finback.engine.blocks import BLOCK

BLOCK_BYTES = 4 * 22 * 3 * BLOCK


def engine_of(rows: int, blocks: int | None = None, **options) -> Engine:
    memory = None if blocks is None else blocks * BLOCK_BYTES
    return Engine(ScriptedModel([5], context=4096), max_batch=rows, options=Options(cache_memory=memory, **options))


def greedy(tokens: int) -> Sampling:
    return Sampling(max_tokens=tokens, temperature=0, ignore_eos=True)


def steps(engine: Engine, limit: int = 300) -> int:
    """Steps until nothing is left to do."""
    for count in range(limit):
        if not engine.busy:
            return count
        engine.step()
    raise AssertionError(f"still busy after {limit} steps")


def preempted(engine: Engine, monkeypatch) -> list[Request]:
    """Records who gives back its blocks."""
    seen: list[Request] = []
    plain = engine.core.scheduler.requeue
    monkeypatch.setattr(engine.core.scheduler, "requeue", lambda request: seen.append(request) or plain(request))
    return seen


def test_a_step_computes_no_more_than_its_budget():
    """Long prompts alone and together, and beside many that decode; attention makes a token cost a little more."""
    engine = engine_of(rows=30, step_tokens=64)
    for _ in range(3):
        engine.submit([7] * 300, greedy(2))
    for _ in range(20):
        engine.submit([8] * 2, greedy(60))
    steps(engine)
    sizes = [width for _, width in engine.model.decoder.passes]
    assert max(sizes) <= 64 and sum(sizes) >= 3 * 300
    assert sum(size >= 32 for size in sizes) > 10, "nor much less"


def test_nobody_joins_without_blocks_and_nobody_overtakes():
    engine = engine_of(rows=4, blocks=12, prefix_cache=False)
    first = engine.submit([7] * 100, greedy(3))
    engine.step()
    second, third = (engine.submit([7] * n, greedy(3)) for n in (100, 10))
    engine.step()
    assert engine.core.scheduler.running == [first]
    assert engine.core.scheduler.waiting == [second, third]
    steps(engine)
    assert second.done and third.done and engine.stats().preemptions == 0


def test_who_gave_back_its_blocks_waits_in_its_place_by_arrival(monkeypatch):
    engine = engine_of(rows=2, blocks=8, prefix_cache=False)
    requests = [engine.submit([7] * 30, greedy(75)) for _ in range(4)]
    gone = preempted(engine, monkeypatch)
    order: list[Request] = []
    for _ in range(400):
        order += [request for request in engine.step() if request.done]
        assert [r.arrival for r in engine.core.scheduler.waiting] == sorted(
            r.arrival for r in engine.core.scheduler.waiting
        )
    assert requests[1] in gone and requests[0] not in gone
    assert order == requests


def test_work_of_who_had_to_give_back_its_blocks_is_not_run(monkeypatch):
    """The first is in the middle of its prompt, the second decodes; the cache has no room for both."""
    engine = engine_of(rows=2, blocks=11, prefix_cache=False, step_tokens=16)
    first = engine.submit([7] * 150, greedy(10))
    engine.step()
    second = engine.submit([8] * 14, greedy(60))
    gone = preempted(engine, monkeypatch)
    plan = engine.core.scheduler.plan
    planned = []
    monkeypatch.setattr(engine.core.scheduler, "plan", lambda: planned.append(plan()) or planned[-1])
    while not first.done:
        engine.step()
        counts = {work.request: work.count for work in planned[-1]}
        assert first in counts or counts[second] == 14, "it waits for a shorter prompt alone"
        for work in planned[-1]:
            assert work.request not in engine.core.scheduler.waiting
            assert work.request.done or len(work.request.blocks) * BLOCK >= work.start + work.count
        assert len(planned) < 100
    assert gone == [second]
    steps(engine)
    assert len(second.choices) == 60 and engine.stats().failed == 0


def test_who_waits_for_a_prompt_goes_on_when_its_leader_is_cancelled():
    engine = engine_of(rows=4)
    for victim in (0, 1):
        leader = engine.submit([7] * 20, greedy(4), n=3)
        requests = [leader, *leader.followers]
        engine.cancel(requests[victim])
        steps(engine)
        reasons = [request.completion().finish_reason for request in requests]
        assert reasons == ["cancelled" if number == victim else "length" for number in range(3)]
