"""Comparing decimals: 9.9 and 9.11, padded to the same places and compared digit by digit."""

import random
from fractions import Fraction

from finback.tasks.base import Problem, Task, casual, final_answer, join_words, parse_number, same_words
from finback.tasks.worked import compare

PAIR_FORMS = {
    "larger": (
        "Which is larger, {a} or {b}?",
        "Which is bigger: {a} or {b}?",
        "Which number is greater, {a} or {b}?",
        "What is larger, {a} or {b}?",
        "{a} or {b}, which one is larger?",
        "Tell me the larger of {a} and {b}.",
        "Compare {a} and {b}. Which is larger?",
        "Between {a} and {b}, which is the bigger number?",
        "bigger: {a} or {b}",
        "{a} vs {b}: which is higher?",
        "max of {a} and {b}",
    ),
    "smaller": (
        "Which is smaller, {a} or {b}?",
        "Which number is less, {a} or {b}?",
        "{a} or {b}, which one is smaller?",
        "Tell me the smaller of {a} and {b}.",
        "Compare {a} and {b}. Which is smaller?",
        "Between {a} and {b}, which is the smaller number?",
        "smaller: {a} or {b}",
        "{a} vs {b}: which is lower?",
        "min of {a} and {b}",
    ),
    "equal": (
        "Are {a} and {b} equal?",
        "Is {a} equal to {b}?",
        "Is {a} the same number as {b}?",
        "Do {a} and {b} have the same value?",
        "{a} = {b}, true? Say yes or no.",
        "are {a} and {b} the same?",
    ),
}
MANY_FORMS = {
    "larger": ("Which is the largest: {n}?", "What is the largest of {n}?", "Find the largest number: {n}."),
    "smaller": ("Which is the smallest: {n}?", "What is the smallest of {n}?", "Find the smallest number: {n}."),
    "ascending": ("Order from smallest to largest: {n}.", "Put {n} in increasing order.", "Sort {n}, smallest first."),
    "descending": ("Order from largest to smallest: {n}.", "Put {n} in decreasing order.", "Sort {n}, largest first."),
}


class Decimals(Task):
    name = "decimals"
    description = "which of two decimals of up to 4 places is larger or smaller, or are they equal"

    def generate(self, rng: random.Random, difficulty: int) -> Problem:
        if difficulty <= 3:
            return self._pair(rng, difficulty)
        kind = rng.choice(
            ("larger", "smaller") if difficulty == 4 else ("ascending", "descending", "larger", "smaller")
        )
        numbers = _several(rng, rng.randint(3, difficulty), signed=difficulty == 5)
        lines, ordered = _select(numbers, "larger" if kind in ("larger", "descending") else "smaller", kind)
        answer = ", ".join(ordered)
        question = casual(rng, rng.choice(MANY_FORMS[kind]).format(n=join_words(numbers)))
        key = f"{kind}|{'|'.join(sorted(numbers))}"
        return self.problem(difficulty, question, "\n".join(lines), answer, key, {"kind": kind, "numbers": numbers})

    def _pair(self, rng: random.Random, level: int) -> Problem:
        kind = rng.choices(("larger", "smaller", "equal"), (45, 30, 25))[0]
        a, b = _near(rng, {1: 1, 2: 2, 3: 4}[level], same=0.45 if kind == "equal" else 0.04)
        line, sign = _compare(a, b)
        answer = _verdict(kind, a, b, sign)
        question = casual(rng, rng.choice(PAIR_FORMS[kind]).format(a=a, b=b))
        data = {"kind": kind, "numbers": [a, b]}
        key = f"{kind}|{'|'.join(sorted((a, b)))}"
        return self.problem(level, question, f"{line}\n{kind}: {answer}", answer, key, data)

    def verify(self, problem: Problem, response: str) -> bool:
        text, kind = final_answer(response), problem.data["kind"]
        values = [Fraction(number) for number in problem.data["numbers"]]
        if kind == "equal":
            return same_words(text, "yes" if values[0] == values[1] else "no")
        if len(set(values)) == 1:
            return same_words(text, "equal")
        if kind in ("larger", "smaller"):
            return parse_number(text, "decimal") == (max(values) if kind == "larger" else min(values))
        parts = [parse_number(part.strip(" "), "decimal") for part in text.split(",")]
        return parts == sorted(values, reverse=kind == "descending")


def _verdict(kind: str, a: str, b: str, sign: str) -> str:
    if kind == "equal":
        return "yes" if sign == "=" else "no"
    if sign == "=":
        return "equal"
    return a if (sign == ">") == (kind == "larger") else b


def _near(rng: random.Random, places: int, same: float) -> tuple[str, str]:
    """Two decimals that are often close: the same whole part, one the beginning of the other, or one digit apart."""
    whole = (
        rng.randint(0, 9) if rng.random() < 0.6 else rng.randint(0, 99) if rng.random() < 0.8 else rng.randint(0, 999)
    )
    tail = "".join(rng.choices("0123456789", k=rng.randint(1, places)))
    if rng.random() < same:
        other = tail + "0" * rng.randint(0, places - len(tail)) if rng.random() < 0.8 else tail.rstrip("0")
        pair = [_decimal(whole, tail), _decimal(whole, other)]
        rng.shuffle(pair)
        return pair[0], pair[1]
    style = rng.random()
    other_whole = whole
    if style < 0.3 and len(tail) < places:
        other = tail + "".join(rng.choices("0123456789", k=rng.randint(1, places - len(tail))))
    elif style < 0.6:
        spot = rng.randrange(len(tail))
        other = tail[:spot] + rng.choice("0123456789") + tail[spot + 1 :]
    else:
        other = "".join(rng.choices("0123456789", k=rng.randint(1, places)))
        other_whole = whole if style < 0.85 else max(0, whole + rng.randint(-9, 9))
    pair = [_decimal(whole, tail), _decimal(other_whole, other)]
    rng.shuffle(pair)
    if Fraction(pair[0]) == Fraction(pair[1]):
        return _near(rng, places, same)
    return pair[0], pair[1]


def _decimal(whole: int, tail: str) -> str:
    return f"{whole}.{tail}" if tail else str(whole)


def _several(rng: random.Random, count: int, signed: bool) -> list[str]:
    numbers: list[str] = []
    while len(numbers) < count:
        for number in _near(rng, 4, 0.0):
            number = "-" + number if signed and rng.random() < 0.4 and Fraction(number) else number
            if all(Fraction(number) != Fraction(other) for other in numbers):
                numbers.append(number)
    return numbers[:count]


def _compare(a: str, b: str) -> tuple[str, str]:
    """`9.90 9.11: 9=9 9>1 -> 9.9>9.11` and the sign; for two negative numbers the sizes are compared, then turned."""
    if a.startswith("-") != b.startswith("-"):
        sign = "<" if a.startswith("-") else ">"
        return f"{a} {b}: signs -> {a}{sign}{b}", sign
    x, y = a.lstrip("-"), b.lstrip("-")
    (left, _, x_tail), (right, _, y_tail) = x.partition("."), y.partition(".")
    width, places = max(len(left), len(right)), max(len(x_tail), len(y_tail))
    dot = "." if places else ""
    x = left.zfill(width) + dot + x_tail.ljust(places, "0")
    y = right.zfill(width) + dot + y_tail.ljust(places, "0")
    steps, sign = compare(x, y)
    turn = ""
    if a.startswith("-"):
        turn, sign = " turn", {"<": ">", ">": "<", "=": "="}[sign]
    return f"{x} {y}: {steps}{turn} -> {a}{sign}{b}", sign


def _select(numbers: list[str], best: str, kind: str) -> tuple[list[str], list[str]]:
    """Pick the largest (or smallest) by comparing along the list; for an ordering, again on what is left."""
    left, ordered, lines = list(numbers), [], []
    while left:
        top = left[0]
        for other in left[1:]:
            line, sign = _compare(top, other)
            lines.append(line)
            top = _verdict(best, top, other, sign)
        lines.append(f"{best}: {top}")
        ordered.append(top)
        if kind in ("larger", "smaller"):
            break
        left.remove(top)
        if left:
            lines.append("left: " + " ".join(left))
    if len(ordered) > 1:
        lines.append("order: " + ", ".join(ordered))
    return lines, ordered
