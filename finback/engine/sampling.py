"""How the next token is chosen: a distribution from the logits, and a keyed draw from it.

The draw is Gumbel-max: argmax(log p + g) with g a standard Gumbel variate per token is a sample of p. The noise comes
from a counter-based generator whose key is (seed, choice) and whose counter is the position, so a request draws the
same noise alone, in any batch, and when it is computed again.

`distribution` says what is drawn from, plainly and slowly; `choose` draws the same, token for token, without ranking a
vocabulary of which a few tokens are kept.
"""

import math
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from finback.engine.params import Sampling
from finback.errors import UserError

_WORD = 2**64
_TINY = np.finfo(np.float64).tiny
_ADVANCE = 320  # numbers that the generator draws in the time it takes to jump to one of them
_MANY = 512  # tokens from which on a nucleus is found without ranking them
_BLOCK = 2**15  # logits of greedy rows taken at once: their float64 copies stay in the cache


def draw_seed() -> int:
    """A fresh seed for a request that did not name one."""
    return secrets.randbits(63)


@dataclass(frozen=True)
class Choice:
    """A chosen token, its log-probability, and the likeliest (id, log-probability) of the same distribution."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = field(default=())


class History:
    """The tokens of a request so far, counted for the penalties: `ids` [n], and how often each was put out [n]."""

    def __init__(self, prompt: Iterable[int], output: Iterable[int] = ()) -> None:
        self._slot = {token: slot for slot, token in enumerate(dict.fromkeys(prompt))}
        self._ids = np.array([*self._slot, *[0] * 64], dtype=np.int64)
        self._counts = np.zeros(len(self._ids), dtype=np.int64)
        for token in output:
            self.add(token)

    def add(self, token: int) -> None:
        """Count one more token of output."""
        slot = self._slot.setdefault(token, len(self._slot))
        if slot == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[slot] = token
        self._counts[slot] += 1

    @property
    def ids(self) -> np.ndarray:
        return self._ids[: len(self._slot)]

    @property
    def counts(self) -> np.ndarray:
        return self._counts[: len(self._slot)]


class Row(NamedTuple):
    """What `choose` takes beside the logits."""

    sampling: Sampling
    seed: int
    choice: int
    position: int
    history: History | None = None
    mask: np.ndarray | None = None


def adjust(
    logits_V: np.ndarray, sampling: Sampling, history: History | None = None, mask: np.ndarray | None = None
) -> np.ndarray:
    """The logits [V] (float64) after the mask, the bias and the penalties; -inf where a token cannot come.

    The repetition penalty comes before the other two, as in vLLM. Raises UserError for a bias outside the vocabulary.
    """
    logits = logits_V.astype(np.float64)
    if mask is not None:
        logits[~mask] = -np.inf
    if sampling.logit_bias:
        sampling.check_ids(len(logits))
        logits[list(sampling.logit_bias)] += list(sampling.logit_bias.values())
    if sampling.penalised:
        assert history is not None, "penalties need the history of the request"
        ids, counts = history.ids, history.counts
        seen = logits[ids]
        seen = np.where(seen > 0, seen / sampling.repetition_penalty, seen * sampling.repetition_penalty)
        logits[ids] = seen - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)
    return logits


def distribution(
    logits_V: np.ndarray, sampling: Sampling, history: History | None = None, mask: np.ndarray | None = None
) -> np.ndarray:
    """Log-probabilities [V] (float64, -inf where excluded) of what `sampling` draws from: the specification.

    In this order: mask [V] of a grammar (True: allowed), logit_bias, repetition, frequency and presence penalty; the
    rest only where it is drawn: temperature, top_k, top_p of what is left, min_p. Greedy chooses the highest logit
    without drawing; its log-probabilities are those at temperature 1.
    """
    logits = adjust(logits_V, sampling, history, mask)
    kept = logits > -np.inf
    scaled = _scaled(logits, sampling)
    weights = np.exp(scaled)
    if sampling.temperature > 0:
        if sampling.top_k or sampling.top_p < 1:
            order = np.argsort(-logits, kind="stable")
        if sampling.top_k:
            kept[order[sampling.top_k :]] = False
        if sampling.top_p < 1:
            ranked = order[: kept.sum()]
            before = np.cumsum(weights[ranked] / weights[kept].sum())[:-1]
            # A token is kept while the likelier ones have not reached top_p; the likeliest always is.
            kept[ranked[1:][before >= sampling.top_p]] = False
        kept &= weights >= sampling.min_p
    return np.where(kept, scaled - np.log(weights[kept].sum()), -np.inf)


def _scaled(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The logits (float64) below the highest, in units of the temperature (1 where greedy)."""
    scaled = logits.astype(np.float64) - logits.max()
    with np.errstate(over="ignore"):
        scaled /= sampling.temperature or 1.0
    return scaled


def gumbel(seed: int, choice: int, position: int, count: int) -> np.ndarray:
    """`count` standard Gumbel variates that depend on the key (seed, choice, position) alone."""
    return _gumbel(np.random.Generator(_philox(seed, choice, position)).random(count))


def gumbel_at(seed: int, choice: int, position: int, ids: np.ndarray) -> np.ndarray:
    """`gumbel` of a vocabulary at these ids (ascending); where they are few, little else is computed."""
    count = int(ids[-1]) + 1
    bits = _philox(seed, choice, position)
    generator = np.random.Generator(bits)
    if len(ids) * _ADVANCE > count:
        return _gumbel(generator.random(count)[ids])
    uniform, at = [], 0
    for block, lane in zip((ids // 4).tolist(), (ids % 4).tolist(), strict=True):
        if block >= at:
            bits.advance(block - at)
            four, at = generator.random(4), block + 1
        uniform.append(four[lane])
    return _gumbel(np.array(uniform))


def _philox(seed: int, choice: int, position: int) -> np.random.Philox:
    key = np.array([seed % _WORD, choice % _WORD], dtype=np.uint64)
    # The lowest counter word walks through the vocabulary, so positions never share a block.
    counter = np.array([0, position, 0, 0], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter)


def _gumbel(uniform: np.ndarray) -> np.ndarray:
    """-log(-log(u)), in place: at the size of a vocabulary, fresh memory costs more than the logarithms."""
    np.maximum(uniform, _TINY, out=uniform)
    for _ in range(2):
        np.log(uniform, out=uniform)
        np.negative(uniform, out=uniform)
    return uniform


def choose(
    logits_V: np.ndarray,
    sampling: Sampling,
    seed: int,
    choice: int,
    position: int,
    history: History | None = None,
    mask: np.ndarray | None = None,
) -> Choice:
    """Choose the token at absolute `position` from its logits [V]: argmax of `distribution` + `gumbel`, or greedy.

    history: the tokens before, where `sampling.penalised`. mask: the tokens [V] (bool) that a grammar allows.
    Raises UserError if the logits are not finite, or no token is allowed.
    """
    _check_finite(float(logits_V.max()), position)
    logits = logits_V
    if mask is not None or sampling.logit_bias or sampling.penalised:
        logits = adjust(logits_V, sampling, history, mask)
    ids: np.ndarray | None = None
    if not logits.min() > -np.inf:
        ids = np.flatnonzero(logits > -np.inf)
        logits = logits[ids]
    if not len(logits):
        raise UserError(f"no token is allowed at position {position}: the grammar has no way to go on")
    kept, log_probs = _kept(logits, sampling)
    ids = _at(ids, kept)
    if sampling.temperature == 0:
        best = int(logits.argmax())
    else:
        noise = gumbel(seed, choice, position, len(logits_V)) if ids is None else gumbel_at(seed, choice, position, ids)
        best = int((log_probs + noise).argmax())
    return _choice(best, log_probs, 0.0, ids, sampling.logprobs)


def choose_rows(logits_NV: torch.Tensor | np.ndarray, rows: Sequence[Row]) -> list[Choice | UserError]:
    """`choose` for every row of logits [N, V]; a row that `choose` would refuse gets its error and disturbs no other.

    Rows that are plainly greedy (no mask, bias or penalty) are taken together.
    """
    if isinstance(logits_NV, torch.Tensor):
        logits_NV = logits_NV.detach().float().cpu().numpy()
    plain = [n for n, row in enumerate(rows) if _plain(row)]
    chosen: dict[int, Choice | UserError] = {}
    step = max(1, _BLOCK // logits_NV.shape[1])
    for first in range(0, len(plain), step):
        some = plain[first : first + step]
        chosen.update(zip(some, _greedy(logits_NV[some], [rows[n] for n in some]), strict=True))
    for n, row in enumerate(rows):
        if n not in chosen:
            try:
                chosen[n] = choose(logits_NV[n], *row)
            except UserError as error:
                chosen[n] = error
    return [chosen[n] for n in range(len(rows))]


def _plain(row: Row) -> bool:
    sampling = row.sampling
    return sampling.temperature == 0 and row.mask is None and not sampling.logit_bias and not sampling.penalised


def _greedy(logits_NV: np.ndarray, rows: Sequence[Row]) -> list[Choice | UserError]:
    """The highest logit of each row, the lowest id where there are several."""
    best_N, highest_N = logits_NV.argmax(1), logits_NV.max(1)
    with np.errstate(invalid="ignore"):  # what is not finite is refused below
        scaled_NV = logits_NV.astype(np.float64)
        scaled_NV -= highest_N[:, None]
        log_total_N = np.log(np.exp(scaled_NV).sum(1))
    chosen: list[Choice | UserError] = []
    for n, row in enumerate(rows):
        try:
            _check_finite(float(highest_N[n]), row.position)
        except UserError as error:
            chosen.append(error)
        else:
            chosen.append(_choice(int(best_N[n]), scaled_NV[n], float(log_total_N[n]), None, row.sampling.logprobs))
    return chosen


def _check_finite(highest: float, position: int) -> None:
    """The highest logit is NaN where any is."""
    if not math.isfinite(highest):
        raise UserError(
            f"the model's logits at position {position} are not finite: its weights are damaged or overflow"
        )


def _choice(best: int, scaled: np.ndarray, log_total: float, ids: np.ndarray | None, count: int) -> Choice:
    """The token at `best` and the `count` likeliest; `scaled` - log_total: log-probabilities of `ids` (None: all)."""
    top = _ranked(scaled, count).tolist() if count else []
    token, *tokens = [at if ids is None else int(ids[at]) for at in (best, *top)]
    log_probs = [float(scaled[at]) - log_total for at in top]
    likeliest = ((i, p) for i, p in zip(tokens, log_probs, strict=True) if p > -math.inf)
    return Choice(token, float(scaled[best]) - log_total, tuple(likeliest))


def _kept(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray | None, np.ndarray]:
    """Where in `logits` (all above -inf) the kept tokens are, ascending (None: all), and their log-probabilities.

    Every sum is over the same numbers in the same order as in `distribution`, so that the two agree to the last bit.
    """
    kept: np.ndarray | None = None
    drawn = sampling.temperature > 0
    if drawn and 0 < sampling.top_k < len(logits):
        kept = np.sort(_ranked(logits, sampling.top_k))
        logits = logits[kept]
    scaled = _scaled(logits, sampling)
    weights = np.exp(scaled)
    if drawn and sampling.top_p < 1:
        inner = _nucleus(logits, scaled, weights, sampling.top_p)
        kept, scaled, weights = _at(kept, inner), scaled[inner], weights[inner]
    if drawn and sampling.min_p > 0:
        inner = np.flatnonzero(weights >= sampling.min_p)
        kept, scaled, weights = _at(kept, inner), scaled[inner], weights[inner]
    return kept, scaled - np.log(weights.sum())


def _at(outer: np.ndarray | None, inner: np.ndarray | None) -> np.ndarray | None:
    """outer[inner], where None is everything."""
    return inner if outer is None else outer if inner is None else outer[inner]


def _ranked(values: np.ndarray, count: int) -> np.ndarray:
    """Where the `count` highest values are, the highest first and ties in order."""
    at = np.arange(len(values))
    if count < len(values):
        at = np.flatnonzero(values >= np.partition(values, -count)[-count])
    return at[np.argsort(-values[at], kind="stable")][:count]


def _nucleus(logits: np.ndarray, scaled: np.ndarray, weights: np.ndarray, top_p: float) -> np.ndarray:
    """Where the likeliest tokens are that reach top_p together, ascending."""
    total = weights.sum()
    # Tokens below this share have less than 1 - top_p together, so that the others reach top_p; save for rounding.
    near = np.flatnonzero(scaled >= math.log((1 - top_p) / len(scaled) * total))
    if len(near) > _MANY and (kept := _flat_nucleus(near, logits, scaled, weights, top_p)) is not None:
        return kept
    while True:
        ranked = near[np.argsort(-logits[near], kind="stable")]
        reached = np.cumsum(weights[ranked] / total)
        if len(near) == len(scaled) or reached[-1] >= top_p:
            return np.sort(ranked[: 1 + np.count_nonzero(reached[:-1] < top_p)])
        near = np.arange(len(scaled))


def _flat_nucleus(
    near: np.ndarray, logits: np.ndarray, scaled: np.ndarray, weights: np.ndarray, top_p: float
) -> np.ndarray | None:
    """The nucleus of many tokens by bins of likelihood, of which only the one at its edge is ranked.

    None where sums in another order could decide otherwise.
    """
    total, depth = weights.sum(), -scaled[near]
    bins = (depth * (_MANY / max(float(depth.max()), 1e-9))).astype(np.int32)
    share = np.cumsum(np.bincount(bins, weights[near])) / total
    edge_bin = int(np.searchsorted(share, top_p))
    edge = np.flatnonzero(bins == edge_bin)
    edge = edge[np.argsort(-logits[near[edge]], kind="stable")]
    below = share[edge_bin - 1] if edge_bin else 0.0
    reached = below + np.cumsum(np.concatenate([[0.0], weights[near[edge]]])) / total
    if np.abs(reached - top_p).min() < 1e-9 or reached[-1] < top_p:
        return None
    inside = bins < edge_bin
    inside[edge[: np.count_nonzero(reached[:-1] < top_p)]] = True
    return near[inside]
