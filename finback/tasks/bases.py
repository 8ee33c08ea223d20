"""Number bases 2 to 16: to decimal by Horner's rule, from decimal by repeated long division."""

import random
import re

from finback.tasks import worked
from finback.tasks.base import Problem, Task, casual, final_answer

FORMS = (
    "Convert {n} from base {f} to base {t}.",
    "What is {n} from base {f} in base {t}?",
    "Write the base {f} number {n} in base {t}.",
    "{n} in base {f} is what in base {t}?",
    "Change {n} (base {f}) to base {t}.",
    "What is {n} (base {f}) in base {t}?",
    "Express {n} in base {t}; it is written in base {f}.",
    "base {f} to base {t}: {n}",
    "{n} base {f} to base {t}",
    "Translate the number {n} from base {f} into base {t}.",
)
DIGITS = "0123456789ABCDEF"
BASES = {1: (2, 3, 4, 5, 6), 2: (2, 3, 4, 5, 6, 7, 8, 9)}
ALL_BASES = (2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16)
LONGEST = {1: 3, 2: 3, 3: 4, 4: 4, 5: 6}


class Bases(Task):
    name = "bases"
    description = "convert a number of up to 4 digits between base 10 and another base from 2 to 16"

    def generate(self, rng: random.Random, difficulty: int) -> Problem:
        bases = BASES.get(difficulty, ALL_BASES)
        base = rng.choice(bases)
        length = rng.choice((1, 2, 2, 3, 3, 3)) if LONGEST[difficulty] == 3 else rng.randint(2, LONGEST[difficulty])
        value = rng.randrange(base ** (length - 1), base**length)
        source, target = (base, 10) if rng.random() < 0.5 else (10, base)
        if difficulty >= 4:
            source, target = base, rng.choice([other for other in bases if other != base])
        number, answer = to_base(value, source), to_base(value, target)
        lines = [f"{number} base {source} to {target}"]
        lines += horner(number, source) if source != 10 else []
        lines += divide(value, target) if target != 10 else []
        question = casual(rng, rng.choice(FORMS).format(n=number, f=source, t=target))
        key = f"{source}|{target}|{number}"
        data = {"number": number, "bases": [source, target]}
        return self.problem(difficulty, question, "\n".join(lines), answer, key, data)

    def verify(self, problem: Problem, response: str) -> bool:
        source, target = problem.data["bases"]
        text = final_answer(response)
        if not re.fullmatch(r"0|[1-9A-Fa-f][0-9A-Fa-f]{0,29}", text, re.ASCII):
            return False
        digits = [DIGITS.index(digit) for digit in text.upper()]
        if max(digits) >= target:
            return False
        value = 0
        for digit in digits:
            value = value * target + digit
        return value == int(problem.data["number"], source)


def to_base(value: int, base: int) -> str:
    text = ""
    while value >= base:
        value, digit = divmod(value, base)
        text = DIGITS[digit] + text
    return DIGITS[value] + text


def horner(number: str, base: int) -> list[str]:
    """value * base + next digit, by columns; a base above 10 is split into its ten and its units."""
    digits = [DIGITS.index(digit) for digit in number]
    lines, value = ["digits: " + " ".join(map(str, digits))], digits[0]
    for digit in digits[1:]:
        if base < 10:
            lines.append(worked.times_digit(value, base, digit))
        else:
            lines.append(f"{value}*{base}+{digit}")
            lines.append(worked.times_digit(value, base - 10, digit))
            lines.append(worked.addition(value * (base - 10) + digit, value * 10))
        value = value * base + digit
    return lines


def divide(value: int, base: int) -> list[str]:
    """Divide by the base until less than it is left; the last quotient and the remainders backwards are the digits."""
    lines, rests = [], []
    while value >= base:
        lines.append(worked.division(value, base))
        value, rest = divmod(value, base)
        rests.append(rest)
    digits = [value, *reversed(rests)]
    return [*lines, f"digits: {' '.join(map(str, digits))} -> {''.join(DIGITS[d] for d in digits)}"]
