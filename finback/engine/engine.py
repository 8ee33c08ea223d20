"""Generation for many requests at once: they wait, join when a row is free, and leave when they are finished."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch

from finback.engine.cache import LatentCache
from finback.engine.request import Completion, Delta, Request
from finback.engine.sampling import Sampling, choose
from finback.errors import UserError
from finback.model import Model, Routing
from finback.text import Message, Tokenizer, prompt_ids

Prompt = str | Sequence[int] | Sequence[Message]
"""Text (continued as it stands, after BOS if there is one), token ids (used as they are), or the messages of a chat."""

# Padded tokens in one prefill pass: bounds its memory, is wide enough to keep the matrix products busy.
_PREFILL_TOKENS = 8192


class Engine:
    """Runs up to `max_batch` requests together on `model`, one new token each per `step`.

    Without a tokenizer prompts are token ids and completions have no text. A request gives the same tokens alone and in
    any batch, up to the rounding of floating-point sums. Not thread-safe: one thread steps.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer | None = None, max_batch: int = 16) -> None:
        if max_batch < 1:
            raise UserError(f"max_batch is {max_batch}; it must be at least 1")
        if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model {model.config.vocab_size}: "
                "they do not belong together; load both from one folder"
            )
        weight = model.decoder.embed_tokens.weight
        self.model, self.tokenizer, self.max_batch = model, tokenizer, max_batch
        self.context = model.config.max_position_embeddings
        self.eos_ids = frozenset({model.config.eos_token_id}) if tokenizer is None else tokenizer.eos_ids
        self.cache = LatentCache(model.config, max_batch, weight.dtype, weight.device)
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []  # a request's index here is its row in the cache

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._waiting or self._running)

    def submit(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        *,
        think: bool = True,
        choice: int = 0,
        routing: bool = False,
    ) -> Request:
        """Queue a request; `step` advances it, `request.take()` gives its new text.

        think: whether a chat's reply opens with thinking. choice: tells several completions of one seed apart.
        routing: record the experts chosen. Raises UserError for a prompt or sampling this model cannot serve.
        """
        request = self._request(0, prompt, sampling or Sampling(), think, choice, routing)
        self._waiting.append(request)
        return request

    def stream(self, prompt: Prompt, sampling: Sampling | None = None, *, think: bool = True) -> Iterator[Delta]:
        """The text of one completion, piece by piece; closing the iterator cancels the request. Raises as `submit`."""
        return self._stream(self._request(0, prompt, sampling or Sampling(), think, 0, False))

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        think: bool = True,
        routing: bool = False,
    ) -> Iterator[Completion]:
        """Completions of all prompts as they finish; `.index` tells which prompt. `sampling`: one for all, or one each.

        Closing the iterator cancels the rest. Raises as `submit`, before anything runs.
        """
        if isinstance(prompts, str):
            raise UserError("prompts is one text; give a list of prompts")
        each = [sampling or Sampling()] * len(prompts) if not isinstance(sampling, Sequence) else list(sampling)
        if len(each) != len(prompts):
            raise UserError(
                f"sampling has {len(each)} entries for {len(prompts)} prompts; give one for all or one each"
            )
        pairs = enumerate(zip(prompts, each, strict=True))
        return self._generate(deque(self._request(i, p, s, think, 0, routing) for i, (p, s) in pairs))

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Let waiting requests join, then give every running one its next token; returns those that moved."""
        with _evaluating(self.model):
            older = len(self._running)
            self._running += self._joining()
            moved = list(self._running)
            if older < len(moved):
                self._advance(older, len(moved))
            if older:
                self._advance(0, older)
        for row in reversed(range(len(moved))):
            if moved[row].done:
                self._leave(row)
        return moved

    @torch.inference_mode()
    def cancel(self, request: Request) -> None:
        """End a request now, whether it waits or runs; its row is free at once."""
        if request.done:
            return
        if request in self._running:
            self._leave(self._running.index(request))
        elif request in self._waiting:
            self._waiting.remove(request)
        request.finish("cancelled")

    def refresh(self) -> None:
        """Call after the weights changed: nothing computed with the old ones is used again, and no request is lost."""
        for request in reversed(self._running):
            request.forget()
            self._waiting.appendleft(request)
        self._running.clear()

    def _request(
        self, index: int, prompt: Prompt, sampling: Sampling, think: bool, choice: int, routing: bool
    ) -> Request:
        ids = self._ids(prompt, think)
        if sampling.stop and self.tokenizer is None:
            raise UserError("stop is given as text and this engine has no tokenizer; use stop_ids")
        room = self.context - len(ids)
        limit = room if sampling.max_tokens is None else sampling.max_tokens
        if limit > room or room < 1:
            raise UserError(
                f"the prompt has {len(ids)} tokens and max_tokens is {limit if room > 0 else sampling.max_tokens}, "
                f"together more than the model's context of {self.context}; shorten the prompt or lower max_tokens"
            )
        return Request(index, ids, sampling, limit, choice, routing, self.tokenizer)

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
        self._waiting.append(request)
        try:
            while not request.done:
                self.step()
                delta = request.take()
                if any(delta):
                    yield delta
        finally:
            self.cancel(request)

    def _generate(self, queue: deque[Request]) -> Iterator[Completion]:
        active: list[Request] = []
        try:
            while queue or active:
                # A second batch waits, so that a row that becomes free is taken in the next step.
                while queue and len(active) < 2 * self.max_batch:
                    active.append(queue.popleft())
                    self._waiting.append(active[-1])
                self.step()
                finished = [request for request in active if request.done]
                active = [request for request in active if not request.done]
                for request in finished:
                    yield request.completion()
        finally:
            for request in active:
                self.cancel(request)

    def _joining(self) -> list[Request]:
        """The requests that start in this step: in order of arrival, as many as there are rows and room in one pass."""
        joining: list[Request] = []
        widest = 0
        while self._waiting and len(self._running) + len(joining) < self.max_batch:
            widest = max(widest, len(self._waiting[0].ids))
            if joining and widest * (len(joining) + 1) > _PREFILL_TOKENS:
                break
            joining.append(self._waiting.popleft())
        return joining

    def _advance(self, first: int, last: int) -> None:
        """One pass over what rows first .. last - 1 have not computed yet, padded on the right; a token for each."""
        requests = self._running[first:last]
        pending = [request.ids[request.cached :] for request in requests]
        width = max(map(len, pending))
        device = self.cache.storage.device
        ids_BT = torch.tensor([new + [0] * (width - len(new)) for new in pending], device=device)
        starts_B = torch.tensor([request.cached for request in requests], device=device)
        positions_BT = starts_B[:, None] + torch.arange(width, device=device)
        slots = max(request.cached for request in requests) + width
        routing: Routing | None = {} if any(request.routing is not None for request in requests) else None
        window = self.cache.window(first, positions_BT, slots)
        hidden_BTD = self.model.decoder(ids_BT, positions=positions_BT, cache=window, routing=routing)
        ends_B = torch.tensor([len(new) - 1 for new in pending], device=device)
        last_BD = hidden_BTD[torch.arange(len(requests), device=device), ends_B]
        logits_BV = self.model.decoder.logits(last_BD).cpu().numpy()
        for row, request in enumerate(requests):
            request.record(routing or {}, row, width, len(pending[row]))
            request.cached = len(request.ids)
            chosen = choose(logits_BV[row], request.sampling, request.seed, request.choice, len(request.ids))
            request.accept(chosen, self.eos_ids)

    def _leave(self, row: int) -> None:
        """Free a row; the last row moves into it, so that running rows stay neighbours."""
        last = self._running.pop()
        if row < len(self._running):
            self.cache.move(len(self._running), row, last.cached)
            self._running[row] = last


@contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    """The model in eval mode for a while: in training mode routers would count these tokens."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()
