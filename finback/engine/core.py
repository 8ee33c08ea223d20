"""The loop itself: plan, one pass of the model, tokens, and who leaves. engine.py is its door."""

import time
import warnings
from collections.abc import Sequence, Set

import torch
from torch import Tensor

from finback.engine.blocks import BLOCK, BlockPool
from finback.engine.cache import PagedCache
from finback.engine.disk_cache import DiskCache
from finback.engine.fingerprint import fingerprint
from finback.engine.options import Options, blocks_for, cost_of, step_budget
from finback.engine.prefix import PrefixCache
from finback.engine.request import FinishReason, Request
from finback.engine.scheduler import Scheduler, Work
from finback.engine.speculate import Advance, Drafter, Pace, drafter_layers, make_drafter
from finback.engine.stats import Counters, Heartbeat, Stats
from finback.engine.step import Line, Runner
from finback.model import Model


class Core:
    """Requests, the cache they share, and the steps that advance them. A drafter may be given for measurements."""

    def __init__(
        self, model: Model, max_batch: int, eos_ids: Set[int | None], options: Options, drafter: Drafter | None = None
    ) -> None:
        self.model, self.options = model, options
        config, weight = model.config, model.decoder.embed_tokens.weight
        layers = config.num_hidden_layers + drafter_layers(model, options.speculate)

        def cache(blocks: int) -> PagedCache:
            return PagedCache(config, layers, blocks, weight.dtype, weight.device, options.cache_format)

        blocks = blocks_for(options, cache(0), max_batch, config.max_position_embeddings)
        self.cache, self.pool = cache(blocks), BlockPool(blocks)
        self.prefix = PrefixCache(self.pool, self.cache, self._disk(), options.prefix_cache)
        enter, copy = self._enter, self.cache.copy
        self.scheduler = Scheduler(self.pool, max_batch, step_budget(options, max_batch), cost_of(config), enter, copy)
        self.runner = Runner(model, self.cache, eos_ids, options.batch_invariant)
        self.drafter = drafter or make_drafter(model, self.cache, options.speculate, options.draft_tokens)
        self.heartbeat, self.counters, self.pace = Heartbeat(), Counters(), Pace()

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running)

    def add(self, request: Request) -> None:
        """Put a request into the queue; its deadline runs from now."""
        if request.wishes.deadline_s is not None:
            request.deadline = time.monotonic() + request.wishes.deadline_s
        self.counters.requests += 1
        self.scheduler.add(request)

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """As `Engine.step`."""
        with self.heartbeat:
            began = time.perf_counter()
            ended = self._expire()
            for request in [request for request in self.scheduler.running if request.done]:
                self._leave(request)  # an interrupted step may leave them behind
            works = self.scheduler.plan()
            if self.drafter is not None and self.options.adaptive and self.pace.plain_turn():
                works = [_without_drafts(work) for work in works]
            before = sum(len(work.request.choices) for work in works)
            moved = self._advance(works) if works else []
            new = sum(len(request.choices) for request in {*moved, *(work.request for work in works)}) - before
            self.counters.step(time.perf_counter() - began, new)
        return ended + moved

    @torch.inference_mode()
    def end(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        """End a request now, whether it waits or runs; its blocks are free at once."""
        if not request.done:
            request.finish(reason, error)
        if request in self.scheduler.running or request in self.scheduler.waiting:
            self._leave(request)

    def refresh(self) -> None:
        """As `Engine.refresh`."""
        began = time.perf_counter()
        for request in list(self.scheduler.running):
            self.scheduler.requeue(request)
        self.pool.forget()
        self.close()
        self.prefix.disk = self._disk()
        self.counters.refresh_s = time.perf_counter() - began

    def close(self) -> None:
        """Finish what is being written to disk."""
        if self.prefix.disk is not None:
            self.prefix.disk.close()

    def stats(self) -> Stats:
        """As `Engine.stats`."""
        queue, experts = self.scheduler, getattr(self.model, "expert_cache", None)
        return Stats(
            waiting=len(queue.waiting),
            running=len(queue.running),
            waiting_tokens=queue.waiting_tokens,
            blocks=self.pool.count,
            blocks_used=self.pool.used,
            blocks_kept=self.pool.kept,
            bytes_per_token=self.cache.bytes_per_token,
            preemptions=queue.preemptions,
            heartbeat_s=self.heartbeat.age_s,
            expert_hit_rate=None if experts is None else experts.hit_rate,
            **self.counters.totals(),
        )

    def _advance(self, works: list[Work]) -> list[Request]:
        """One pass over the work; the requests that got a token or ended."""
        began = time.perf_counter()
        try:
            hidden = self.runner.hidden(works)
            sound = self._sound(works, hidden)
            lines, rows = self._due(sound, hidden)
            logits_NV = self.runner.logits(torch.cat(rows)) if rows else None
        except Exception as error:
            return self._isolate(works, error)
        lines += self._forked(lines)
        if logits_NV is not None:
            self.runner.choose(lines, logits_NV)
        self._keep(sound, lines)
        passed = time.perf_counter()
        self._draft(sound, hidden)
        self._measure(works, passed - began, time.perf_counter() - passed)
        moved = [line.request for line in lines]
        moved += [work.request for work in works if work.request.done and work.request not in moved]
        for request in moved:
            if request.done:
                self._leave(request)
        return moved

    def _sound(self, works: Sequence[Work], hidden: dict[Request, Tensor]) -> list[Work]:
        """The work whose numbers are finite; the others' requests end, or go on without the guess that did it."""
        if torch.stack([hidden_ND.isfinite().all() for hidden_ND in hidden.values()]).all():
            return list(works)
        sound = []
        for work in works:
            if hidden[work.request].isfinite().all():
                sound.append(work)
            elif work.request.drafts:
                self._scrub(work.request)
                work.request.speculating = False
                self.scheduler.requeue(work.request)
            else:
                self._scrub(work.request)
                work.request.finish("error", "the model's numbers are not finite: its weights are damaged or overflow")
        return sound

    def _due(self, works: Sequence[Work], hidden: dict[Request, Tensor]) -> tuple[list[Line], list[Tensor]]:
        """The requests whose last token was in this pass, and the rows of hidden states that their next ones need."""
        lines: list[Line] = []
        rows: list[Tensor] = []
        first = 0
        for work in works:
            request, hidden_ND = work.request, hidden[work.request]
            self.runner.observe_prompt(work, hidden_ND)
            due = work.start + work.count - len(request.ids) + 1
            if due > 0:
                rows.append(hidden_ND[work.count - due :])
                lines.append(Line(request, first, due, len(request.ids)))
                first += due
        return lines, rows

    def _forked(self, lines: Sequence[Line]) -> list[Line]:
        """Those that waited for a prompt of these lines: they share its blocks, or find them later."""
        forked = []
        for line in lines:
            leader = line.request
            for request in leader.followers:
                request.leader = None
                if not request.done and self.scheduler.fork(leader, request):
                    self.counters.prompt_tokens += request.prompt_tokens
                    self.counters.hit_tokens += request.prompt_tokens
                    forked.append(Line(request, line.first, 1, len(request.ids)))
            leader.followers = []
        return forked

    def _keep(self, works: Sequence[Work], lines: Sequence[Line]) -> None:
        """What of the pass stays: of the guesses those that came."""
        for line in lines:
            request, came = line.request, len(line.request.ids) - line.before
            if line.count > 1:
                request.draft_passes += 1
                request.drafted += line.count - 1
                request.accepted += max(0, came - 1)
                self.counters.drafted += line.count - 1
                self.counters.accepted += max(0, came - 1)
            request.drafts = []
            request.cached = len(request.ids) - 1
        for work in works:
            work.request.cached = min(work.start + work.count, len(work.request.ids) - 1)
            self.prefix.publish(work.request)

    def _draft(self, works: Sequence[Work], hidden: dict[Request, Tensor]) -> None:
        if self.drafter is None:
            return
        kept = [(work, work.request.cached - work.start) for work in works if not work.request.done]
        try:
            self.drafter.draft([Advance(w.request, w.start, hidden[w.request][:n]) for w, n in kept if n > 0])
        except Exception as error:  # guesses are not worth a request
            self.drafter = None
            for request in self.scheduler.running:
                request.drafts = []
            warnings.warn(f"speculation failed and is off from now on ({type(error).__name__}: {error})", stacklevel=2)

    def _measure(self, works: Sequence[Work], pass_s: float, draft_s: float) -> None:
        """Learn from a pass that only decoded, and end guessing where it does not pay."""
        if self.drafter is None or not self.options.adaptive or any(not self._decoded(work) for work in works):
            return
        guessed = [work.request for work in works if work.count > 1]
        self.pace.note(len(works), bool(guessed), pass_s + (draft_s if guessed else 0.0))
        for request in guessed:
            request.speculating = self.pace.pays(request, len(works))

    def _decoded(self, work: Work) -> bool:
        return work.start >= work.request.prompt_tokens

    def _enter(self, request: Request) -> None:
        first = request.hits is None
        self.prefix.enter(request)
        if first:
            self.counters.prompt_tokens += request.prompt_tokens
            self.counters.hit_tokens += request.hits or 0

    def _expire(self) -> list[Request]:
        """End the requests whose time is over."""
        now = time.monotonic()
        late = [
            r for r in self.scheduler.waiting + self.scheduler.running if r.deadline is not None and r.deadline < now
        ]
        for request in late:
            self.end(request, "deadline")
        return late

    def _scrub(self, request: Request) -> None:
        """What is not finite in a request's own blocks must not reach whoever gets them next."""
        for block in request.blocks:
            self.pool.withdraw(block)
        self.cache.clear([block for block in request.blocks if self.pool.references(block) == 1])
        request.keys = []

    def _leave(self, request: Request) -> None:
        try:
            self.prefix.keep(request)
        finally:
            self.scheduler.remove(request)
            for follower in request.followers:
                follower.leader = None
            request.followers = []
            self.counters.leave(request.finish_reason, self.busy)

    def _isolate(self, works: Sequence[Work], error: Exception) -> list[Request]:
        """After a pass that failed: the one request in it ends, or each is computed again, alone up to that point."""
        for work in works:
            self._scrub(work.request)
        if len(works) == 1:
            self.end(works[0].request, "error", f"{type(error).__name__}: {error}".splitlines()[0])
            return [works[0].request]
        for work in works:
            work.request.alone_until = work.start + work.count
            if work.request in self.scheduler.running:
                self.scheduler.requeue(work.request)
        return []

    def _disk(self) -> DiskCache | None:
        folder, options = self.options.prefix_folder, self.options
        if folder is None:
            return None
        name = fingerprint(self.model, f"{options.cache_format} {options.batch_invariant} {self.cache.layers} {BLOCK}")
        return DiskCache(folder, name, self.cache.block_bytes, options.prefix_limit)


def _without_drafts(work: Work) -> Work:
    if not work.request.drafts:
        return work
    work.request.drafts = []
    return Work(work.request, work.start, 1)
