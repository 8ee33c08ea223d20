"""Generation for many requests at once: they wait, join when there is room, and leave when they are finished."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import cast

from finback.engine.blocks import BLOCK
from finback.engine.core import Core
from finback.engine.grammar import Grammars
from finback.engine.options import Options
from finback.engine.params import Sampling, check, whole
from finback.engine.request import Completion, Delta, Request, Wishes
from finback.engine.speculate import Drafter
from finback.engine.stats import Heartbeat, Stats
from finback.errors import UserError
from finback.model import Model
from finback.text import Message, Tokenizer, prompt_ids

Prompt = str | Sequence[int] | Sequence[Message]
"""Text (continued as it stands, after BOS if there is one), token ids (used as they are), or the messages of a chat."""


class QueueFull(UserError):
    """Too much waits already. `retry_after_s`: when to try again, by the rate at which requests leave."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Engine:
    """Runs up to `max_batch` requests together on `model`; every `step` gives each of them a token or more.

    Without a tokenizer prompts are token ids and completions have no text. A request gives the same tokens alone and in
    any batch, up to the rounding of floating-point sums (exactly, with `Options(batch_invariant=True)`). Not
    thread-safe: one thread steps; `heartbeat` alone may be read by another.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None = None,
        max_batch: int = 16,
        options: Options | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        if max_batch < 1:
            raise UserError(f"max_batch is {max_batch}; it must be at least 1")
        if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model {model.config.vocab_size}: "
                "they do not belong together; load both from one folder"
            )
        self.model, self.tokenizer, self.max_batch = model, tokenizer, max_batch
        self.options = options or Options()
        self.context = model.config.max_position_embeddings
        self.eos_ids = frozenset({model.config.eos_token_id}) if tokenizer is None else tokenizer.eos_ids
        self.core = Core(model, max_batch, self.eos_ids, self.options, drafter)
        self._grammars: Grammars | None = None

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return self.core.busy

    @property
    def heartbeat(self) -> Heartbeat:
        """The steps' sign of life."""
        return self.core.heartbeat

    def submit(
        self, prompt: Prompt, sampling: Sampling | None = None, *, think: bool = True, n: int = 1, **wishes: object
    ) -> Request:
        """Queue a request; `step` advances it, `request.take()` gives its new text.

        think: whether a chat's reply opens with thinking. n: completions of one prompt, which is computed once; the
        others are `request.followers`. wishes: see `Wishes`. Raises UserError for a prompt or sampling this model
        cannot serve, QueueFull where more may not wait.
        """
        check("n", n, "a whole number, at least 1", whole(n, 1))
        self._check_queue(n, 0)
        request, *others = self._requests(0, prompt, sampling or Sampling(), think, n, **wishes)
        self._check_queue(n, n * len(request.ids))
        for each in (request, *others):
            self.core.add(each)
        return request

    def stream(
        self, prompt: Prompt, sampling: Sampling | None = None, *, think: bool = True, **wishes: object
    ) -> Iterator[Delta]:
        """The text of one completion, piece by piece; closing the iterator cancels the request. Raises as `submit`."""
        self._check_queue(1, 0)
        (request,) = self._requests(0, prompt, sampling or Sampling(), think, 1, **wishes)
        self._check_queue(1, len(request.ids))
        return self._stream(request)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        think: bool = True,
        n: int = 1,
        **wishes: object,
    ) -> Iterator[Completion]:
        """Completions of all prompts as they finish; `.index` tells which prompt. `sampling`: one for all, or one each.

        n: completions of each prompt, told apart by `.choice`. One that fails has the finish_reason "error" and says
        why; the others go on. Closing the iterator cancels the rest. Raises as `submit`, before anything runs.
        """
        if isinstance(prompts, str):
            raise UserError("prompts is one text; give a list of prompts")
        each = [sampling or Sampling()] * len(prompts) if not isinstance(sampling, Sequence) else list(sampling)
        if len(each) != len(prompts):
            raise UserError(
                f"sampling has {len(each)} entries for {len(prompts)} prompts; give one for all or one each"
            )
        pairs = enumerate(zip(prompts, each, strict=True))
        return self._generate(deque(self._requests(i, p, s, think, n, **wishes) for i, (p, s) in pairs))

    def step(self) -> list[Request]:
        """Let waiting requests join, and advance the running ones; returns those that got tokens or ended."""
        return self.core.step()

    def cancel(self, request: Request) -> None:
        """End a request now, whether it waits or runs; its blocks are free at once."""
        self.core.end(request, "cancelled")

    def refresh(self) -> None:
        """Call after the weights changed: nothing computed with the old ones is used again, and no request is lost."""
        self.core.refresh()

    def close(self) -> None:
        """Finish writing prefixes to disk. The engine is not used afterwards."""
        self.core.close()

    def stats(self) -> Stats:
        """What the engine is doing, and has done."""
        return self.core.stats()

    def _check_queue(self, requests: int, tokens: int) -> None:
        limits, queue = self.options, self.core.scheduler
        waiting, retry_s = len(queue.waiting), self.core.counters.retry_after()
        free = max(0, self.max_batch - len(queue.running))
        if limits.max_queue is not None and waiting + requests > limits.max_queue + free:
            if requests > limits.max_queue + self.max_batch:
                raise UserError(
                    f"n is {requests}; max_queue {limits.max_queue} and max_batch {self.max_batch} allow less"
                )
            text = f"{waiting} requests wait already, max_queue is {limits.max_queue}; try again later"
            raise QueueFull(text, retry_s)
        most = limits.max_queue_tokens
        if most is not None and queue.waiting and queue.waiting_tokens + tokens > most:
            text = f"{queue.waiting_tokens} prompt tokens wait already, this request has {tokens}"
            raise QueueFull(f"{text}, max_queue_tokens is {most}; try again later", retry_s)

    def _requests(
        self, index: int, prompt: Prompt, sampling: Sampling, think: bool, n: int, **wishes: object
    ) -> list[Request]:
        """A request, and those that follow it with the same prompt."""
        check("n", n, "a whole number, at least 1", whole(n, 1))
        ids = self._ids(prompt, think)
        if sampling.stop and self.tokenizer is None:
            raise UserError("stop is given as text and this engine has no tokenizer; use stop_ids")
        sampling.check_ids(self.model.config.vocab_size)
        limit = self._limit(ids, sampling)
        asked = Wishes.of(wishes)
        made = []
        for choice in range(asked.choice, asked.choice + n):
            grammar = None if sampling.grammar is None else self._grammar().start(sampling.grammar)
            own = replace(asked, choice=choice)
            made.append(Request(index, ids, sampling, limit, own, self.tokenizer, grammar))
        for follower in made[1:]:
            follower.leader = made[0]
        made[0].followers = made[1:]
        return made

    def _limit(self, ids: list[int], sampling: Sampling) -> int:
        """How many tokens may come; UserError, with the counts, where that is more than there is room for."""
        room = self.context - len(ids)
        limit = room if sampling.max_tokens is None else sampling.max_tokens
        if limit > room or room < 1:
            raise UserError(
                f"the prompt has {len(ids)} tokens and max_tokens is {limit if room > 0 else sampling.max_tokens}, "
                f"together more than the model's context of {self.context}; shorten the prompt or lower max_tokens"
            )
        held = (self.core.pool.count - 1) * BLOCK
        if len(ids) + (1 if sampling.max_tokens is None else limit) > held:
            raise UserError(
                f"the prompt has {len(ids)} tokens and max_tokens is {sampling.max_tokens}, together more than the "
                f"{held} tokens that the cache holds; lower max_tokens or raise cache_memory"
            )
        return min(limit, held - len(ids))

    def _grammar(self) -> Grammars:
        if self.tokenizer is None:
            raise UserError("a grammar needs the tokenizer; give Engine(model, tokenizer)")
        if self._grammars is None:
            self._grammars = Grammars(self.tokenizer, self.model.config.vocab_size, self.tokenizer.eos_ids)
        return self._grammars

    def _ids(self, prompt: Prompt, think: bool) -> list[int]:
        if len(prompt) == 0 and not isinstance(prompt, str):
            raise UserError("the prompt is empty; give text, token ids or messages")
        if not isinstance(prompt, str) and all(isinstance(item, int) for item in prompt):
            ids = list(cast(Sequence[int], prompt))
            vocabulary = self.model.config.vocab_size
            wrong = next((i for i in ids if not 0 <= i < vocabulary), None)
            if wrong is not None:
                raise UserError(f"the prompt has token id {wrong}; this model's ids are 0 to {vocabulary - 1}")
            return ids
        if self.tokenizer is None:
            raise UserError("this engine has no tokenizer; give the prompt as a list of token ids")
        if isinstance(prompt, str):
            return [*self.tokenizer.start_ids, *self.tokenizer.encode(prompt)]
        return prompt_ids(self.tokenizer, cast(Sequence[Message], prompt), think)

    def _stream(self, request: Request) -> Iterator[Delta]:
        self.core.add(request)
        try:
            while not request.done:
                self.step()
                delta = request.take()
                if delta.completion is not None and delta.completion.error is not None:
                    raise UserError(delta.completion.error)
                if any(delta):
                    yield delta
        finally:
            self.cancel(request)

    def _generate(self, groups: deque[list[Request]]) -> Iterator[Completion]:
        active: list[Request] = []
        try:
            while groups or active:
                # A second batch waits, so that a row that becomes free is taken in the next step.
                while groups and len(active) < 2 * self.max_batch:
                    for request in groups.popleft():
                        active.append(request)
                        self.core.add(request)
                self.step()
                finished = [request for request in active if request.done]
                active = [request for request in active if not request.done]
                for request in finished:
                    yield request.completion()
        finally:
            for request in active:
                self.cancel(request)
