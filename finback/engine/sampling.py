"""How the next token is chosen: a distribution from the logits, and a keyed draw from it.

The draw is Gumbel-max: argmax(log p + g) with g a standard Gumbel variate per token is a sample of p. The noise comes
from a counter-based generator whose key is (seed, choice) and whose counter is the position, so a request draws the
same noise alone, in any batch, and when it is computed again.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from finback.errors import UserError

_WORD = 2**64


@dataclass(frozen=True)
class Sampling:
    """How one request is sampled and when it stops. Raises UserError for a value that is not allowed.

    max_tokens: new tokens at most, thinking included; None is the rest of the model's context.
    temperature: 0 is greedy (ties go to the lowest id); otherwise the logits are divided by it.
    top_p, top_k: keep the smallest set of likely tokens with this total probability, the k likeliest (0: all);
        top_k is applied first, ties go to the lowest id.
    seed: equal seeds give equal tokens; None draws a new seed for every request.
    stop: strings that end the answer and are not part of it (they are not looked for in the thinking).
    stop_ids: token ids that end the completion as EOS does. ignore_eos: do not stop on EOS.
    logprobs: how many alternatives to report beside each chosen token.
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
        _check(
            "max_tokens", self.max_tokens, "at least 1, or None", self.max_tokens is None or _whole(self.max_tokens, 1)
        )
        _check("temperature", self.temperature, "at least 0", _number(self.temperature) and self.temperature >= 0)
        _check("top_p", self.top_p, "above 0 and at most 1", _number(self.top_p) and 0 < self.top_p <= 1)
        _check("top_k", self.top_k, "a whole number, 0 for all tokens", _whole(self.top_k, 0))
        fits = self.seed is None or (_whole(self.seed, -(2**63)) and self.seed < 2**63)
        _check("seed", self.seed, "a whole number of 64 bits, or None", fits)
        _check("stop", self.stop, "strings that are not empty", all(isinstance(s, str) and s for s in self.stop))
        _check("stop_ids", self.stop_ids, "token ids", all(_whole(i, 0) for i in self.stop_ids))
        _check("logprobs", self.logprobs, "a whole number", _whole(self.logprobs, 0))


def _check(name: str, value: object, allowed: str, ok: bool) -> None:
    if not ok:
        raise UserError(f"{name} is {value!r}; it must be {allowed}")


def _whole(value: object, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def draw_seed() -> int:
    """A fresh seed for a request that did not name one."""
    return secrets.randbits(63)


@dataclass(frozen=True)
class Choice:
    """A chosen token, its log-probability, and the likeliest (id, log-probability) of the same distribution."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = field(default=())


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities along the last axis, in float64 (the reference that the training loss is compared with)."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def distribution(logits_V: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Log-probabilities [V] (float64, -inf where excluded) of what `sampling` draws from.

    Greedy chooses without drawing; its log-probabilities are those of the model, as at temperature 1.
    """
    if sampling.temperature == 0:
        return log_softmax(logits_V)
    scaled = logits_V.astype(np.float64) - logits_V.max()
    with np.errstate(over="ignore"):
        scaled /= sampling.temperature
    if sampling.top_k and sampling.top_k < len(scaled):
        scaled[np.argsort(-scaled, kind="stable")[sampling.top_k :]] = -np.inf
    log_probs = log_softmax(scaled)
    if sampling.top_p < 1:
        order = np.argsort(-log_probs, kind="stable")
        before = np.cumsum(np.exp(log_probs[order]))[:-1]
        # A token is kept while the likelier ones have not reached top_p; the likeliest always is.
        log_probs[order[1:][before >= sampling.top_p]] = -np.inf
        log_probs = log_softmax(log_probs)
    return log_probs


def gumbel(seed: int, choice: int, position: int, count: int) -> np.ndarray:
    """`count` standard Gumbel variates that depend on the key (seed, choice, position) alone."""
    key = np.array([seed % _WORD, choice % _WORD], dtype=np.uint64)
    # The lowest counter word walks through the vocabulary, so positions never share a block.
    counter = np.array([0, position, 0, 0], dtype=np.uint64)
    uniform = np.random.Generator(np.random.Philox(key=key, counter=counter)).random(count)
    return -np.log(-np.log(np.maximum(uniform, np.finfo(np.float64).tiny)))


def choose(logits_V: np.ndarray, sampling: Sampling, seed: int, choice: int, position: int) -> Choice:
    """Choose the token at absolute `position` from its logits [V]; raises UserError if they are not finite."""
    if not np.isfinite(logits_V.max()):
        raise UserError(
            f"the model's logits at position {position} are not finite: its weights are damaged or overflow"
        )
    log_probs = distribution(logits_V, sampling)
    if sampling.temperature == 0:
        token = int(logits_V.argmax())
    else:
        token = int((log_probs + gumbel(seed, choice, position, len(log_probs))).argmax())
    top = np.argsort(-log_probs, kind="stable")[: sampling.logprobs] if sampling.logprobs else ()
    alternatives = tuple((int(i), float(log_probs[i])) for i in top if log_probs[i] > -np.inf)
    return Choice(token, float(log_probs[token]), alternatives)
