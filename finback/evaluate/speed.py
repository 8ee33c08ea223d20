"""How fast an engine serves: requests in a closed loop, or arriving by a Poisson process, timed token by token."""

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from finback.engine import Engine, Request, Sampling
from finback.errors import UserError
from finback.progress import Bar

_WARM_PROMPT, _WARM_TOKENS = 16, 4  # of a request that warms up, beside what all prompts share; the first is whole


@dataclass(frozen=True)
class Clock:
    """Seconds from any start, and waiting. Tests bring their own."""

    now: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True)
class Load:
    """What is asked of an engine. Raises UserError for a value that is not allowed.

    requests: how many. concurrency: closed loop, so many in flight, the next sent when one ends; None: open loop, sent
    at `rate` a second on average, as a Poisson process, however many are in flight. prompt_tokens: shortest and longest
    prompt, drawn uniformly, of random ids, the first `shared_tokens` the same in all. max_tokens: new tokens of each.
    """

    requests: int
    concurrency: int | None = None
    rate: float | None = None
    prompt_tokens: tuple[int, int] = (512, 512)
    max_tokens: int = 64
    shared_tokens: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.prompt_tokens
        _check("requests", self.requests, "at least 1", self.requests >= 1)
        _check("prompt_tokens", f"{low}-{high}", "a number from 1, or two with a -, the lesser first", 1 <= low <= high)
        _check("max_tokens", self.max_tokens, "at least 1", self.max_tokens >= 1)
        _check(
            "shared_tokens", self.shared_tokens, f"0 to {low - 1}, below every prompt", 0 <= self.shared_tokens < low
        )
        if self.concurrency is not None:
            allowed = f"1 to {self.requests}, the number of requests"
            _check("concurrency", self.concurrency, allowed, 1 <= self.concurrency <= self.requests)
        else:
            _check("rate", self.rate, "above 0, in requests a second", self.rate is not None and 0 < self.rate < 1e6)

    def check_context(self, context: int) -> None:
        """Raises UserError where the longest prompt and its new tokens have no room in a model's context."""
        longest = self.prompt_tokens[1]
        if longest + self.max_tokens > context:
            raise UserError(
                f"prompt_tokens is {longest} and max_tokens {self.max_tokens}, together more than the model's context "
                f"of {context}; lower one of them"
            )

    def prompts(self, vocab_size: int, count: int, stream: str = "prompts") -> list[list[int]]:
        """Token ids of `count` prompts, the same for the same seed and stream."""
        shared = _ids(random.Random(f"{self.seed} shared"), self.shared_tokens, vocab_size)
        draw = random.Random(f"{self.seed} {stream}")
        lengths = [draw.randint(*self.prompt_tokens) for _ in range(count)]
        return [shared + _ids(draw, length - len(shared), vocab_size) for length in lengths]

    def arrivals(self) -> list[float]:
        """When requests arrive in the open loop, seconds from its start, increasing."""
        assert self.rate is not None, "a closed loop has no schedule"
        draw, times = random.Random(f"{self.seed} arrivals"), [0.0]
        for _ in range(self.requests):
            times.append(times[-1] + draw.expovariate(self.rate))
        return times[1:]


@dataclass
class Record:
    """One request's times, in seconds from the start of the loop: when it was due, and when each token came."""

    arrival: float
    prompt_tokens: int
    token_times: list[float] = field(default_factory=list)
    cached_tokens: int = 0

    @property
    def first_s(self) -> float:
        """Time to first token."""
        return self.token_times[0] - self.arrival

    @property
    def total_s(self) -> float:
        """End-to-end latency."""
        return self.token_times[-1] - self.arrival

    @property
    def gaps_s(self) -> list[float]:
        """Between one token and the next; 0 within a step that gave several."""
        return [after - before for before, after in zip(self.token_times, self.token_times[1:], strict=False)]


@dataclass(frozen=True)
class Step:
    """One step of the engine that only decoded: `rows` requests, `tokens` new ones, after `cached` ones in all."""

    seconds: float
    rows: int
    tokens: int
    cached: int


@dataclass(frozen=True)
class Percentiles:
    """The least value that at least 50, 95 and 99 % of the values do not exceed (nearest rank: one that occurred)."""

    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Percentiles | None":
        """None where there are no values."""
        ordered = sorted(values)
        # In whole numbers, so that no rounding moves a rank.
        return cls(*(ordered[-(-q * len(ordered) // 100) - 1] for q in (50, 95, 99))) if ordered else None


@dataclass(frozen=True)
class Result:
    """What came of a load. seconds: from the first arrival to the last token. The warm-up is in none of it.

    ttft_s: time to first token, from when the request was due; between_s: from token to token; total_s: end to end;
    step_s: every step. decoding: the steps that computed no prompt. hit_tokens: of prompts, found in the cache.
    cache_bytes: that a token takes there.
    """

    load: Load
    seconds: float
    records: list[Record]
    new_tokens: int
    prompt_tokens: int
    ttft_s: Percentiles
    between_s: Percentiles | None
    total_s: Percentiles
    step_s: Percentiles
    most_in_flight: int
    decoding: list[Step]
    hit_tokens: int
    preemptions: int
    drafted: int
    accepted: int
    expert_hit_rate: float | None
    cache_bytes: int

    @property
    def rates(self) -> dict[str, float]:
        """Tokens and requests a second."""
        counts = {"new_tokens": self.new_tokens, "prompt_tokens": self.prompt_tokens, "requests": len(self.records)}
        return {f"{name}_per_s": count / self.seconds for name, count in counts.items()}

    @property
    def acceptance(self) -> float | None:
        """Share of the drafts that came."""
        return self.accepted / self.drafted if self.drafted else None

    def to_dict(self) -> dict[str, Any]:
        """All of it but the single steps, for JSON."""
        found = asdict(self) | self.rates | {"acceptance": self.acceptance}
        del found["decoding"]
        return found


def measure(engine: Engine, load: Load, clock: Clock | None = None, progress: Bar | None = None) -> Result:
    """Run `load` on an idle engine, greedy and past EOS, after a warm-up at the same concurrency that is not counted.

    The warm-up has prompts of its own; what all prompts share is in the cache when counting begins. Raises UserError
    for prompts that do not fit the model's context, and where a request fails.
    """
    assert not engine.busy, "measuring needs the engine for itself"
    load.check_context(engine.context)
    clock, vocab_size = clock or Clock(), engine.model.config.vocab_size
    together = min(load.concurrency or engine.max_batch, load.requests)
    warm = _Loop(engine, min(_WARM_TOKENS, load.max_tokens), clock, Bar())
    first, *others = load.prompts(vocab_size, together, "warm-up")
    warm.closed([first, *(ids[: load.shared_tokens + _WARM_PROMPT] for ids in others)], together)
    before, prompts = engine.stats(), load.prompts(vocab_size, load.requests)
    hits, uses = _experts(engine)
    loop = _Loop(engine, load.max_tokens, clock, progress or Bar())
    if load.concurrency is not None:
        loop.closed(prompts, load.concurrency)
    else:
        loop.open(prompts, load.arrivals())
    after, done = engine.stats(), loop.records
    began = min(record.arrival for record in done)
    hits, uses = (after - before for before, after in zip((hits, uses), _experts(engine), strict=True))
    return Result(
        load=load,
        seconds=max(record.token_times[-1] for record in done) - began,
        records=done,
        new_tokens=sum(len(record.token_times) for record in done),
        prompt_tokens=sum(record.prompt_tokens for record in done),
        ttft_s=_percentiles([record.first_s for record in done]),
        between_s=Percentiles.of([gap for record in done for gap in record.gaps_s]),
        total_s=_percentiles([record.total_s for record in done]),
        step_s=_percentiles(loop.step_s),
        most_in_flight=loop.most,
        decoding=loop.decoding,
        hit_tokens=after.hit_tokens - before.hit_tokens,
        preemptions=after.preemptions - before.preemptions,
        drafted=after.drafted - before.drafted,
        accepted=after.accepted - before.accepted,
        expert_hit_rate=hits / uses if uses else None,
        cache_bytes=after.bytes_per_token,
    )


class _Loop:
    """Sends requests, steps the engine, and notes when tokens come."""

    def __init__(self, engine: Engine, max_tokens: int, clock: Clock, progress: Bar) -> None:
        self.engine, self.clock, self.progress = engine, clock, progress
        self.sampling = Sampling(temperature=0, top_p=1.0, max_tokens=max_tokens, ignore_eos=True)
        self.records: list[Record] = []
        self.flying: dict[Request, Record] = {}
        self.step_s: list[float] = []
        self.decoding: list[Step] = []
        self.most = 0
        self.start = clock.now()

    def closed(self, prompts: Sequence[list[int]], concurrency: int) -> None:
        """`concurrency` requests in flight until there are no more."""
        queue = deque(prompts)
        while queue or self.flying:
            while queue and len(self.flying) < concurrency:
                self._send(queue.popleft(), self._now())
            self._step()

    def open(self, prompts: Sequence[list[int]], arrivals: Sequence[float]) -> None:
        """Each prompt when it is due; one that is due during a step waits for its end, and its clock runs."""
        queue = deque(zip(prompts, arrivals, strict=True))
        while queue or self.flying:
            while queue and queue[0][1] <= self._now():
                self._send(*queue.popleft())
            if self.flying:
                self._step()
            else:
                self.clock.sleep(max(0.0, queue[0][1] - self._now()))

    def _now(self) -> float:
        return self.clock.now() - self.start

    def _send(self, prompt: list[int], arrival: float) -> None:
        record = Record(arrival, len(prompt))
        self.flying[self.engine.submit(prompt, self.sampling)] = record
        self.records.append(record)
        self.most = max(self.most, len(self.flying))

    def _step(self) -> None:
        rows, cached = len(self.flying), sum(len(request.ids) for request in self.flying)
        decodes = all(record.token_times and request.pending == 1 for request, record in self.flying.items())
        began = self._now()
        moved = self.engine.step()
        now = self._now()
        tokens = 0
        for request in moved:
            record = self.flying[request]
            new = len(request.choices) - len(record.token_times)
            record.token_times += [now] * new
            tokens += new
            if request.done:
                self._finish(request)
        self.step_s.append(now - began)
        if decodes and len(moved) == rows:
            self.decoding.append(Step(now - began, rows, tokens, cached))

    def _finish(self, request: Request) -> None:
        if request.finish_reason != "length":
            raise UserError(f"a request ended with {request.finish_reason}: {request.error}")
        self.flying.pop(request).cached_tokens = request.hits or 0
        self.progress.advance(1)


def _percentiles(values: Sequence[float]) -> Percentiles:
    found = Percentiles.of(values)
    assert found is not None, "every request has a token, and every token a step"
    return found


def _experts(engine: Engine) -> tuple[int, int]:
    """Uses so far of experts that stay on disk: those found in memory, and all."""
    hot = getattr(engine.model, "expert_cache", None)
    return (0, 0) if hot is None else (hot.hits, hot.uses)


def _ids(draw: random.Random, count: int, vocab_size: int) -> list[int]:
    return [draw.randrange(vocab_size) for _ in range(count)]


def _check(name: str, value: object, allowed: str, ok: bool) -> None:
    if not ok:
        raise UserError(f"{name} is {value}; it must be {allowed}")
