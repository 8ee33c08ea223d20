"""What runs in the next step: who joins, how much of a long prompt, who must give back its blocks. No tensors here.

Every running request that decodes gets its next token in every step. What is left of the step's budget goes to
prompts, the shortest rest first, so that a long prompt never stalls the others; one that was passed over often goes
first, so that it is not stalled either. When no block is left, the request that came last gives back its own and is
computed again later: the keyed draws make its tokens the same.
"""

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass

from finback.engine.blocks import BLOCK, BlockPool
from finback.engine.request import Request

_PATIENCE = 4  # steps in which others' prompts may go before the oldest


@dataclass(frozen=True)
class Cost:
    """What computing a prompt's tokens costs, in tokens without attention: `near` more for each token it attends to.

    `expand` is the cost of expanding one cached token for all the new ones that attend to it, `far` what each then
    adds (attention.py chooses the cheaper form).
    """

    near: float
    expand: float = 0.0
    far: float | None = None

    def of(self, count: int, depth: int) -> float:
        """Of `count` new tokens after `depth` cached ones."""
        pairs = count * (depth + count / 2)
        if self.far is None:
            return count + pairs * self.near
        return count + min(pairs * self.near, pairs * self.far + (depth + count) * self.expand)

    def most(self, budget: float, depth: int, limit: int) -> int:
        """As many new tokens as the budget pays for: whole blocks, one at least, `limit` at most."""
        low, high = BLOCK, max(limit, BLOCK)
        if self.of(high, depth) <= budget:
            return limit
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.of(middle, depth) <= budget else (low, middle)
        # A chunk that ends where a block does leaves no block half full.
        return min(limit, max(BLOCK, (depth + low) // BLOCK * BLOCK - depth))


@dataclass(frozen=True)
class Work:
    """Tokens start .. start + count - 1 of a request, to be computed in this step."""

    request: Request
    start: int
    count: int


class Scheduler:
    """The requests that wait and run, and the blocks they hold.

    enter: finds what the cache has of a request's prompt (it sets blocks and `cached`). copy: makes one block equal to
    another. Running requests are in order of arrival.
    """

    def __init__(
        self,
        pool: BlockPool,
        max_batch: int,
        budget: int,
        cost: Cost,
        enter: Callable[[Request], None],
        copy: Callable[[int, int], None],
    ) -> None:
        self.pool, self.max_batch, self.budget, self.cost = pool, max_batch, budget, cost
        self._enter, self._copy = enter, copy
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.preemptions = 0
        self._arrivals = 0
        self._passed_over = 0

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens that wait to be computed."""
        return sum(len(request.ids) for request in self.waiting)

    def add(self, request: Request) -> None:
        """Put a new request at the end of the queue."""
        self._arrivals += 1
        request.arrival = self._arrivals
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Take a request out, wherever it is; its blocks are free at once."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self._release(request)

    def requeue(self, request: Request) -> None:
        """Send a running request back to wait, in its place by arrival; it will be computed again."""
        self.running.remove(request)
        self._release(request)
        request.forget()
        insort(self.waiting, request, key=lambda other: other.arrival)

    def fork(self, leader: Request, request: Request) -> bool:
        """Let a request that waits go on from its leader's computed prompt; False where there is no row for it."""
        if len(self.running) == self.max_batch:
            return False
        self.waiting.remove(request)
        insort(self.running, request, key=lambda other: other.arrival)
        for block in leader.blocks:
            self.pool.share(block)
        request.follow(leader)
        return True

    def plan(self) -> list[Work]:
        """The next step's work; blocks for all of it are reserved."""
        suspects = [request for request in self.running + self.waiting if request.suspect]
        if suspects:
            return self._alone(suspects[0])
        works = []
        for request in list(self.running):
            if request in self.running and request.decoding:
                if request.drafts and not self._reserve(request, 1 + len(request.drafts)):
                    request.drafts = []
                if request.drafts or self._reserve(request, 1, force=True):
                    works.append(Work(request, request.cached, 1 + len(request.drafts)))
        works += self._prompts(self.budget - sum(self.cost.of(work.count, work.start) for work in works))
        return [work for work in works if work.request in self.running]  # a later one may have taken its blocks

    def _alone(self, request: Request) -> list[Work]:
        request.drafts = []
        if request in self.waiting:
            while len(self.running) >= self.max_batch:
                self._preempt(self.running[-1])
            self._admit(request)
        count = self.cost.most(self.budget, request.cached, request.pending)
        while not self._reserve(request, count):  # earlier ones, too, give back their blocks: they do not move now
            self._preempt(next(other for other in reversed(self.running) if other is not request))
        return [Work(request, request.cached, count)]

    def _prompts(self, budget: float) -> list[Work]:
        """Chunks of prompts, the shortest rest first."""
        self._join()
        rest = [request for request in self.running if not request.decoding]
        if not rest:
            self._passed_over = 0
            return []
        oldest = rest[0]
        rest.sort(key=lambda request: (request.pending, request.arrival))
        if self._passed_over >= _PATIENCE:
            rest.remove(oldest)
            rest.insert(0, oldest)
        works: list[Work] = []
        for request in rest:
            # The first gets a block in any case: decoding alone may cost all of the budget.
            if request not in self.running or (works and budget < self.cost.of(BLOCK, request.cached)):
                continue
            count = self.cost.most(budget, request.cached, request.pending)
            # Who gets a first token in this step does not wait for a part of somebody else's prompt.
            if count < request.pending and any(work.count == work.request.pending for work in works):
                continue
            if self._reserve(request, count, force=request is self.running[0]):
                works.append(Work(request, request.cached, count))
                budget -= self.cost.of(count, request.cached)
        served = any(work.request is oldest for work in works)
        self._passed_over = 0 if served else self._passed_over + 1
        return works

    def _join(self) -> None:
        """Admit waiting requests in order of arrival, while there are rows, and blocks for all they have."""
        for request in list(self.waiting):
            if len(self.running) >= self.max_batch:
                return
            if request.leader is not None:
                continue
            promised = sum(max(0, _blocks(other) - len(other.blocks)) for other in self.running)
            if self.running and _blocks(request) > self.pool.available - promised:
                return
            self._admit(request)

    def _admit(self, request: Request) -> None:
        self.waiting.remove(request)
        insort(self.running, request, key=lambda other: other.arrival)
        self._enter(request)

    def _reserve(self, request: Request, count: int, force: bool = False) -> bool:
        """Give a request blocks of its own for its next `count` tokens; `force`: take those of later requests."""
        first, last = request.cached // BLOCK, (request.cached + count - 1) // BLOCK
        for index in range(first, last + 1):
            held = request.blocks[index] if index < len(request.blocks) else None
            if held is not None and self.pool.references(held) == 1 and not self.pool.published(held):
                continue
            block = self.pool.take()
            while block is None and force:
                victim = self.running[-1]
                self._preempt(victim)
                if victim is request:
                    return False
                block = self.pool.take()
            if block is None:
                return False
            if held is None:
                request.blocks.append(block)
            else:  # somebody else reads it
                self._copy(held, block)
                self.pool.release(held)
                request.blocks[index] = block
        return True

    def _preempt(self, request: Request) -> None:
        self.preemptions += 1
        self.requeue(request)

    def _release(self, request: Request) -> None:
        # The end of a prompt is found less often than its beginning: it goes first.
        for block in reversed(request.blocks):
            self.pool.release(block)
        request.blocks, request.keys = [], []


def _blocks(request: Request) -> int:
    """Blocks for all that a request has, and its next token."""
    return -(-(len(request.ids) + 1) // BLOCK)
