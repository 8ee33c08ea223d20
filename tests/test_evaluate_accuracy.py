"""Scores: the Wilson interval against its definition, and grading against a model whose answers are known."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_samples import trained
from tiny_model import tiny, tiny_model

from finback.engine import Completion, Engine
from finback.errors import UserError
from finback.evaluate import evaluate, wilson
from finback.tasks import TASKS, sample
from finback.text import prompt_ids

Z = 1.959963984540054


def prompt(problem, think: bool) -> tuple[int, ...]:
    """The question as a chat begins with it."""
    return tuple(prompt_ids(trained(), [{"role": "user", "content": problem.question}], think))


class Oracle(Engine):
    """An engine that answers the problems of `sample` rightly, those with an index in `wrong` wrongly."""

    def __init__(self, problems, wrong=()):
        super().__init__(tiny_model(tiny(vocab_size=trained().vocab_size)), trained())
        self.answers = {prompt(p, True): "no idea" if i in wrong else p.answer for i, p in enumerate(problems)}
        self.answers |= {prompt(p, False): "no idea" for p in problems}
        self.asked = []

    def generate(self, prompts, sampling=None, *, think=True, routing=False):
        assert all(each.temperature == 0 for each in sampling)
        self.asked = [tuple(ids) for ids in prompts]
        for index in reversed(range(len(prompts))):  # they finish in any order
            text = self.answers[tuple(prompts[index])]
            yield Completion(index, text, "hm", [1, 2], [0.0, 0.0], "stop", 5)


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_solve_their_equation(counts):
    """Wilson 1927: the bounds p are where (share - p)^2 = z^2 p (1 - p) / n."""
    successes, n = counts
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    for p in (low, high):
        assert (successes / n - p) ** 2 == pytest.approx(Z**2 * p * (1 - p) / n, abs=1e-12)
    assert low < high


def test_wilson_known_values():
    """Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    table = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0, 0.1611), (1, 29): (0.0061, 0.1718)}
    for (successes, n), bounds in table.items():
        assert wilson(successes, n) == pytest.approx(bounds, abs=6e-5)


def test_scores_count_right_answers_per_task():
    problems = [p for task in ("letters", "sorting") for p in sample(task, 3, 8)]
    assert len({p.question for p in problems}) == 16, "the oracle answers by question"
    result = evaluate(Oracle(problems, wrong=(0, 1, 9)), ["letters", "sorting"], n=8, seed=3, name="oracle")
    assert result["model"] == "oracle" and result["seed"] == 3
    for task, right in (("letters", 6), ("sorting", 7)):
        score = result["tasks"][task]
        assert (score["n"], score["pass@1"]) == (8, right / 8)
        assert (score["low"], score["high"]) == pytest.approx(wilson(right, 8), abs=1e-4)
    assert json.loads(json.dumps(result)) == result


def test_problems_are_held_out_asked_as_a_user_asks_and_fixed_by_the_seed():
    problems = list(sample("decimals", 11, 5, difficulty=2))
    oracle = Oracle(problems)
    evaluate(oracle, ["decimals"], n=5, seed=11, difficulty=2, think=False)
    assert oracle.asked == [prompt(p, False) for p in problems]


def test_records_are_in_the_order_of_the_problems(tmp_path):
    problems = list(sample("bases", 0, 4))
    evaluate(Oracle(problems, wrong=(2,)), ["bases"], n=4, records=tmp_path / "r.jsonl")
    records = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [record["question"] for record in records] == [p.question for p in problems]
    assert [record["correct"] for record in records] == [True, True, False, True]
    assert records[2]["answer"] == "no idea" and records[2]["expected"] == problems[2].answer
    assert records[0]["reasoning"] == "hm" and records[0]["completion_tokens"] == 2


def test_every_task_is_the_default_and_a_real_engine_runs_them():
    model = tiny_model(tiny(vocab_size=trained().vocab_size, max_position_embeddings=1024))
    first, second = (evaluate(Engine(model, trained(), max_batch=b), n=2, max_tokens=4) for b in (16, 3))
    assert list(first["tasks"]) == list(TASKS)
    assert all(math.isfinite(score["low"]) for score in first["tasks"].values())
    assert first == second


def test_max_tokens_gives_way_to_the_context(tmp_path):
    """A recipe may allow as many tokens as the whole context; what remains of it is used."""
    model = tiny_model(tiny(vocab_size=trained().vocab_size, max_position_embeddings=150))
    evaluate(Engine(model, trained()), ["letters"], n=3, max_tokens=150, records=tmp_path / "r")
    lengths = [json.loads(line)["completion_tokens"] for line in (tmp_path / "r").read_text().splitlines()]
    assert 0 < max(lengths) <= 150


def test_mistakes_are_named():
    with pytest.raises(UserError, match="no tokenizer"):
        evaluate(Engine(tiny_model(tiny())), ["letters"], n=1)
    with pytest.raises(UserError, match="nothing"):
        evaluate(Oracle([]), ["nothing"], n=1)
    with pytest.raises(UserError, match="n is 0"):
        evaluate(Oracle([]), ["letters"], n=0)
