"""Guessing the next tokens, so that one pass can confirm several. Guesses change how fast tokens come, never which.

The engine draws every token with its own key from the model's distribution; a guess is accepted exactly when it is that
token. Source: V3 TR 2.2 (MTP for speculative decoding); the n-gram form is known as prompt lookup.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from finback.engine.batch import flat
from finback.engine.blocks import BLOCK
from finback.engine.cache import PagedCache
from finback.engine.request import Request
from finback.engine.sampling import Row, choose_rows
from finback.engine.scheduler import Work
from finback.errors import UserError
from finback.model import Model

Speculation = Literal["auto", "mtp", "ngram", "off"]
_NEUTRAL: dict[str, Any] = {
    **{"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
    **{"logit_bias": {}, "grammar": None, "logprobs": 0},
}


@dataclass(frozen=True)
class Advance:
    """What a pass gave a request: final hidden states [count, D] of its tokens start .. start + count - 1.

    The token after each of them is known.
    """

    request: Request
    start: int
    hidden_ND: Tensor


class Drafter(Protocol):
    """Proposes tokens: sets `request.drafts` of those that go on. layers: what it caches beside the model's."""

    layers: int

    def draft(self, advances: Sequence[Advance]) -> None: ...


class NgramDrafter:
    """What followed the last time the same `size` tokens came: for text that repeats its prompt or itself."""

    layers = 0

    def __init__(self, tokens: int = 4, size: int = 3) -> None:
        self.tokens, self.size = tokens, size

    def draft(self, advances: Sequence[Advance]) -> None:
        for advance in advances:
            request = advance.request
            if wants(request):
                found = self._find(request)
                request.drafts = request.ids[found : found + min(self.tokens, room(request))] if found else []

    def _find(self, request: Request) -> int | None:
        """Where the text goes on after an earlier occurrence of its last tokens."""
        ids, seen = request.ids, request.ngrams
        for end in range(max(self.size, request.indexed), len(ids)):  # the last tokens themselves come later
            seen[tuple(ids[end - self.size : end])] = end
        request.indexed = len(ids)
        return seen.get(tuple(ids[-self.size :]))


class MTPDrafter:
    """The model's own multi-token prediction module; for more than one token it is applied to its own output.

    Its attention has a cache of its own, layer `num_hidden_layers`. The entry of a token joins it with the one after
    it, so a block that is found again holds, at its end, a join with what came after it then: good enough for a guess.
    """

    layers = 1

    def __init__(self, model: Model, cache: PagedCache, tokens: int = 1) -> None:
        self.model, self.cache, self.tokens = model, cache, tokens
        (self.module, *_) = model.mtp.values()

    def draft(self, advances: Sequence[Advance]) -> None:
        advances = [advance for advance in advances if advance.request.speculating and not advance.request.done]
        if not advances:
            return
        for advance in advances:
            advance.request.drafts = []
        works = [Work(a.request, a.start, len(a.hidden_ND)) for a in advances]
        hidden = {id(a.request): a.hidden_ND for a in advances}
        for number in range(self.tokens):
            batch = flat(self.cache, works)
            next_ids = [token for w in batch.works for token in w.request.sequence(w.start + 1, w.count)]
            hidden_ND = torch.cat([hidden[id(work.request)] for work in batch.works])
            embeds_1ND = self.model.decoder.embed_tokens(torch.tensor([next_ids], device=hidden_ND.device))
            out_1ND = self.module(hidden_ND[None], embeds_1ND, positions=batch.positions_1N, cache=batch.view)
            ends = [(work, span.stop - 1) for work, span in zip(batch.works, batch.spans, strict=True)]
            going = [(w, end) for w, end in ends if wants(w.request) and number < room(w.request)]
            if not going:
                return
            last_ND = out_1ND[0, [end for _, end in going]]
            rows = [_row(work.request, number) for work, _ in going]
            works = []
            for (work, _), guess, row_D in zip(going, choose_rows(self._logits(last_ND), rows), last_ND, strict=True):
                if isinstance(guess, UserError):
                    continue
                work.request.drafts.append(guess.token)
                after = Work(work.request, work.start + work.count, 1)
                if after.start < len(work.request.blocks) * BLOCK:  # a guess takes no new block
                    works.append(after)
                    hidden[id(work.request)] = row_D[None]
            if not works:
                return

    def _logits(self, hidden_ND: Tensor) -> Tensor:
        return self.model.decoder.logits(hidden_ND)


def _row(request: Request, number: int) -> Row:
    """A guess is drawn with the key of the token it guesses: two like distributions then mostly give the same one."""
    plain = replace(request.sampling, **_NEUTRAL)
    return Row(plain, request.seed, request.wishes.choice, len(request.ids) + number)


def wants(request: Request) -> bool:
    """Whether a request decodes, and speculation pays for it."""
    return request.speculating and not request.done and request.pending == 1


def room(request: Request) -> int:
    """Tokens it can still get after the next one."""
    return request.limit - len(request.choices) - 1


def drafter_layers(model: Model, how: Speculation) -> int:
    """Layers of the cache that speculation needs beside the model's."""
    return MTPDrafter.layers if _resolved(model, how) == "mtp" else 0


def make_drafter(model: Model, cache: PagedCache, how: Speculation, tokens: int | None) -> Drafter | None:
    """The drafter of this name, None for "off". Raises UserError for "mtp" where the model has no such module."""
    how = _resolved(model, how)
    if how == "mtp":
        return MTPDrafter(model, cache, tokens or 1)
    return NgramDrafter(tokens or 4) if how == "ngram" else None


def _resolved(model: Model, how: Speculation) -> Speculation:
    has = len(getattr(model, "mtp", ())) > 0
    if how == "mtp" and not has:
        raise UserError("speculate is 'mtp', and this model has no multi-token prediction module; use 'ngram' or 'off'")
    return ("mtp" if has else "ngram") if how == "auto" else how


@dataclass
class Pace:
    """Whether drafts pay: measured seconds of decoding passes with and without, by the number of requests in them.

    A request's drafts cost its share of the longer pass and win its share of a plain one for each accepted token.
    Every `probe`-th pass goes without, so that both are known.
    """

    probe: int = 32
    patience: int = 16
    plain: dict[int, float] = field(default_factory=dict)
    drafted: dict[int, float] = field(default_factory=dict)
    passes: int = 0

    def plain_turn(self) -> bool:
        """Whether this pass is to go without drafts, to be measured."""
        self.passes += 1
        return self.passes % self.probe == 2

    def note(self, rows: int, drafted: bool, seconds: float) -> None:
        """Remember how long a pass over `rows` decoding requests took, drafting included."""
        known = self.drafted if drafted else self.plain
        known[rows] = seconds if rows not in known else 0.8 * known[rows] + 0.2 * seconds

    def pays(self, request: Request, rows: int) -> bool:
        """False once a request has shown that its drafts cost more than they win."""
        plain, drafted = self.plain.get(rows), self.drafted.get(rows)
        if request.draft_passes < self.patience or plain is None or drafted is None:
            return True
        return request.accepted / request.draft_passes * plain >= drafted - plain
