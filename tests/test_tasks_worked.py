"""Every line of the worked reasoning is true: columns, comparisons, divisions and results are read back."""

import re
from math import gcd

import pytest
from exact_value import value
from hypothesis import given
from hypothesis import strategies as st

from finback.tasks import sample, worked

WHOLE = st.integers(0, 10**6)
SIGNED = st.integers(-(10**6), 10**6)


def check_step(step: str) -> str | None:
    """The kind of one step, after asserting that it is true; None for what is no step."""
    if found := re.fullmatch(r"(\d)\+(\d)\+([01])=(\d\d)", step):
        a, b, carry, total = map(int, found.groups())
        assert a + b + carry == total, step
        return "add"
    if found := re.fullmatch(r"(\d)\*(\d)\+(\d\d?)=(\d\d)", step):
        a, b, carry, total = map(int, found.groups())
        assert a * b + carry == total, step
        return "times"
    if found := re.fullmatch(r"(\d)-(\d)-([01])=(\d)b([01])", step):
        a, b, borrow, digit, below = map(int, found.groups())
        assert a - b - borrow == digit - 10 * below, step
        return "take"
    if found := re.fullmatch(r"(\d+)-(\d+)\*(\d+)=(\d+)-(\d+)=(\d+)", step):
        current, quotient, divisor, same, product, rest = map(int, found.groups())
        assert current == same and quotient * divisor == product and current - product == rest < divisor, step
        return "divide"
    if found := re.fullmatch(r"(\d)([<=>])(\d)", step):
        a, sign, b = found.groups()
        assert {"<": a < b, "=": a == b, ">": a > b}[sign], step
        return "compare"
    return None


def result_of(text: str) -> int:
    """`072 = 72` and `-09 = -9` are the digits and the number; the two must agree."""
    first, _, last = text.partition(" = ")
    assert int(first) == int(last or first) and str(int(first)) == (last or first), text
    return int(first)


def check_line(line: str) -> bool:
    """Read one `head: steps -> result` back; the columns have the digits of the head. False: another kind of line."""
    if " -> " not in line:
        return False
    work, result = line.rsplit(" -> ", 1)
    steps = [step for step in work.split() if check_step(step)]
    kinds = [check_step(step) for step in steps]
    columns = [step for step, kind in zip(steps, kinds, strict=True) if kind not in ("compare", "divide")]
    tops, bottoms = "".join(c[0] for c in columns)[::-1], "".join(c[2] for c in columns)[::-1]
    if found := re.search(r"(-?)\(?(\d+)\+(\d+)\)?: \d\+", work):
        minus, a, b = found.groups()
        assert (tops, bottoms) == (a, b) and len(a) == len(b)
        assert result_of(result) == (int(a) + int(b)) * (-1 if minus else 1)
    elif found := re.search(r"(\d+)-(\d+): \d[<=>]", work):
        a, b = found.groups()
        compared = [step for step, kind in zip(steps, kinds, strict=True) if kind == "compare"]
        assert "".join(c[0] for c in compared) == a[: len(compared)]
        assert "".join(c[2] for c in compared) == b[: len(compared)]
        assert columns == [] or (tops, bottoms) == ((a, b) if int(a) > int(b) else (b, a))
        assert int(a) < int(b) or "-(" not in work.partition(f"{a}-{b}:")[2]
        assert result_of(result) == int(a) - int(b)
    elif found := re.search(r"(\d+)\*(\d)(?:\+(\d+))?: \d\*", work):
        a, b, plus = found.groups(default="0")
        assert tops == a and set(bottoms) == {b}
        assert result_of(result) == int(a) * int(b) + int(plus)
    elif found := re.search(r"(\d+)/(\d+): ", work):
        a, b = map(int, found.groups())
        quotient, rest = map(int, result.split(" r "))
        assert kinds and set(kinds) == {"divide"} and divmod(a, b) == (quotient, rest)
    elif found := re.search(r"gcd (\d+) (\d+): ", work):
        assert gcd(*map(int, found.groups())) == int(result)
    else:
        return False
    return True


@pytest.mark.parametrize("name, share", [("arithmetic", 0.4), ("equations", 0.4), ("bases", 0.3)])
def test_every_line_of_the_reasoning_is_true(name, share):
    lines = checked = 0
    for level in range(1, 6):
        for problem in sample(name, 11, 150, split="train", difficulty=level):
            for line in problem.reasoning.splitlines():
                lines += 1
                checked += check_line(line)
    assert checked > share * lines


def test_arithmetic_expression_keeps_its_value_line_by_line():
    for level in range(1, 6):
        for problem in sample("arithmetic", 12, 100, split="train", difficulty=level):
            states = [line for line in problem.reasoning.splitlines() if re.fullmatch(r"[-+*/()0-9]+", line)]
            assert states[0] == problem.key
            assert len(states) == len(re.findall(r"(?<=[0-9)])[-+*/]", problem.key))
            for state in states:
                assert value(state) == int(problem.answer)


def test_comparison_of_decimals_is_true():
    for problem in sample("decimals", 12, 400, split="train"):
        line = problem.reasoning.splitlines()[0]
        padded, _, rest = line.partition(": ")
        steps, verdict = rest.split(" -> ")
        a, b = padded.replace(".", "").split()
        assert len(a) == len(b) and padded.split()[0].find(".") == padded.split()[1].find(".")
        assert all(check_step(step) == "compare" for step in steps.split())
        assert [step[0] for step in steps.split()] == list(a[: len(steps.split())])
        assert [step[2] for step in steps.split()] == list(b[: len(steps.split())])
        sign = "=" if a == b else "<" if a < b else ">"
        assert steps[-2] == sign and verdict == sign.join(problem.data["numbers"])


def test_sorting_deals_every_number_once():
    for problem in sample("sorting", 12, 300, split="train"):
        head, groups, ordered = problem.reasoning.splitlines()
        padded = head.partition(": ")[2].split()
        assert [int(n) for n in padded] == problem.data["numbers"] and len(set(map(len, padded))) == 1
        dealt = re.findall(r"(\d):((?:\d{2,}| )*)", groups) if len(padded[0]) > 1 else []
        if dealt:
            assert "".join(d for d, _ in dealt) in ("0123456789", "9876543210")
            assert all(n[0] == digit for digit, group in dealt for n in group.split())
            assert sorted(n for _, group in dealt for n in group.split()) == sorted(padded)
        assert sorted(ordered.split()) == sorted(padded)


@given(SIGNED, SIGNED)
def test_signed_sum_reads_back(a, b):
    line = worked.signed_sum(a, b)
    assert check_line(line) and result_of(line.split(" -> ")[1]) == a + b


@given(WHOLE, st.integers(0, 99))
def test_product_reads_back(a, b):
    lines = worked.product(a, b)
    assert all(check_line(line) for line in lines) and result_of(lines[-1].split(" -> ")[1]) == a * b
    assert worked.product(b, a)[-1].split(" -> ")[1] == lines[-1].split(" -> ")[1]


@given(st.integers(1, 10**5), st.integers(0, 9), st.integers(0, 15))
def test_product_with_a_first_carry_reads_back(a, digit, plus):
    line = worked.times_digit(a, digit, plus)
    assert check_line(line) and result_of(line.split(" -> ")[1]) == a * digit + plus


@given(WHOLE, st.integers(1, 200))
def test_division_and_euclid_read_back(a, b):
    assert check_line(worked.division(a, b))
    assert check_line(worked.euclid(a + 1, b))


def test_formats_are_fixed():
    """The shipped model is trained on these very texts: a change of one asks for a new training run."""
    assert worked.addition(347, 6560) == "0347+6560: 7+0+0=07 4+6+0=10 3+5+1=09 0+6+0=06 -> 6907"
    assert worked.signed_sum(12, -345) == "012-345: 0<3 -(345-012): 5-2-0=3b0 4-1-0=3b0 3-0-0=3b0 -> -333"
    assert worked.signed_sum(-5, -17) == "-(05+17): 5+7+0=12 0+1+1=02 -> -22"
    assert worked.subtraction(45, 45) == "45-45: 4=4 5=5 -> 0"
    assert worked.subtraction(172, 100) == "172-100: 1=1 7>0 2-0-0=2b0 7-0-0=7b0 1-1-0=0b0 -> 072 = 72"
    assert worked.product(5, 82) == ["82*5: 2*5+0=10 8*5+1=41 -> 410"]
    assert worked.division(735, 5) == "735/5: 7-1*5=7-5=2 23-4*5=23-20=3 35-7*5=35-35=0 -> 147 r 0"
    assert worked.euclid(9, 24) == "gcd 24 9: 24-2*9=24-18=6 9-1*6=9-6=3 6-2*3=6-6=0 -> 3"
