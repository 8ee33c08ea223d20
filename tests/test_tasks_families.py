"""Each family: what its question says is recomputed here by other means and must equal its answer."""

import itertools
import re
from fractions import Fraction

import pytest
from exact_value import value

from finback.tasks import TASKS, Problem, sample, verify
from finback.tasks.words import WORDS

FAMILIES = [name for name in TASKS if name != "open"]


def problems(name: str, n: int = 120, levels: range = range(1, 6)) -> list[Problem]:
    found = []
    for level in levels:
        found += sample(name, 7, n, split="train", difficulty=level)
        found += sample(name, 7, n // 6, split="held_out", difficulty=level)
    return found


@pytest.mark.parametrize("name", [*FAMILIES, "open"])
def test_own_answer_is_right_and_others_are_wrong(name):
    for problem in problems(name):
        assert verify(problem, problem.answer)
        assert verify(problem, f"\\boxed{{{problem.answer}}}")
        assert verify(problem, f" Answer: {problem.answer}.\n")
        for wrong in ("", "7 or 8", problem.answer + "1", problem.answer + " " + problem.answer, "-" + problem.answer):
            assert not verify(problem, wrong), (problem, wrong)


@pytest.mark.parametrize("name", [*FAMILIES])
def test_answer_of_another_problem_is_wrong(name):
    some = problems(name, 60, range(3, 4))
    for problem, other in itertools.pairwise(some):
        if problem.answer.lower() != other.answer.lower():
            assert not verify(problem, other.answer)


@pytest.mark.parametrize("name", FAMILIES)
def test_reasoning_ends_with_the_answer(name):
    for problem in problems(name, 60):
        last = problem.reasoning.splitlines()[-1]
        if name == "sorting":
            assert [int(n) for n in last.split()] == [int(n) for n in problem.answer.split(", ")]
        elif name == "countdown":
            assert last == f"{problem.answer} = {problem.data['target']}"
        else:
            found = re.search(r"(?:-> |: | r |= |^)?([^:>=]+?)(?: r 0)?$", last)
            assert found and found.group(1).strip() == problem.answer, (last, problem.answer)


def test_arithmetic_value():
    for problem in problems("arithmetic"):
        text = problem.question.lower()
        for word, sign in (("plus", "+"), ("minus", "-"), ("divided by", "/"), ("times", "*"), ("×", "*"), ("÷", "/")):
            text = text.replace(word, sign)
        text = re.sub(r"(?<=[0-9) ])x(?=[0-9( ])", "*", text)
        expression = re.search(r"[(]*[0-9][-+*/() 0-9]*", text)
        assert expression and value(expression.group()) == int(problem.answer), problem


def test_arithmetic_default_range():
    seen = set()
    for problem in sample("arithmetic", 3, 2000, split="train"):
        numbers = re.findall("[0-9]+", problem.key)
        assert len(numbers) == 3 and all(len(n) <= 3 for n in numbers)
        assert not set(problem.key) - set("0123456789+-*")
        factors = re.findall(r"([0-9]+)\*([0-9]+)", problem.key)
        assert len(factors) <= 1 and all(min(len(a), len(b)) <= 2 for a, b in factors)
        seen |= (
            set(map(len, numbers))
            | set(re.findall(r"[-+*]", problem.key))
            | {"minus" if problem.answer[0] == "-" else "plus"}
        )
    assert seen == {1, 2, 3, "+", "-", "*", "minus", "plus"}


def test_decimals_value_and_default_range():
    for problem in problems("decimals"):
        kind = problem.data["kind"]
        written = re.findall(r"(?<![0-9.])-?[0-9]+(?:\.[0-9]+)?", problem.question)
        assert written == problem.data["numbers"], problem
        numbers = [Fraction(n) for n in written]
        assert all(len(n.partition(".")[2]) <= 4 for n in written)
        if kind == "equal":
            assert problem.answer == ("yes" if numbers[0] == numbers[1] else "no")
        elif len(set(numbers)) == 1:
            assert problem.answer == "equal"
        elif kind in ("larger", "smaller"):
            assert problem.answer in written
            assert Fraction(problem.answer) == (max(numbers) if kind == "larger" else min(numbers))
        else:
            ordered = [Fraction(n) for n in problem.answer.split(", ")]
            assert ordered == sorted(numbers, reverse=kind == "descending")
    default = list(sample("decimals", 3, 1500, split="train"))
    assert {len(n.partition(".")[2]) for p in default for n in p.data["numbers"]} >= {1, 2, 3, 4}
    same_whole = sum(len({n.partition(".")[0] for n in p.data["numbers"]}) == 1 for p in default)
    assert same_whole > 750, "near cases are frequent"


def test_letters_value_and_default_range():
    counts = set()
    for problem in problems("letters"):
        letter, text = problem.data["letter"], problem.data["text"]
        assert text.lower() in problem.question.lower() and letter in problem.question.lower()
        assert int(problem.answer) == sum(1 for each in text if each == letter)
        counts.add(int(problem.answer))
    assert {0, 1, 2, 3} <= counts
    default = [p.data["text"] for p in sample("letters", 3, 2000, split="train")]
    assert {len(word) for word in default} == set(range(4, 13))
    assert 0.4 < sum(word in WORDS for word in default) / len(default) < 0.6
    assert {"strawberry", "banana", "mississippi"} <= set(WORDS)


def test_letters_reasoning_spells_and_counts():
    for problem in problems("letters", 60):
        letter, steps, total = re.fullmatch(r"(.): (.*) -> (\d+)", problem.reasoning).groups()
        spelled = "".join(step[0] for step in steps.split())
        assert spelled == problem.data["text"].replace(" ", "")
        assert [int(s[1:]) for s in steps.split()] == [spelled[: n + 1].count(letter) for n in range(len(spelled))]
        assert total == problem.answer


def test_equations_value():
    for problem in problems("equations"):
        variable = re.match(r"[a-z]", problem.reasoning.splitlines()[-1]).group()
        found = re.search(rf"(?<![a-z])[-0-9{variable} +()]*=[-0-9{variable} +()]*[0-9{variable})]", problem.question)
        assert found, problem.question
        sides = found.group().replace(f"){variable}", f")*{variable}")
        sides = re.sub(rf"(?<=[0-9])(?=[{variable}(])", "*", sides).replace(variable, "X").split("=")
        solution = Fraction(problem.answer)
        assert str(solution) == problem.answer, "lowest terms"
        assert value(sides[0], solution) == value(sides[1], solution), problem
        assert value(sides[0], solution + 1) != value(sides[1], solution + 1)


def test_equations_default_range():
    whole = 0
    seen_sizes = set()
    for problem in sample("equations", 3, 2000, split="train"):
        a, b, c, d = problem.data["coefficients"]
        assert a != c and max(map(abs, (a, b, c, d))) <= 20
        seen_sizes |= {abs(a), abs(b), abs(c), abs(d)}
        whole += Fraction(problem.answer).denominator == 1
    assert seen_sizes == set(range(21))
    assert 0.45 < whole / 2000 < 0.7


def test_sorting_value_and_default_range():
    for problem in problems("sorting"):
        asked = [int(n) for n in re.findall("[0-9]+", problem.question)]
        down = re.search(r"(de(scend|creas)|high to|(largest|greatest|biggest) to|largest first)", problem.question)
        assert problem.answer == ", ".join(map(str, sorted(asked, reverse=bool(down)))), problem
    orders = set()
    for problem in sample("sorting", 3, 500, split="train"):
        assert len(problem.data["numbers"]) == 6 and min(problem.data["numbers"]) >= 0
        assert max(problem.data["numbers"]) <= 999
        orders.add(problem.data["order"])
    assert orders == {"ascending", "descending"}


def test_bases_value_and_default_range():
    for problem in problems("bases"):
        source, target = problem.data["bases"]
        assert re.search(rf"(?<![0-9A-Z]){problem.data['number']}(?![0-9A-Z])", problem.question)
        assert {str(source), str(target)} <= set(re.findall(r"base (\d+)", problem.question))
        assert int(problem.answer, target) == int(problem.data["number"], source)
        assert problem.answer == problem.answer.upper()
    seen, digits = set(), set()
    for problem in sample("bases", 3, 2000, split="train"):
        source, target = problem.data["bases"]
        assert (source == 10) != (target == 10)
        other = problem.answer if source == 10 else problem.data["number"]
        assert len(other) <= 4
        seen |= {source, target}
        digits |= set(other)
    assert seen == set(range(2, 17)) and digits == set("0123456789ABCDEF")


MORE = ("taller", "older", "faster", "heavier", "stronger", "richer")
TOP = ("tallest", "oldest", "fastest", "heaviest", "strongest", "richest")
LOW = ("shortest", "youngest", "slowest", "lightest", "weakest", "poorest")


def order_of(question: str) -> list[str]:
    """The only order of the people that agrees with every fact of the question, by trying all of them."""
    facts = []
    for a, word, b in re.findall(r"([A-Z][a-z]+) is (not as [a-z]+|[a-z]+) (?:than|as) ([A-Z][a-z]+)", question):
        facts.append((a, b) if word in MORE else (b, a))
    people = sorted({person for fact in facts for person in fact})
    fits = [p for p in itertools.permutations(people) if all(p.index(a) < p.index(b) for a, b in facts)]
    assert len(fits) == 1, question
    return list(fits[0])


def test_relations_value():
    kinds = set()
    for problem in problems("relations", 60, range(1, 4)):
        order = order_of(problem.question)
        text = problem.question
        truth = re.search(r"[iI]s ([A-Z][a-z]+) ([a-z]+) than ([A-Z][a-z]+)", text)
        listing = re.search(r"(?:from (\w+) to|Rank them, (\w+) first)", text)
        if truth:
            a, word, b = truth.groups()
            above = order.index(a) < order.index(b)
            assert problem.answer == ("yes" if above == (word in MORE) else "no")
            kinds.add(("truth", problem.answer))
        elif listing:
            up = (listing.group(1) or listing.group(2)) in TOP
            assert problem.answer == ", ".join(order if up else order[::-1])
            kinds.add(("order", up))
        elif "middle" in text:
            assert len(order) % 2 and problem.answer == order[len(order) // 2]
            kinds.add("middle")
        else:
            place, word = re.search(r"(second |third )?(\w+est)\b", text).groups()
            people = order if word in TOP else order[::-1]
            assert word in TOP + LOW
            assert problem.answer == people[{None: 0, "second ": 1, "third ": 2}[place]]
            kinds.add(place)
    asked = {("truth", "yes"), ("truth", "no"), ("order", True), ("order", False), "middle", None, "second ", "third "}
    assert kinds == asked


def test_relations_default_range():
    firsts = set()
    for problem in sample("relations", 3, 300, split="train"):
        facts, turned, up, down, _ = problem.reasoning.splitlines()
        pairs = [tuple(fact.split(" > ")) for fact in facts.split(", ")]
        assert [tuple(fact.split(" < ")) for fact in turned.split(", ")] == [(b, a) for a, b in pairs]
        order = down.removeprefix("down: ").split(" > ")
        assert len(order) == 5 and set(pairs) == set(itertools.pairwise(order)) and len(pairs) == 4
        assert order_of(problem.question) == order
        walked = up.removeprefix("up: ").split(" < ")
        assert walked == order[: order.index(pairs[0][0]) + 1][::-1]
        firsts.add(order.index(pairs[0][0]))
    assert firsts == {0, 1, 2, 3}, "the facts are shuffled"


def test_countdown_value_and_default_range():
    for problem in problems("countdown"):
        numbers, target = problem.data["numbers"], problem.data["target"]
        asked = [int(n) for n in re.findall("[0-9]+", problem.question)]
        assert sorted(asked) == sorted([*numbers, target])
        assert value(problem.answer) == target
        assert sorted(map(int, re.findall("[0-9]+", problem.answer))) == sorted(numbers)
    for problem in sample("countdown", 3, 500, split="train"):
        assert len(problem.data["numbers"]) == 3 and min(problem.data["numbers"]) >= 1
        assert max(problem.data["numbers"]) <= 25 and 1 <= problem.data["target"] <= 50


def test_countdown_search_states_only_truths():
    for problem in problems("countdown", 60):
        have: set[int] = set()
        for line in problem.reasoning.splitlines()[1:]:
            if " | " in line:
                results, needs = line.split(" | ")
                have = {int(step.split("=")[1]) for step in results.split()}
                assert all(value(s.split("=")[0]) == int(s.split("=")[1]) for s in results.split())
                for need, result, verdict in re.findall(r"(\S+)=(\d+) (yes|no)", needs):
                    assert value(need) == int(result)
                    assert (int(result) in have) == (verdict == "yes"), line
            elif line.startswith("try "):
                step, result = line.removeprefix("try ").split(": ")[0].split("=")
                assert value(step) == int(result)
            else:
                assert value(line.split(" = ")[0]) == int(line.split(" = ")[1])
