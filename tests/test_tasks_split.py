"""The split between training and held-out problems, determinism, and the variety of the questions."""

import random
import re
import subprocess
import sys

import pytest

from finback.errors import UserError
from finback.tasks import TASKS, draw, is_held_out, sample
from finback.tasks.open_data import SENTENCES, TEMPLATES, TOPICS

FAMILIES = [name for name in TASKS if name != "open"]


@pytest.mark.parametrize("name", TASKS)
def test_train_and_held_out_share_no_key(name):
    train = {p.key for p in sample(name, 1, 3000, split="train")}
    held = {p.key for p in sample(name, 1, 400, split="held_out")}
    assert train and held and not train & held


@pytest.mark.parametrize("name", FAMILIES)
def test_about_one_in_twenty_is_held_out(name):
    rng = random.Random(5)
    drawn = {p.key: is_held_out(p) for p in (TASKS[name].generate(rng, 3) for _ in range(4000))}
    assert 0.03 < sum(drawn.values()) / len(drawn) < 0.07


@pytest.mark.parametrize("name", FAMILIES)
def test_the_key_says_all_but_the_wording(name):
    """One key has one answer (countdown: one target), so no held-out problem returns in training in other words."""
    answers: dict[str, set[str]] = {}
    for problem in sample(name, 2, 3000, split="train", difficulty=1):
        answer = str(problem.data["target"]) if name == "countdown" else problem.answer.lower()
        answers.setdefault(problem.key, set()).add(answer)
    assert all(len(each) == 1 for each in answers.values())
    # Names make nearly every relation new; elsewhere keys do come back at the easiest level.
    assert len(answers) < 3000 or name == "relations"


def test_orderless_content_has_an_orderless_key():
    """The same numbers in another order are the same countdown or comparison problem."""

    def numbers(name: str, extra: str) -> None:
        drawn = list(sample(name, 3, 3000, split="train", difficulty=1))
        contents = {(tuple(sorted(p.data["numbers"])), p.data[extra]) for p in drawn}
        orders = {(tuple(p.data["numbers"]), p.data[extra]) for p in drawn}
        assert len({p.key for p in drawn}) == len(contents) < len(orders)

    numbers("countdown", "target")
    numbers("decimals", "kind")


def test_open_holds_out_whole_templates_and_topics():
    train = [p.key.partition("|")[::2] for p in sample("open", 1, 6000, split="train")]
    held = [p.key.partition("|")[::2] for p in sample("open", 1, 2000, split="held_out")]
    templates, topics = {t for t, _ in train}, {t for _, t in train} - {"-"}
    assert len(templates) >= 60 and len(topics) >= 300
    assert all(template not in templates or topic not in topics for template, topic in held)
    assert len({template for template, _ in held} - templates) >= 20
    assert len({topic for _, topic in held} - topics) >= 30


def test_open_questions_vary_and_stay_outside_the_families():
    questions = [p.question for p in sample("open", 4, 2000, split="train")]
    assert len(set(questions)) > 1500
    assert 1 <= min(map(len, questions)) <= 5 and max(map(len, questions)) >= 60
    assert 0.1 < sum(q == q.lower() for q in questions) / 2000 < 0.7
    assert sum(q[-1] in "?.!" for q in questions) > 500 and sum(q[-1].isalnum() for q in questions) > 300
    inside = r"(sort|order|put) [0-9 ,]+|[a-z]'s are in|base \d+ to base|use \d+, \d+"
    assert not [q for q in questions if re.search(inside, q, re.IGNORECASE)]


@pytest.mark.parametrize("name", TASKS)
def test_same_seed_same_problems(name):
    first, again = list(sample(name, 9, 40)), list(sample(name, 9, 40))
    assert first == again
    assert list(sample(name, 10, 40)) != first
    assert [draw(name, random.Random(3), "train") for _ in range(2)] == [draw(name, random.Random(3), "train")] * 2


def test_same_problems_in_another_process():
    """Neither the hash seed of Python nor the state of the global generator has a part in it."""
    code = "from finback.tasks import *; print([p.question for n in TASKS for p in sample(n, 1, 5)])"
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_at_least_five_phrasings(name):
    def shape(question: str) -> str:
        names = r"[A-Z][a-z]+ is .*?\b(than|as) [A-Z][a-z]+[.,]? ?" if name == "relations" else r"$^"
        text = re.sub(names, "", question)
        return re.sub(r"[-+*/×÷−x=() ]*\d[-\d.,+*/×÷−x=() andA-F]*", "#", text).strip("?.! ")

    shapes = {shape(p.question) for p in sample(name, 5, 600, split="train")}
    assert len(shapes) >= 8
    questions = [p.question for p in sample(name, 5, 600, split="train")]
    assert any(q[-1] in "?." for q in questions) and any(q[-1] not in "?." for q in questions)


def test_harder_levels_have_longer_reasoning():
    for name in FAMILIES:
        mean = [
            sum(len(p.reasoning) for p in sample(name, 6, 100, split="train", difficulty=level)) / 100
            for level in (1, 3, 5)
        ]
        assert mean[0] < mean[1] < mean[2], name


def test_wrong_names_and_levels_are_user_errors():
    with pytest.raises(UserError, match="arithmetic, decimals"):
        next(sample("poetry", 0, 1))
    for level in (0, 6, -1):
        with pytest.raises(UserError, match="1 to 5"):
            next(sample("sorting", 0, 1, difficulty=level))


def test_tasks_do_not_import_torch():
    code = "import sys, finback.tasks; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_open_sentence_is_also_a_filled_template():
    """Else a held-out template or topic would be trained on in the shape of a whole sentence."""

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9 ]", "", text.lower()).strip()

    filled = {plain(text.replace("{t}", topic)) for group, text in TEMPLATES for topic in TOPICS[group]}
    assert not filled & {plain(sentence) for sentence in SENTENCES} - {""}
    assert len(set(SENTENCES)) == len(SENTENCES)
