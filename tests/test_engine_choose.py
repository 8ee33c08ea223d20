"""The fast choice against the specification, and the parameters of sampling against brute force."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from finback.engine import Sampling
from finback.engine import sampling as module
from finback.engine.sampling import Choice, History, Row, adjust, choose, choose_rows, distribution, gumbel, gumbel_at
from finback.errors import UserError

KEY = {"seed": 11, "choice": 2, "position": 40}
# Few values: ties are common, and so are sets whose probabilities add up to exactly top_p.
coarse = st.sampled_from([0.0, 0.5, 1.0, 1.0, 2.0, -3.0, 40.0, -200.0, 1e30, -1e30, -math.inf])
fine = st.floats(-8, 8, width=32)
logit_rows = st.one_of(st.lists(coarse, min_size=1, max_size=12), st.lists(fine, min_size=1, max_size=40))
penalties = st.sampled_from([-2.0, -0.5, 0.0, 0.0, 0.3, 2.0])


@st.composite
def samplings(draw, size: int) -> Sampling:
    bias = st.dictionaries(st.integers(0, size - 1), st.sampled_from([-100.0, -1.5, 0.25, 100.0]), max_size=2)
    return Sampling(
        temperature=draw(st.sampled_from([0.0, 0.0, 1e-300, 0.3, 0.6, 1.0, 2.5])),
        top_p=draw(st.sampled_from([0.05, 0.25, 0.5, 0.75, 0.95, 1 - 1e-12, 1.0, 1.0])),
        top_k=draw(st.sampled_from([0, 0, 1, 2, 5, 1000])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.01, 0.5, 1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3, 0.5, 100.0])),
        presence_penalty=draw(penalties),
        frequency_penalty=draw(penalties),
        logit_bias=draw(bias),
        logprobs=draw(st.integers(0, 4)),
    )


@st.composite
def rows(draw, size: int) -> Row:
    """A row for a vocabulary of `size`, its history, its grammar's mask (which allows a token), its key."""
    token = st.integers(0, size - 1)
    history = History(draw(st.lists(token, max_size=6)), draw(st.lists(token, max_size=6)))
    mask = draw(st.one_of(st.none(), st.lists(st.booleans(), min_size=size, max_size=size)))
    key = draw(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 50)))
    return Row(draw(samplings(size)), *key, history, None if mask is None else np.array(mask))


def plainly(logits_V: np.ndarray, row: Row) -> Choice:
    """The definition: argmax of the specified distribution and all the noise; or of the adjusted logits."""
    sampling, seed, choice, position, history, mask = row
    log_probs = distribution(logits_V, sampling, history, mask)
    if sampling.temperature == 0:
        token = int(adjust(logits_V, sampling, history, mask).argmax())
    else:
        token = int((log_probs + gumbel(seed, choice, position, len(log_probs))).argmax())
    ranked = np.argsort(-log_probs, kind="stable")[: sampling.logprobs]
    return Choice(token, log_probs[token], tuple((int(i), log_probs[i]) for i in ranked if log_probs[i] > -np.inf))


def same(actual: Choice | UserError, expected: Choice) -> None:
    assert isinstance(actual, Choice)
    assert actual.token == expected.token
    assert actual.logprob == pytest.approx(expected.logprob, abs=1e-9)
    assert [token for token, _ in actual.top] == [token for token, _ in expected.top]
    assert [p for _, p in actual.top] == pytest.approx([p for _, p in expected.top], abs=1e-9)


@st.composite
def batches(draw) -> tuple[np.ndarray, list[Row]]:
    """Logits [N, V] in which every row has a finite one that its mask allows."""
    first = draw(logit_rows)
    size, count = len(first), draw(st.integers(1, 4))
    more = [draw(st.lists(coarse, min_size=size, max_size=size)) for _ in range(count - 1)]
    logits_NV, each = np.array([first, *more], dtype=np.float32), [draw(rows(size)) for _ in range(count)]
    for logits_V, row in zip(logits_NV, each, strict=True):
        at = draw(st.integers(0, size - 1))
        logits_V[at] = 0 if np.isneginf(logits_V[at]) else logits_V[at]
        if row.mask is not None:
            row.mask[at] = True
    return logits_NV, each


@given(batches())
@settings(max_examples=400)
def test_every_row_of_a_batch_is_what_the_specification_says_of_it_alone(batch):
    logits_NV, each = batch
    before = logits_NV.copy()
    for logits_V, row, actual in zip(logits_NV, each, choose_rows(torch.from_numpy(logits_NV), each), strict=True):
        same(actual, plainly(logits_V, row))
        assert actual == choose(logits_V, *row)
    np.testing.assert_array_equal(logits_NV, before)


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 6.0])
@pytest.mark.parametrize("top_p", [0.3, 0.95, 1 - 1e-16, 1.0])
def test_large_vocabularies_are_drawn_from_as_specified(spread, top_p):
    generator = np.random.default_rng(5)
    for n, size in enumerate([2049, 9000, 31337]):
        logits = generator.normal(0, spread, size).astype(np.float32).round(3)
        for changes in ({}, {"top_k": 3000}, {"min_p": 0.02}, {"repetition_penalty": 1.3}):
            sampling = Sampling(temperature=0.8, top_p=top_p, logprobs=3, **changes)
            row = Row(sampling, n, 0, n, History(range(50), [7, 7]))
            same(choose(logits, *row), plainly(logits, row))
            kept = np.flatnonzero(distribution(logits, sampling, row.history) > -np.inf)
            inner, _ = module._kept(adjust(logits, sampling, row.history), sampling)
            np.testing.assert_array_equal(np.arange(size) if inner is None else inner, kept)


@pytest.mark.parametrize("ids", [[0], [3, 4, 5, 7], [39_999], [1, 17_001, 17_002, 17_003, 17_004, 39_998]])
def test_noise_at_a_few_ids_is_the_noise_of_the_vocabulary(ids):
    np.testing.assert_array_equal(gumbel_at(3, 1, 9, np.array(ids)), gumbel(3, 1, 9, 40_000)[ids])


def test_existing_seeds_stay_valid():
    # Philox4x64-10 with key (5, 0), counter (0, 100, 0, 0), as numpy 2.4 gave it when the first model was released.
    expected = [
        1.0360000878835416,
        -0.2203468471782808,
        1.1328127954207057,
        -1.273161979799751,
        -0.025804075156581133,
        -0.008108387287704844,
    ]
    np.testing.assert_allclose(gumbel(5, 0, 100, 6), expected, rtol=1e-12)


@given(st.lists(fine, min_size=2, max_size=9), st.data(), penalties, penalties, st.sampled_from([0.5, 1.0, 1.7]))
def test_penalties_and_bias_equal_brute_force(logits, data, presence, frequency, repetition):
    token = st.integers(0, len(logits) - 1)
    prompt, output = data.draw(st.lists(token, max_size=9)), data.draw(st.lists(token, max_size=9))
    bias = data.draw(st.dictionaries(token, st.floats(-100, 100), max_size=3))
    expected = []
    for i, value in enumerate(logits):
        value += bias.get(i, 0.0)
        if i in prompt or i in output:
            value = value / repetition if value > 0 else value * repetition
        if i in output:
            value -= presence + frequency * output.count(i)
        expected.append(value)
    sampling = Sampling(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency, logit_bias=bias
    )
    history = History(prompt)
    for i in output:
        history.add(i)
    actual = adjust(np.array(logits, dtype=np.float32), sampling, history)
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


def test_a_long_history_counts_every_token():
    output = [i % 300 for i in range(1000)]
    history = History([5, 5, 9], output)
    assert dict(zip(history.ids.tolist(), history.counts.tolist(), strict=True)) == {
        i: output.count(i) for i in range(300)
    }
    assert History([5, 5, 9]).counts.tolist() == [0, 0]


@given(st.lists(fine, min_size=1, max_size=9), st.floats(0, 1), st.sampled_from([0.4, 1.0, 2.0]))
def test_min_p_keeps_what_is_probable_enough_beside_the_likeliest(logits, min_p, temperature):
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    assume(all(abs(w - min_p) > 1e-9 for w in weights if w != 1))
    kept = [w if w >= min_p else 0.0 for w in weights]
    sampling = Sampling(temperature=temperature, top_p=1, min_p=min_p)
    actual = np.exp(distribution(np.array(logits), sampling))
    np.testing.assert_allclose(actual, np.array(kept) / sum(kept), atol=1e-12)


def test_min_p_is_taken_after_top_p():
    # Of 0.5, 0.3, 0.2, top_p 0.6 leaves the first two; min_p 0.5 of the likeliest leaves both, 0.7 the first.
    logits = np.log(np.array([0.2, 0.3, 0.5]))
    for min_p, expected in ((0.5, [0, 0.375, 0.625]), (0.7, [0, 0, 1])):
        sampling = Sampling(temperature=1, top_p=0.6, min_p=min_p)
        np.testing.assert_allclose(np.exp(distribution(logits, sampling)), expected, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_broken_row_gets_its_own_error_and_disturbs_no_other(temperature):
    sampling = Sampling(temperature=temperature, logprobs=2)
    logits = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32)
    alone = [choose(logits[n], sampling, 1, 0, n) for n in range(5)]
    logits[1, 3], logits[3, 7] = np.nan, np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = choose_rows(logits, [Row(sampling, 1, 0, n) for n in range(5)])
    for n in (1, 3):
        assert isinstance(chosen[n], UserError) and f"position {n} are not finite" in str(chosen[n])
    assert [chosen[n] for n in (0, 2, 4)] == [alone[n] for n in (0, 2, 4)]


def test_rows_without_an_allowed_token_and_ids_outside_are_named():
    logits = np.zeros(4, dtype=np.float32)
    with pytest.raises(UserError, match="no token is allowed at position 40"):
        choose(logits, Sampling(), **KEY, mask=np.zeros(4, dtype=bool))
    with pytest.raises(UserError, match="logit_bias has token id 4; this model's ids are 0 to 3"):
        choose(logits, Sampling(logit_bias={4: 1}), **KEY)
    with pytest.raises(UserError, match="stop_ids has token id 9"):
        Sampling(stop_ids=[1, 9]).check_ids(9)


def test_greedy_takes_the_adjusted_logits():
    logits = np.array([1.0, 3.0, 2.0], dtype=np.float32)
    assert choose(logits, Sampling(temperature=0, logit_bias={0: 5}), **KEY).token == 0
    assert choose(logits, Sampling(temperature=0, presence_penalty=2), **KEY, history=History([1], [1])).token == 2
    assert choose(logits, Sampling(temperature=0), **KEY, mask=np.array([True, False, False])).token == 0
    chosen = choose(logits, Sampling(temperature=0, logit_bias={1: -100}), **KEY)
    assert chosen.logprob == pytest.approx(-math.log(1 + math.exp(-1)), abs=1e-9)


@pytest.mark.parametrize(
    "field, value",
    [
        ("min_p", -0.1), ("min_p", 1.1), ("min_p", True), ("repetition_penalty", 0), ("repetition_penalty", math.inf),
        ("presence_penalty", 2.1), ("presence_penalty", "much"), ("frequency_penalty", -2.1),
        ("frequency_penalty", math.nan), ("logit_bias", [(1, 2)]), ("logit_bias", {-1: 0}), ("logit_bias", {"1": 0}),
        ("logit_bias", {1: 101}), ("logit_bias", {1: None}), ("thinking_tokens", -1), ("thinking_tokens", 1.5),
        ("grammar", "[a-z]"),
    ],
)  # fmt: skip
def test_values_that_are_not_allowed_are_named(field, value):
    with pytest.raises(UserError, match=rf"^{field} is .*; it must be "):
        Sampling(**{field: value})


def test_sampling_is_immutable_and_can_be_hashed():
    bias = {1: 2.0}
    sampling = Sampling(logit_bias=bias, thinking_tokens=0)
    bias[1] = 3.0
    assert sampling.logit_bias == {1: 2.0} and hash(sampling) == hash(Sampling(logit_bias={1: 2.0}, thinking_tokens=0))
    with pytest.raises(TypeError):
        sampling.logit_bias[1] = 0.0
