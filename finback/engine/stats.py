"""What the engine counts, and the watch over a step that does not end."""

import faulthandler
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

_WINDOW = 256  # steps that rates and percentiles look back on


@dataclass(frozen=True)
class Stats:
    """The engine at one moment. Blocks are of 16 tokens; rates and step times are over the last 256 steps.

    waiting, running: requests; waiting_tokens: prompt tokens not begun. blocks_used: held by requests; blocks_kept: of
    prompts that may come again. prompt_tokens: of all prompts begun; hit_tokens: those found in the cache.
    drafted, accepted: of speculation. heartbeat_s: since a step last ended, or since the running one began; it grows
    while nothing is to do.
    retry_after_s: when a place in a full queue will be free, by the rate of the last requests.
    expert_hit_rate: of experts kept on disk, None where all are in memory. refresh_s: of the last `refresh`.
    """

    waiting: int
    running: int
    waiting_tokens: int
    blocks: int
    blocks_used: int
    blocks_kept: int
    bytes_per_token: int
    requests: int
    finished: int
    cancelled: int
    failed: int
    preemptions: int
    prompt_tokens: int
    hit_tokens: int
    generated_tokens: int
    drafted: int
    accepted: int
    steps: int
    step_s: float
    step_p95_s: float
    tokens_per_s: float
    heartbeat_s: float
    retry_after_s: float
    expert_hit_rate: float | None
    refresh_s: float | None

    @property
    def acceptance(self) -> float | None:
        """Share of the drafts that came."""
        return self.accepted / self.drafted if self.drafted else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"acceptance": self.acceptance}


@dataclass
class Counters:
    """What only grows, and the last steps."""

    requests: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0
    generated_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    steps: int = 0
    refresh_s: float | None = None
    recent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_WINDOW))  # seconds, new tokens
    ends: deque[float] = field(default_factory=lambda: deque(maxlen=32))  # when requests left

    def step(self, seconds: float, tokens: int) -> None:
        """One more step, with so many new tokens."""
        self.steps += 1
        self.generated_tokens += tokens
        self.recent.append((seconds, tokens))

    def leave(self, reason: str | None, busy: bool) -> None:
        """A request has ended; `busy`: others go on. Idle time is no measure of how fast they leave."""
        if busy:
            self.ends.append(time.monotonic())
        else:
            self.ends.clear()
        self.finished += reason in ("stop", "length")
        self.cancelled += reason in ("cancelled", "deadline")
        self.failed += reason == "error"

    def totals(self) -> dict[str, Any]:
        """The counters by name, and the rates."""
        counted = {name: value for name, value in vars(self).items() if not isinstance(value, deque)}
        return counted | self._rates() | {"retry_after_s": self.retry_after()}

    def _rates(self) -> dict[str, float]:
        """Median and 95th percentile of the step time, and new tokens a second."""
        if not self.recent:
            return {"step_s": 0.0, "step_p95_s": 0.0, "tokens_per_s": 0.0}
        times = sorted(seconds for seconds, _ in self.recent)
        rate = sum(tokens for _, tokens in self.recent) / max(sum(times), 1e-9)
        middle, high = times[len(times) // 2], times[int(0.95 * (len(times) - 1))]
        return {"step_s": middle, "step_p95_s": high, "tokens_per_s": rate}

    def retry_after(self) -> float:
        """Seconds between two requests that leave, by the last ones; 1 while nothing is known."""
        if len(self.ends) < 2:
            return 1.0
        return max(0.1, (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1))


class Heartbeat:
    """When the last step ended, and since when one has been running. May be read from any thread."""

    def __init__(self) -> None:
        self.began: float | None = None
        self.ended = time.monotonic()

    def __enter__(self) -> None:
        self.began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.ended, self.began = time.monotonic(), None

    @property
    def running_s(self) -> float:
        """How long the present step has been running; 0 between steps."""
        began = self.began
        return 0.0 if began is None else time.monotonic() - began

    @property
    def age_s(self) -> float:
        """Seconds since the last sign of life: a step's beginning or end."""
        return time.monotonic() - (self.began or self.ended)


class Watchdog:
    """A thread that calls `on_stall(seconds)` once for every step that runs longer than `limit_s`.

    By default all threads' stacks go to stderr. A step cannot be ended from within its process; who watches it can
    end the process. A context manager.
    """

    def __init__(self, heartbeat: Heartbeat, limit_s: float, on_stall: Callable[[float], None] | None = None) -> None:
        self._heartbeat, self._limit_s = heartbeat, limit_s
        self._on_stall = on_stall or _dump
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="finback-watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        told: float | None = None
        while not self._stop.wait(self._limit_s / 4):
            began, running = self._heartbeat.began, self._heartbeat.running_s
            if began is not None and began != told and running > self._limit_s:
                told = began
                try:
                    self._on_stall(running)
                except Exception as error:  # the watch goes on
                    print(f"finback: the watchdog's own action failed ({error!r})", file=sys.stderr, flush=True)


def _dump(seconds: float) -> None:
    print(f"finback: a step has been running for {seconds:.0f} s", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(file=sys.stderr)
