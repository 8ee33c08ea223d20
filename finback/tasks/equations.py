"""Linear equations a x + b = c x + d with one exact rational solution in lowest terms."""

import random
from fractions import Fraction
from math import gcd

from finback.tasks import worked
from finback.tasks.base import Problem, Task, casual, final_answer, parse_number

FORMS = (
    "Solve {e} for {v}.",
    "Solve for {v}: {e}",
    "Solve {e}",
    "Solve the equation {e}.",
    "Find {v}: {e}",
    "Find {v} if {e}.",
    "What is {v} if {e}?",
    "If {e}, what is {v}?",
    "{e}",
    "{e}, {v} = ?",
    "For which {v} is {e}?",
    "Determine {v} such that {e}.",
    "What value of {v} makes {e} true?",
)
LARGEST = {1: 9, 2: 12, 3: 20, 4: 60, 5: 12}


class Equations(Task):
    name = "equations"
    description = "linear equations a x + b = c x + d with coefficients up to 20 in size; a whole or rational solution"

    def generate(self, rng: random.Random, difficulty: int) -> Problem:
        variable = "x" if rng.random() < 0.8 else rng.choice("yzntk")
        a, b, c, d = coefficients = _coefficients(rng, difficulty)
        lines: list[str] = []
        left = _side(rng, a, b, variable)
        if difficulty == 5:
            factor, inner = (
                rng.choice([f for f in range(-9, 10) if f not in (0, 1)]),
                rng.randint(1, 9) * rng.choice((-1, 1)),
            )
            left, lines = _bracket(factor, inner, a, b, variable)
            coefficients = a, b, c, d = a + factor, b + factor * inner, c, d
        if a == c:
            return self.generate(rng, difficulty)
        right = _side(rng, c, d, variable)
        lines += solve(a, b, c, d, variable)
        spaced = rng.random() < 0.75
        equation = f"{left} = {right}" if spaced else f"{left}={right}".replace(" ", "")
        question = casual(rng, rng.choice(FORMS).format(e=equation, v=variable), lower=False)
        answer = str(Fraction(d - b, a - c))
        written = f"{left} = {right}".replace(variable, "x")
        key = written if difficulty == 5 else f"{a}x{b:+d}={c}x{d:+d}"
        return self.problem(difficulty, question, "\n".join(lines), answer, key, {"coefficients": list(coefficients)})

    def verify(self, problem: Problem, response: str) -> bool:
        a, b, c, d = problem.data["coefficients"]
        return parse_number(final_answer(response, r"[a-z] *= *"), "rational") == Fraction(d - b, a - c)


def _coefficients(rng: random.Random, level: int) -> tuple[int, int, int, int]:
    """About half with a whole solution. Level 1 has no x on the right."""
    top = LARGEST[level]
    a, b = rng.randint(-top, top), rng.randint(-top, top)
    c = 0 if level == 1 else rng.randint(-top, top)
    d = rng.randint(-top, top)
    if a != c and (level <= 2 or rng.random() < 0.5):
        # Only such x are drawn for which some b and d within the range exist.
        reach = 2 * top // abs(a - c)
        step = (a - c) * rng.randint(-reach, reach)
        b = rng.randint(max(-top, -top - step), min(top, top - step))
        d = b + step
    return (a, b, c, d) if a != c else _coefficients(rng, level)


def _term(number: int, variable: str) -> str:
    return {1: "", -1: "-"}.get(number, str(number)) + variable


def _plus(first: str, second: str) -> str:
    return f"{first} - {second[1:]}" if second.startswith("-") else f"{first} + {second}"


def _side(rng: random.Random, number: int, constant: int, variable: str) -> str:
    if number == 0:
        return str(constant)
    if constant == 0:
        return _term(number, variable)
    parts = _term(number, variable), str(constant)
    return _plus(parts[1], parts[0]) if rng.random() < 0.15 else _plus(parts[0], parts[1])


def _bracket(factor: int, inner: int, a: int, b: int, variable: str) -> tuple[str, list[str]]:
    """`f(x + g) + a x + b` and the lines that multiply it out and collect its terms."""
    opened = f"{_term(factor, '')}({_plus(variable, str(inner))})"
    left = _plus(_plus(opened, _term(a, variable)), str(b)) if a else _plus(opened, str(b))
    lines = [
        f"{factor}*{inner} = {factor * inner}",
        f"{variable}: {factor}{a:+d}: {worked.signed_sum(factor, a)}",
        f"numbers: {factor * inner}{b:+d}: {worked.signed_sum(factor * inner, b)}",
    ]
    return left, lines


def solve(a: int, b: int, c: int, d: int, v: str) -> list[str]:
    """Collect the x terms and the numbers by columns, then the fraction in lowest terms by Euclid."""
    m, n = a - c, d - b
    lines = [
        f"{a}{v}{b:+d} = {c}{v}{d:+d}",
        f"{v}: {a}{-c:+d}: {worked.signed_sum(a, -c)}",
        f"numbers: {d}{-b:+d}: {worked.signed_sum(d, -b)}",
        f"{m}{v} = {n}",
    ]
    if m < 0:
        m, n = -m, -n
        lines.append(f"{m}{v} = {n}")
    if n and m > 1:
        divisor = gcd(m, n)
        lines += [worked.euclid(abs(n), m), f"{abs(n)}/{divisor}={abs(n) // divisor} {m}/{divisor}={m // divisor}"]
    lines.append(f"{v} = {Fraction(n, m)}")
    return lines
