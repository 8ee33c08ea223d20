"""The keyed sampler: what it draws from, that it draws it at the right rate, and what it reports."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from finback.engine import Sampling
from finback.engine.sampling import choose, distribution, gumbel
from finback.errors import UserError

# Upper 1e-6 points of chi-square, from tables: a right sampler fails once in a million runs, a seeded one never.
CRITICAL = {6: 38.26, 35: 89.98}
# Half precision, so that no two logits differ by less than rounding can keep apart.
logit_lists = st.lists(st.floats(-8, 8, width=16), min_size=1, max_size=9)


def plain(**changes) -> Sampling:
    return Sampling(**({"temperature": 1.0, "top_p": 1.0} | changes))


def brute_force(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """The definition in plain Python: rank by probability then id, keep k, then the smallest set that reaches top_p."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    ranked = sorted(range(len(logits)), key=lambda i: (-weights[i], i))[: top_k or len(logits)]
    total = sum(weights[i] for i in ranked)
    kept, reached = [], 0.0
    for i in ranked:
        if kept and reached >= top_p:
            break
        kept.append(i)
        reached += weights[i] / total
    mass = sum(weights[i] for i in kept)
    return [weights[i] / mass if i in kept else 0.0 for i in range(len(logits))]


@given(logit_lists, st.floats(0.2, 3), st.integers(0, 10), st.sampled_from([0.05, 0.31, 0.5, 0.77, 0.95, 1.0]))
def test_distribution_equals_brute_force(logits, temperature, top_k, top_p):
    expected = brute_force(logits, temperature, top_k, top_p)
    # Where only rounding decides which set reaches top_p there is no one right answer.
    assume(expected == brute_force(logits, temperature, top_k, top_p - 1e-9))
    assume(top_p == 1 or expected == brute_force(logits, temperature, top_k, top_p + 1e-9))
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    actual = np.exp(distribution(np.array(logits), sampling))
    np.testing.assert_allclose(actual, expected, atol=1e-12, rtol=1e-9)


def chi_square(counts: Counter, expected: dict) -> float:
    return sum((counts[key] - mean) ** 2 / mean for key, mean in expected.items())


@pytest.mark.parametrize("axis", ["seed", "choice", "position"])
def test_draws_follow_the_softmax_along_each_part_of_the_key(axis):
    logits = np.array([0.0, 1.5, -1.0, 0.7, -2.0, 2.0, 0.2])
    weights = np.exp(logits)
    draws = 6000
    counts = Counter()
    for i in range(draws):
        key = {"seed": 3, "choice": 1, "position": 10} | {axis: i}
        counts[choose(logits, plain(), **key).token] += 1
    assert chi_square(counts, dict(enumerate(draws * weights / weights.sum()))) < CRITICAL[6]


def test_neighbouring_positions_are_independent():
    logits = np.log(np.array([0.1, 0.3, 0.15, 0.15, 0.2, 0.1]))
    tokens = [choose(logits, plain(), seed=9, choice=0, position=i).token for i in range(8001)]
    share = np.exp(logits)
    expected = {(a, b): 8000 * share[a] * share[b] for a in range(6) for b in range(6)}
    assert chi_square(Counter(pairwise(tokens)), expected) < CRITICAL[35]


def test_truncated_draws_stay_inside_and_keep_their_rates():
    logits = np.array([2.0, 1.0, 1.0, 0.0, -1.0, 1.9, -3.0])
    expected = brute_force(logits.tolist(), 0.8, 5, 0.9)
    counts = Counter(choose(logits, plain(temperature=0.8, top_k=5, top_p=0.9), 1, 0, i).token for i in range(4000))
    assert set(counts) == {i for i, p in enumerate(expected) if p > 0}
    assert chi_square(counts, {i: 4000 * p for i, p in enumerate(expected) if p > 0}) < CRITICAL[6]


def test_noise_depends_on_every_part_of_the_key_and_on_nothing_else():
    base = gumbel(5, 0, 100, 40)
    np.testing.assert_array_equal(base, gumbel(5, 0, 100, 40))
    for other in [(6, 0, 100), (5, 1, 100), (5, 0, 101), (-5, 0, 100), (100, 0, 5), (0, 5, 100)]:
        assert not np.intersect1d(base, gumbel(*other, 40)).size, other
    # A larger vocabulary only adds noise at its end, and no position reuses that of the next one.
    np.testing.assert_array_equal(base, gumbel(5, 0, 100, 5000)[:40])
    assert not np.intersect1d(gumbel(5, 0, 100, 5000), gumbel(5, 0, 101, 5000)).size


def test_noise_is_gumbel_distributed():
    noise = np.sort(gumbel(1, 2, 3, 20_000))
    ranks = (np.arange(20_000) + 0.5) / 20_000
    assert np.abs(np.exp(-np.exp(-noise)) - ranks).max() < 2.7 / math.sqrt(20_000)  # Kolmogorov, 1e-6


def test_greedy_takes_the_lowest_id_of_the_best():
    logits = np.array([1.0, 3.0, 3.0, 2.0])
    for position in range(20):
        assert choose(logits, Sampling(temperature=0), 7, 0, position).token == 1


@given(logit_lists, st.sampled_from([0.0, 0.7, 1.0]), st.sampled_from([0.6, 1.0]), st.integers(0, 4))
def test_reported_logprobs_are_of_the_distribution_drawn_from(logits, temperature, top_p, top):
    sampling = Sampling(temperature=temperature, top_p=top_p, logprobs=top)
    expected = brute_force(logits, temperature or 1.0, 0, top_p if temperature else 1.0)
    assume(not temperature or top_p == 1 or expected == brute_force(logits, temperature, 0, top_p + 1e-9))
    choice = choose(np.array(logits), sampling, 11, 0, 4)
    assert choice.logprob == pytest.approx(math.log(expected[choice.token]), abs=1e-9)
    ranked = [i for i in sorted(range(len(logits)), key=lambda i: -logits[i]) if expected[i] > 0][:top]
    assert [p for _, p in choice.top] == pytest.approx([math.log(expected[i]) for i in ranked], abs=1e-9)
    for token, logprob in choice.top:
        assert logprob == pytest.approx(math.log(expected[token]), abs=1e-9)


def test_extreme_values_neither_overflow_nor_underflow():
    assert choose(np.array([1e30, 0.0, -1e30], dtype=np.float32), plain(), 0, 0, 0).token == 0
    assert choose(np.array([1.0, 2.0, 1.5]), plain(temperature=1e-300), 0, 0, 0).token == 1
    masked = choose(np.array([-np.inf, 0.0, -np.inf]), plain(), 0, 0, 0)
    assert (masked.token, masked.logprob) == (1, 0.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_named(bad):
    with pytest.raises(UserError, match="position 12 are not finite"):
        choose(np.array([0.0, bad, 1.0]), Sampling(temperature=0), 0, 0, 12)


@pytest.mark.parametrize(
    "field, value",
    [
        ("max_tokens", 0), ("max_tokens", 2.5), ("temperature", -0.1), ("temperature", math.nan),
        ("temperature", "hot"),
        ("top_p", 0), ("top_p", 1.01), ("top_k", -1), ("top_k", True), ("seed", 2**63), ("seed", 0.5), ("stop", [""]),
        ("stop", [3]), ("stop_ids", [-1]), ("logprobs", -1),
    ],
)  # fmt: skip
def test_values_that_are_not_allowed_are_named(field, value):
    with pytest.raises(UserError, match=rf"^{field} is .*; it must be "):
        Sampling(**{field: value})
