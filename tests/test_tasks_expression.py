"""The expression parser against Fraction arithmetic: exact on what the grammar has, None on everything else."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finback.tasks import TASKS, sample, verify
from finback.tasks.base import final_answer, parse_number
from finback.tasks.expression import evaluate

PROBLEMS = [next(sample(name, 0, 1)) for name in TASKS]
Tree = tuple[str, Fraction | None, list[int]]


def _number(n: int) -> Tree:
    return str(n), Fraction(n), [n]


def _join(left: Tree, sign: str, right: Tree, space: str) -> Tree:
    a, b = left[1], right[1]
    value = None
    if a is not None and b is not None:
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[sign]
    return f"({left[0]}{space}{sign}{space}{right[0]})", value, left[2] + right[2]


TREES = st.recursive(
    st.integers(0, 999).map(_number),
    lambda inner: st.builds(_join, inner, st.sampled_from("+-*/"), inner, st.sampled_from(["", " "])),
    max_leaves=10,
)


@given(TREES)
def test_bracketed_expressions(tree):
    text, value, numbers = tree
    found = evaluate(text) if len(text) <= 200 else None
    expected = (value, tuple(sorted(numbers))) if value is not None and len(text) <= 200 else None
    assert found == expected


@given(st.lists(st.integers(0, 99), min_size=1, max_size=12), st.data())
def test_precedence_without_brackets(numbers, data):
    signs = [data.draw(st.sampled_from("+-*")) for _ in numbers[1:]]
    text = str(numbers[0]) + "".join(f"{sign}{n}" for sign, n in zip(signs, numbers[1:], strict=True))
    total, term, sign_of_term = 0, numbers[0], 1
    for sign, n in zip(signs, numbers[1:], strict=True):
        if sign == "*":
            term *= n
        else:
            total += sign_of_term * term
            term, sign_of_term = n, 1 if sign == "+" else -1
    assert evaluate(text) == (total + sign_of_term * term, tuple(sorted(numbers)))


@pytest.mark.parametrize(
    "text, value",
    [
        ("8-3-2", 3),
        ("16/4/2", 2),
        ("2+3*4", 14),
        ("(2+3)*4", 20),
        ("7/2", Fraction(7, 2)),
        ("2*(3)", 6),
        ("1 + 2", 3),
        ("6×7", 42),
        ("8÷2", 4),
        ("9−4", 5),
        ("((((5))))", 5),
        ("0*5", 0),
    ],
)
def test_value(text, value):
    assert evaluate(text)[0] == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "+",
        "-3",
        "+3",
        "2--3",
        "2+-3",
        "--2",
        "2**3",
        "7//2",
        "1e1",
        "1.5",
        "2(3)",
        "(2)(3)",
        "2 3",
        "()",
        "(2",
        "2)",
        "1/0",
        "5/(3-3)",
        "٣+٤",
        "２+３",
        "²",
        "2^3",
        "5%3",
        "x",
        "02+3",
        "0x10",
        "1_000",
        "3!",
        "abs(3)",
        "1000000",
        "2,3",
        "3+",
        "*3",
        "a=3",
        "3\n+4",
        "3\t+4",
        "\x00",
        "__import__('os')",
        "9" * 300,
        "(" * 25 + "1" + ")" * 25,
        "1+" * 120 + "1",
    ],
)
def test_refused(text):
    assert evaluate(text) is None


@pytest.mark.parametrize("size", [10**3, 10**5, 10**6])
@pytest.mark.parametrize(
    "piece", ["(", ")", "9", "-", "1+", "\\boxed{", "{", "}", "answer:", "=", ",", " ", "\\frac{1}{"]
)
def test_huge_input_is_refused_whole(piece, size):
    """Limits are checked before any work that grows faster than the text."""
    text = piece * (size // len(piece))
    assert evaluate(text) is None
    for problem in PROBLEMS:
        assert not verify(problem, text)
        assert not verify(problem, problem.answer + text + "?")


@given(st.text(max_size=60))
def test_any_text_is_judged_without_error(text):
    for problem in PROBLEMS:
        assert verify(problem, text) in (True, False)
    evaluate(text)


@given(st.text(alphabet="0123456789-+*/()=., \\boxed{}frac:Answer−", max_size=40))
def test_near_answers_are_judged_without_error(text):
    for problem in PROBLEMS:
        assert verify(problem, text) in (True, False)


@given(st.fractions(max_denominator=10**6).filter(lambda f: abs(f) < 10**20))
def test_numbers_read_back(number):
    assert parse_number(str(number), "rational") == number
    assert parse_number(str(number).replace("-", "−"), "rational") == number
    assert (parse_number(str(number), "whole") is None) == (number.denominator != 1)


@given(st.decimals(-(10**6), 10**6, places=4).filter(lambda d: d != 0))
def test_decimals_read_back(number):
    assert parse_number(format(number, "f"), "decimal") == Fraction(number)


@pytest.mark.parametrize(
    "text, answer",
    [
        ("5", "5"),
        (" 5. ", "5"),
        ("Answer: 5", "5"),
        ("So 4. answer: 5.", "5"),
        ("\\boxed{5}", "5"),
        ("", ""),
        ("\\boxed{4} no, \\boxed{5}", "5"),
        ("\\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{5", ""),
        ("\\boxed{}", ""),
        ("The result is \\boxed{-3}, as 3 - 6 = -3.", "-3"),
        ("x" * 1001, ""),
        ("\\boxed{5}" + " " * 10**5, ""),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer
