"""The load generator: percentiles, loops and what they count, on a scripted model and a clock that steps move on."""

import math
import statistics
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_model import ScriptedModel

from finback.engine import Engine, Options
from finback.errors import UserError
from finback.evaluate.speed import Clock, Load, Percentiles, measure

SCRIPT = [5, 9, 2, 7, 7, 1, 8]


class Timed(Engine):
    """An engine whose steps take `cost` seconds of a clock of their own; `seen`: prompts in the order they came."""

    def __init__(self, cost: float = 1.0, max_batch: int = 64, script=SCRIPT, warm: int = 0, **options) -> None:
        super().__init__(ScriptedModel(script), max_batch=max_batch, options=Options(**options))
        self.cost, self.t, self.warm = cost, 1000.0, warm
        self.seen: list[list[int]] = []
        self.in_flight: list[int] = []
        self.clock = Clock(lambda: self.t, self.sleep)

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.t += seconds + 1e-9  # as a real clock it never stands still

    def submit(self, prompt, sampling=None, **wishes):
        self.seen.append(list(prompt))
        return super().submit(prompt, sampling, **wishes)

    def step(self):
        self.in_flight.append(len(self.core.scheduler.waiting) + len(self.core.scheduler.running))
        self.t += self.cost if len(self.seen) > self.warm else 1000.0
        return super().step()


def run(engine: Timed, load: Load):
    return measure(engine, load, engine.clock)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=150))
def test_percentiles_are_the_least_values_that_enough_do_not_exceed(values):
    found = Percentiles.of(values)
    for q, value in ((50, found.p50), (95, found.p95), (99, found.p99)):
        enough = [v for v in values if 100 * sum(x <= v for x in values) >= q * len(values)]
        assert value == min(enough)


def test_percentiles_of_one_to_a_hundred():
    assert Percentiles.of(range(100, 0, -1)) == Percentiles(50, 95, 99)
    assert Percentiles.of(range(1, 21)) == Percentiles(10, 19, 20)
    assert Percentiles.of([]) is None


@settings(max_examples=15)
@given(st.data())
def test_a_closed_loop_keeps_as_many_in_flight_as_it_says_and_all_finish(data):
    requests = data.draw(st.integers(1, 9))
    concurrency = data.draw(st.integers(1, requests))
    rows = data.draw(st.integers(1, 9))  # fewer than are in flight: the others wait inside the engine
    load = Load(requests, concurrency, prompt_tokens=(3, 70), max_tokens=5, seed=data.draw(st.integers(0, 99)))
    engine = Timed(max_batch=rows)
    result = run(engine, load)
    assert result.most_in_flight == max(engine.in_flight) == concurrency
    assert len(result.records) == requests
    for record in result.records:
        assert len(record.token_times) == 5 and record.token_times == sorted(record.token_times)
    starts = [record.arrival for record in result.records]
    ends = sorted(record.token_times[-1] for record in result.records)
    assert starts[:concurrency] == [0.0] * concurrency
    assert starts[concurrency:] == ends[: requests - concurrency]  # the next is sent when one ends


def test_times_of_a_closed_loop_of_one_without_its_warm_up():
    """A prompt of 20 tokens takes one step and gives the first token; each of the 4 others one more. Steps take 2 s."""
    engine = Timed(cost=2.0, warm=1)
    result = run(engine, Load(6, 1, prompt_tokens=(20, 20), max_tokens=5))
    assert len(engine.seen) == 7  # one to warm up
    assert [record.arrival for record in result.records] == [10.0 * n for n in range(6)]
    assert result.records[2].token_times == [22.0, 24.0, 26.0, 28.0, 30.0]
    assert result.seconds == 60.0 and (result.new_tokens, result.prompt_tokens) == (30, 120)
    assert result.rates == {"new_tokens_per_s": 0.5, "prompt_tokens_per_s": 2.0, "requests_per_s": 0.1}
    for found, expected in ((result.ttft_s, 2.0), (result.between_s, 2.0), (result.total_s, 10.0)):
        assert found == Percentiles(expected, expected, expected)
    assert len(result.decoding) == 24 and {(s.seconds, s.rows, s.tokens) for s in result.decoding} == {(2.0, 1, 1)}
    assert [step.cached for step in result.decoding[:5]] == [21, 22, 23, 24, 21]


def test_steps_that_compute_prompts_are_no_decoding_steps():
    """Chunks of 16: 64 tokens take four steps, in which the others decode."""
    engine = Timed(step_tokens=16, prefix_cache=False)
    result = run(engine, Load(6, 2, prompt_tokens=(64, 64), max_tokens=8))
    assert {step.rows for step in result.decoding} <= {1, 2}
    assert all(step.tokens == step.rows for step in result.decoding)
    assert 0 < len(result.decoding) < len(result.records) * 8


def test_one_token_each_has_nothing_between():
    result = run(Timed(), Load(3, 3, prompt_tokens=(9, 9), max_tokens=1))
    assert result.between_s is None and result.decoding == [] and result.ttft_s == result.total_s


def test_arrivals_are_a_poisson_process_of_the_rate():
    times = Load(20_000, rate=4.0, seed=3).arrivals()
    gaps = [after - before for before, after in zip([0.0, *times], times, strict=False)]
    assert min(gaps) > 0
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.03)
    assert sum(gap > 0.25 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), rel=0.03)
    counts = Counter(int(time) for time in times)
    each = [counts[second] for second in range(int(times[-1]))]
    assert statistics.variance(each) == pytest.approx(4.0, rel=0.1)  # equals the mean


def test_the_seed_fixes_arrivals_and_prompts():
    load, same, other = (Load(50, rate=2.0, prompt_tokens=(5, 9), seed=seed) for seed in (1, 1, 2))
    assert load.arrivals() == same.arrivals() != other.arrivals()
    assert load.prompts(600, 50) == same.prompts(600, 50) != other.prompts(600, 50)
    assert load.prompts(600, 50, "warm-up") != load.prompts(600, 50)
    assert {len(prompt) for prompt in load.prompts(600, 50)} == {5, 6, 7, 8, 9}
    ids = {token for prompt in Load(1, 1).prompts(7, 20) for token in prompt}
    assert ids == set(range(7))


@pytest.mark.parametrize("cost", [0.1, 1.0, 5.0])
def test_an_open_loop_counts_from_when_a_request_was_due(cost):
    """Against a simulation: whoever is due when a step begins is in it, and gets a token at its end."""
    load = Load(25, rate=1.0, prompt_tokens=(4, 8), max_tokens=3, seed=5)
    result = run(Timed(cost, prefix_cache=False), load)
    due, now, running, expected = load.arrivals(), 0.0, [], {}
    waiting = list(enumerate(due))
    while waiting or running:
        running += [(index, []) for index, at in waiting if at <= now]
        waiting = [(index, at) for index, at in waiting if at > now]
        if not running:
            now = waiting[0][1]
            continue
        now += cost
        for index, times in running:
            times.append(now)
            expected[index] = times
        running = [(index, times) for index, times in running if len(times) < 3]
    for index, record in enumerate(result.records):
        assert record.arrival == due[index]  # whatever the steps take
        assert record.token_times == pytest.approx(expected[index])
        assert record.first_s == pytest.approx(expected[index][0] - due[index])
    assert result.seconds == pytest.approx(max(times[-1] for times in expected.values()) - due[0])


def test_what_waits_for_a_row_waits_on_the_clock():
    """Two rows, four steps a request, 1,000 arrivals a second: the first begins alone, the others take turns."""
    load = Load(8, rate=1000.0, prompt_tokens=(4, 4), max_tokens=4)
    result = run(Timed(1.0, max_batch=2), load)
    assert [round(record.first_s) for record in result.records] == [1, 2, 5, 6, 9, 10, 13, 14]
    assert result.most_in_flight == 8


def test_a_shared_beginning_is_found_from_the_first_counted_request_on():
    load = Load(6, 2, prompt_tokens=(60, 90), max_tokens=3, shared_tokens=48)
    engine = Timed()
    result = run(engine, load)
    assert len({tuple(prompt[:48]) for prompt in engine.seen}) == 1
    assert len({prompt[48] for prompt in engine.seen}) > 1
    assert result.hit_tokens == 6 * 48 and [record.cached_tokens for record in result.records] == [48] * 6
    alone = run(Timed(), Load(6, 6, prompt_tokens=(60, 90), max_tokens=3))
    assert alone.hit_tokens == 0


def test_tokens_of_one_step_have_gaps_of_zero():
    """A text that repeats itself: n-gram guesses come true."""
    engine = Timed(script=[4, 6] * 256, speculate="ngram", adaptive=False)
    result = run(engine, Load(3, 1, prompt_tokens=(8, 8), max_tokens=30))
    gaps = [gap for record in result.records for gap in record.gaps_s]
    assert len(gaps) == 3 * 29 and set(gaps) == {0.0, 1.0}
    assert gaps.count(0.0) == result.accepted > 30
    assert result.acceptance == result.accepted / result.drafted
    assert result.between_s.p50 == 0.0 and result.between_s.p99 == 1.0
    assert sum(step.tokens for step in result.decoding) == 3 * 29


def test_preemptions_of_the_load_alone_are_counted():
    engine = Timed(cache_memory=None)
    block = engine.core.cache.block_bytes
    engine = Timed(cache_memory=14 * block, max_batch=4)
    result = run(engine, Load(8, 4, prompt_tokens=(32, 32), max_tokens=60))
    assert result.preemptions > 0
    assert all(len(record.token_times) == 60 for record in result.records)


def test_a_request_that_fails_ends_the_measurement():
    engine = Timed()
    engine.model.decoder.forward = None
    with pytest.raises(UserError, match="ended with error: TypeError"):
        run(engine, Load(2, 1, prompt_tokens=(4, 4), max_tokens=3))


def test_what_does_not_fit_the_context_is_refused_before_anything_runs():
    engine = Timed()
    with pytest.raises(UserError, match=r"prompt_tokens is 500 and max_tokens 64, .* context of 512"):
        run(engine, Load(2, 1, prompt_tokens=(4, 500)))
    assert engine.seen == []


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"requests": 0}, "requests is 0"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"concurrency": 9}, "concurrency is 9; it must be 1 to 8"),
        ({"concurrency": None}, "rate is None"),
        ({"concurrency": None, "rate": 0.0}, "rate is 0.0"),
        ({"concurrency": None, "rate": math.nan}, "rate is nan"),
        ({"prompt_tokens": (9, 5)}, "prompt_tokens is 9-5"),
        ({"prompt_tokens": (0, 5)}, "prompt_tokens is 0-5"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"shared_tokens": 10}, "shared_tokens is 10; it must be 0 to 9"),
    ],
)
def test_a_load_that_cannot_be_is_refused(wrong, named):
    with pytest.raises(UserError, match=named):
        Load(**({"requests": 8, "concurrency": 1, "prompt_tokens": (10, 12)} | wrong))
