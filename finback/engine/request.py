"""One request on its way through the engine, and the completion it becomes."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from finback.engine.grammar import GrammarState
from finback.engine.params import Sampling, check, number, whole
from finback.engine.sampling import Choice, History, Row, draw_seed
from finback.engine.transcript import Transcript
from finback.errors import UserError
from finback.model import Routing
from finback.text import Tokenizer

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]


@dataclass(frozen=True)
class Completion:
    """What a request became.

    index: which prompt of `generate` it answers; choice: which of its `n` completions. text, reasoning: answer and
    thinking; empty without a tokenizer.
    token_ids: every new token, with the EOS or stop id that ended it. logprobs: of each of them, in the distribution it
    was drawn from (that of the model where greedy). top_logprobs: per token the likeliest (id, log-probability), if
    asked for.
    finish_reason: "stop" (EOS, stop id, stop string), "length" (max_tokens or the context), "cancelled", "deadline" or
    "error" (`error` says which).
    prompt_tokens: length of the prompt in tokens, BOS included; cached_tokens: how many of them were found in the
    prefix cache. reasoning_tokens: those of token_ids that are thinking.
    drafted, accepted: tokens that speculation proposed, and those of them that came.
    routing: by MoE layer the experts [T, K] of all tokens that were computed (all but the last), if asked for.
    prompt_logprobs: of every prompt token but the first, given those before it. embedding: the hidden state [D] after
    the prompt's last token. Both if asked for.
    """

    index: int
    text: str
    reasoning: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    prompt_tokens: int
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    routing: Routing | None = None
    choice: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    error: str | None = None
    prompt_logprobs: list[float] | None = None
    embedding: Tensor | None = None


class Delta(NamedTuple):
    """New text of a streamed request; the last one carries the completion."""

    reasoning: str
    text: str
    completion: Completion | None = None


@dataclass(frozen=True)
class Wishes:
    """What a request may ask for beside its tokens: choice tells several completions of one seed apart, tenant whose
    prefixes it may share, deadline_s after how long it ends; the rest: see `Completion`."""

    choice: int = 0
    tenant: str = ""
    deadline_s: float | None = None
    routing: bool = False
    prompt_logprobs: bool = False
    embedding: bool = False

    def __post_init__(self) -> None:
        check("choice", self.choice, "a whole number, at least 0", whole(self.choice, 0))
        check("tenant", self.tenant, "text", isinstance(self.tenant, str))
        fits = self.deadline_s is None or (number(self.deadline_s) and self.deadline_s >= 0)
        check("deadline_s", self.deadline_s, "seconds, at least 0, or None", fits)
        for name in ("routing", "prompt_logprobs", "embedding"):
            check(name, getattr(self, name), "True or False", isinstance(getattr(self, name), bool))

    @classmethod
    def of(cls, wishes: Mapping[str, Any]) -> "Wishes":
        """From keyword arguments. Raises UserError for one that there is not."""
        if unknown := wishes.keys() - {field.name for field in fields(cls)}:
            known = ", ".join(field.name for field in fields(cls))
            raise UserError(f"{sorted(unknown)[0]} is nothing that a request can ask for; there are {known}")
        return cls(**wishes)

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether the prompt must be computed even where its beginning is in the cache."""
        return self.routing or self.prompt_logprobs or self.embedding


class Request:
    """A prompt, what was generated from it, and how much of both lies in the cache.

    ids: prompt and output; the first `cached` of them have their entries in `blocks`. drafts: tokens that may come
    next. arrival: its place in the order of service.
    """

    def __init__(
        self,
        index: int,
        prompt: list[int],
        sampling: Sampling,
        limit: int,
        wishes: Wishes,
        tokenizer: Tokenizer | None,
        grammar: GrammarState | None = None,
    ) -> None:
        self.index, self.sampling, self.wishes, self.limit = index, sampling, wishes, limit
        self.seed = draw_seed() if sampling.seed is None else sampling.seed
        self.ids, self.prompt_tokens = list(prompt), len(prompt)
        self.arrival = 0
        self.deadline: float | None = None
        self.cached = 0
        self.hits: int | None = None
        self.blocks: list[int] = []
        self.keys: list[bytes] = []  # of the blocks that are published
        self.drafts: list[int] = []
        self.drafted = self.accepted = self.draft_passes = 0
        self.ngrams: dict[tuple[int, ...], int] = {}  # the end of each; speculate.py keeps it
        self.indexed = 0
        self.speculating = True
        self.leader: Request | None = None  # whose prompt is the same and is computed first
        self.followers: list[Request] = []  # that wait for it
        self.alone_until = 0  # a pass with it failed: it runs alone until so many tokens are computed
        self.choices: list[Choice] = []
        self.routing: list[tuple[int, Routing]] | None = [] if wishes.routing else None  # of each pass, with its start
        self.prompt_logprobs: list[float] | None = [] if wishes.prompt_logprobs else None
        self.embedding: Tensor | None = None
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None
        assert isinstance(sampling.stop, tuple)
        self._transcript = None if tokenizer is None else Transcript(tokenizer, prompt, sampling.stop)
        self._end_think = None if tokenizer is None else tokenizer.end_think_id
        self._grammar = grammar
        self._history = History(prompt) if sampling.penalised else None
        self._taken = (0, 0)

    @property
    def done(self) -> bool:
        return self.finish_reason is not None

    @property
    def suspect(self) -> bool:
        """Whether it must run alone: a pass with it has failed."""
        return self.cached < self.alone_until

    @property
    def decoding(self) -> bool:
        """Whether its prompt is computed and only its last token is not."""
        return self.pending == 1 and self.cached >= self.prompt_tokens

    @property
    def pending(self) -> int:
        """Tokens that have no entries yet, drafts left out; at least 1."""
        return len(self.ids) - self.cached

    def sequence(self, start: int, count: int) -> list[int]:
        """Tokens start .. start + count - 1, drafts included."""
        known = len(self.ids)
        return self.ids[start : start + count] + self.drafts[max(0, start - known) : max(0, start + count - known)]

    def row(self, vocab_size: int) -> Row:
        """How its next token is chosen."""
        mask = None
        if self._thinks():
            budget = self.sampling.thinking_tokens
            if budget is not None and self._end_think is not None and self._thought() >= budget:
                mask = np.zeros(vocab_size, dtype=bool)
                mask[self._end_think] = True
        elif self._grammar is not None:
            mask = self._grammar.mask()
        return Row(self.sampling, self.seed, self.wishes.choice, len(self.ids), self._history, mask)

    def accept(self, choice: Choice, eos_ids: Set[int | None]) -> None:
        """Append a chosen token and finish if it is the last."""
        answering = not self._thinks()
        self.ids.append(choice.token)
        self.choices.append(choice)
        if self._history is not None:
            self._history.add(choice.token)
        stopped = self._transcript is not None and self._transcript.push(choice.token)
        if (choice.token in eos_ids and not self.sampling.ignore_eos) or choice.token in self.sampling.stop_ids:
            self.finish("stop")
        elif stopped:
            self.finish_reason = "stop"
        elif len(self.choices) == self.limit:
            self.finish("length")
        elif self._grammar is not None and answering:
            self._grammar.accept(choice.token)

    def finish(self, reason: FinishReason, error: str | None = None) -> None:
        """End the request here, with the text it has."""
        self.finish_reason, self.error = reason, error
        self.ngrams.clear()
        if self._transcript is not None:
            self._transcript.close()

    def record(self, routing_NK: Routing, rows: slice, start: int) -> None:
        """Keep the experts of its own tokens from `start` on, `rows` of a pass."""
        if self.routing is not None:
            self.routing.append((start, {layer: experts_NK[rows] for layer, experts_NK in routing_NK.items()}))

    def follow(self, leader: "Request") -> None:
        """Go on from the leader's computed prompt; what was learned from it is this one's too."""
        self.blocks, self.keys = list(leader.blocks), list(leader.keys)
        self.cached, self.hits = len(leader.ids) - 1, len(leader.ids)
        if self.routing is not None:
            self.routing = list(leader.routing or ())
        if self.prompt_logprobs is not None:
            self.prompt_logprobs = list(leader.prompt_logprobs or ())
        self.embedding = leader.embedding

    def forget(self) -> None:
        """Nothing computed is left: the next pass starts at the first token."""
        self.cached = 0
        self.blocks, self.keys, self.drafts = [], [], []
        if self.routing is not None:
            self.routing.clear()

    def take(self) -> Delta:
        """The text that is new since the last call, and the completion once there is one."""
        reasoning = text = ""
        if self._transcript is not None:
            thought, said = self._taken
            reasoning, text = "".join(self._transcript.reasoning[thought:]), "".join(self._transcript.text[said:])
            self._taken = (len(self._transcript.reasoning), len(self._transcript.text))
        return Delta(reasoning, text, self.completion() if self.done else None)

    def completion(self) -> Completion:
        """The finished request as its caller sees it."""
        assert self.finish_reason is not None, "a completion of a request that still runs"
        asked = self.sampling.logprobs > 0
        return Completion(
            index=self.index,
            text="" if self._transcript is None else "".join(self._transcript.text),
            reasoning="" if self._transcript is None else "".join(self._transcript.reasoning),
            token_ids=self.ids[self.prompt_tokens :],
            logprobs=[choice.logprob for choice in self.choices],
            finish_reason=self.finish_reason,
            prompt_tokens=self.prompt_tokens,
            top_logprobs=[choice.top for choice in self.choices] if asked else [],
            routing=None if self.routing is None else _joined(self.routing, self.cached),
            choice=self.wishes.choice,
            cached_tokens=self.hits or 0,
            reasoning_tokens=self._thought(),
            drafted=self.drafted,
            accepted=self.accepted,
            error=self.error,
            prompt_logprobs=self.prompt_logprobs,
            embedding=self.embedding,
        )

    def _thinks(self) -> bool:
        return self._transcript is not None and self._transcript.thinking

    def _thought(self) -> int:
        return 0 if self._transcript is None else self._transcript.thought


def _joined(passes: list[tuple[int, Routing]], cached: int) -> Routing:
    """The experts of the first `cached` tokens. A pass counts as far as the next one starts: the rest was guesses."""
    ends = [*(start for start, _ in passes[1:]), cached]
    kept: dict[int, list[Tensor]] = {}
    for (start, routing_NK), end in zip(passes, ends, strict=False):
        for layer, experts_NK in routing_NK.items():
            kept.setdefault(layer, []).append(experts_NK[: max(0, end - start)])
    return {layer: torch.cat(pieces) for layer, pieces in kept.items()}
