"""One request on its way through the engine, and the completion it becomes."""

from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from finback.engine.sampling import Choice, Sampling, draw_seed
from finback.model import Routing
from finback.text import ReasoningSplit, Tokenizer

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Completion:
    """What a request became.

    index: which prompt of `generate` it answers. text, reasoning: answer and thinking; empty without a tokenizer.
    token_ids: every new token, with the EOS or stop id that ended it. logprobs: of each of them, in the distribution it
    was drawn from (that of the model where greedy). top_logprobs: per token the likeliest (id, log-probability), if
    asked for.
    finish_reason: "stop" (EOS, stop id, stop string), "length" (max_tokens or the context) or "cancelled".
    prompt_tokens: length of the prompt in tokens, BOS included.
    routing: by MoE layer the experts [T, K] of all tokens that were computed (all but the last), if asked for.
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


class Delta(NamedTuple):
    """New text of a streamed request; the last one carries the completion."""

    reasoning: str
    text: str
    completion: Completion | None = None


class Transcript:
    """The text of a completion as its tokens arrive: thinking and answer, the answer ended by a stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        self._split = ReasoningSplit(tokenizer, prompt_ids)
        self._stop = stop
        self._held = ""  # the end of the answer that may be the start of a stop string
        self.reasoning: list[str] = []
        self.text: list[str] = []

    def push(self, token: int) -> bool:
        """Add a token; True when the answer has reached a stop string, which is not part of it."""
        return self._add(*self._split.push(token))

    def close(self) -> None:
        """No token comes any more: what was held back is text."""
        if not self._add(*self._split.flush()):
            self.text.append(self._held)

    def _add(self, reasoning: str, answer: str) -> bool:
        self.reasoning.append(reasoning)
        answer = self._held + answer
        found = [at for at in map(answer.find, self._stop) if at >= 0]
        keep = min(found) if found else len(answer) - self._open(answer)
        self.text.append(answer[:keep])
        self._held = answer[keep:]
        return bool(found)

    def _open(self, answer: str) -> int:
        """The length of the longest end of `answer` that begins a stop string."""
        longest = min(len(answer), max(map(len, self._stop), default=1) - 1)
        sizes = range(longest, 0, -1)
        return next((n for n in sizes if any(s.startswith(answer[-n:]) for s in self._stop)), 0)


class Request:
    """A prompt, what was generated from it, and how much of both lies in the cache."""

    def __init__(
        self,
        index: int,
        prompt: list[int],
        sampling: Sampling,
        limit: int,
        choice: int,
        routing: bool,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.index, self.sampling, self.choice = index, sampling, choice
        self.seed = draw_seed() if sampling.seed is None else sampling.seed
        self.ids = list(prompt)
        self.prompt_tokens = len(prompt)
        self.limit = limit
        self.cached = 0
        self.choices: list[Choice] = []
        self.routing: dict[int, list[Tensor]] | None = {} if routing else None
        self.finish_reason: FinishReason | None = None
        assert isinstance(sampling.stop, tuple)
        self._transcript = None if tokenizer is None else Transcript(tokenizer, prompt, sampling.stop)
        self._taken = (0, 0)

    @property
    def done(self) -> bool:
        return self.finish_reason is not None

    def accept(self, choice: Choice, eos_ids: Set[int | None]) -> None:
        """Append a chosen token and finish if it is the last."""
        self.ids.append(choice.token)
        self.choices.append(choice)
        if (choice.token in eos_ids and not self.sampling.ignore_eos) or choice.token in self.sampling.stop_ids:
            self.finish("stop")
        elif self._transcript is not None and self._transcript.push(choice.token):
            self.finish_reason = "stop"
        elif len(self.choices) == self.limit:
            self.finish("length")

    def finish(self, reason: FinishReason) -> None:
        """End the request here, with the text it has."""
        self.finish_reason = reason
        if self._transcript is not None:
            self._transcript.close()

    def record(self, routing_NK: Routing, row: int, width: int, count: int) -> None:
        """Keep the experts of this row's `count` real tokens out of those of a padded pass `width` tokens wide."""
        if self.routing is not None:
            for layer, experts_NK in routing_NK.items():
                self.routing.setdefault(layer, []).append(experts_NK[row * width : row * width + count])

    def forget(self) -> None:
        """Nothing computed is left: the next pass starts at the first token."""
        self.cached = 0
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
            routing=None if self.routing is None else {layer: torch.cat(r) for layer, r in self.routing.items()},
        )
