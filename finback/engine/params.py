"""What a caller may ask of one request: how it is sampled, and when it stops."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from finback.engine.grammar import Grammar
from finback.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How one request is sampled and when it stops. Raises UserError for a value that is not allowed.

    max_tokens: new tokens at most, thinking included; None is the rest of the model's context, or of the engine's
        cache where that holds less.
    temperature: 0 is greedy (ties go to the lowest id); otherwise the logits are divided by it.
    top_p, top_k: keep the smallest set of likely tokens with this total probability, the k likeliest (0: all);
        top_k is applied first, ties go to the lowest id.
    seed: equal seeds give equal tokens; None draws a new seed for every request.
    stop: strings that end the answer and are not part of it (they are not looked for in the thinking).
    stop_ids: token ids that end the completion as EOS does. ignore_eos: do not stop on EOS.
    logprobs: how many alternatives to report beside each chosen token.
    min_p: keep the tokens at least this many times as probable as the likeliest (after temperature).
    repetition_penalty: logits of tokens in prompt or output are divided by it where positive, else multiplied
        (CTRL, 2019, section 4.1).
    presence_penalty, frequency_penalty: taken off the logit of a token in the output once, and for each time it is
        there (OpenAI's API). logit_bias: added to the logits of these token ids.
    thinking_tokens: tokens of thinking at most; None is no limit of its own.
    grammar: what the answer must be; the thinking is free.
    """

    max_tokens: int | None = 256
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 0
    seed: int | None = 0
    stop: Sequence[str] | str = ()
    stop_ids: Sequence[int] = ()
    logprobs: int = 0
    ignore_eos: bool = False
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    thinking_tokens: int | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
        check(
            "max_tokens", self.max_tokens, "at least 1, or None", self.max_tokens is None or whole(self.max_tokens, 1)
        )
        check("temperature", self.temperature, "at least 0", number(self.temperature) and self.temperature >= 0)
        check("top_p", self.top_p, "above 0 and at most 1", number(self.top_p) and 0 < self.top_p <= 1)
        check("top_k", self.top_k, "a whole number, 0 for all tokens", whole(self.top_k, 0))
        fits = self.seed is None or (whole(self.seed, -(2**63)) and self.seed < 2**63)
        check("seed", self.seed, "a whole number of 64 bits, or None", fits)
        check("stop", self.stop, "strings that are not empty", all(isinstance(s, str) and s for s in self.stop))
        check("stop_ids", self.stop_ids, "token ids", all(whole(i, 0) for i in self.stop_ids))
        check("logprobs", self.logprobs, "a whole number", whole(self.logprobs, 0))
        check("min_p", self.min_p, "0 to 1", _within(self.min_p, 0, 1))
        # The bounds keep every logit of float32 finite in float64.
        penalty = self.repetition_penalty
        check("repetition_penalty", penalty, "0.01 to 100, 1 for none", _within(penalty, 0.01, 100))
        check("presence_penalty", self.presence_penalty, "-2 to 2", _within(self.presence_penalty, -2, 2))
        check("frequency_penalty", self.frequency_penalty, "-2 to 2", _within(self.frequency_penalty, -2, 2))
        bias = self.logit_bias
        fits = isinstance(bias, Mapping) and all(whole(i, 0) and _within(b, -100, 100) for i, b in bias.items())
        check("logit_bias", bias, "token ids, each with a number from -100 to 100", fits)
        object.__setattr__(self, "logit_bias", MappingProxyType(dict(bias)))
        budget = self.thinking_tokens
        check("thinking_tokens", budget, "a whole number, or None", budget is None or whole(budget, 0))
        check("grammar", self.grammar, "a Grammar, or None", self.grammar is None or isinstance(self.grammar, Grammar))

    @property
    def penalised(self) -> bool:
        """Whether the tokens so far change the next distribution, so that a `History` of them is needed."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def check_ids(self, vocab_size: int) -> None:
        """Raises UserError if logit_bias or stop_ids name a token that a vocabulary of this size does not have."""
        for name, ids in (("logit_bias", self.logit_bias), ("stop_ids", self.stop_ids)):
            wrong = max(ids, default=0)
            if wrong >= vocab_size:
                raise UserError(f"{name} has token id {wrong}; this model's ids are 0 to {vocab_size - 1}")


def check(name: str, value: object, allowed: str, ok: bool) -> None:
    """Raise UserError for a setting that is not as it must be."""
    if not ok:
        raise UserError(f"{name} is {value!r}; it must be {allowed}")


def whole(value: object, low: int) -> bool:
    """Whether this is an int, no bool, and at least `low`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def number(value: object) -> bool:
    """Whether this is a finite number, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _within(value: float, low: float, high: float) -> bool:
    return number(value) and low <= value <= high
