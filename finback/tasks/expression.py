"""A small expression parser: whole numbers, + - * / and brackets, evaluated exactly. No eval, bounded work.

    sum     = product {("+" | "-") product}
    product = atom {("*" | "/") atom}
    atom    = number | "(" sum ")"

There is no unary sign, no power, no floor division, no decimal point and no implicit multiplication.
"""

import re
from fractions import Fraction

LONGEST = 200
DEEPEST = 20
_TOKEN = re.compile(r"[0-9]+|[-+*/()]", re.ASCII)
_NUMBER = re.compile(r"0|[1-9][0-9]{0,5}", re.ASCII)
_SIGNS = str.maketrans({"×": "*", "÷": "/", "−": "-"})


class _Refused(Exception):
    """The text is not an expression of this grammar, is too long or deep, or divides by zero."""


def evaluate(text: str) -> tuple[Fraction, tuple[int, ...]] | None:
    """The exact value and the sorted numbers used, or None for what the grammar and its limits refuse.

    At most 200 characters, 20 nested brackets, numbers of at most 6 digits. `×`, `÷` and `−` read as `*`, `/` and `-`.
    """
    if len(text) > LONGEST:
        return None
    try:
        parser = _Parser(text.translate(_SIGNS))
        value = parser.sum(0)
        parser.end()
    except (_Refused, ZeroDivisionError):
        return None
    return value, tuple(sorted(parser.numbers))


class _Parser:
    def __init__(self, text: str) -> None:
        self.tokens: list[str] = []
        self.numbers: list[int] = []
        self.place = 0
        position = 0
        while position < len(text):
            if text[position] == " ":
                position += 1
                continue
            match = _TOKEN.match(text, position)
            if match is None:
                raise _Refused
            self.tokens.append(match.group())
            position = match.end()

    def peek(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        self.place += 1
        return token

    def end(self) -> None:
        if self.peek():
            raise _Refused

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while self.peek() in ("+", "-"):
            value = value + self.product(depth) if self.take() == "+" else value - self.product(depth)
        return value

    def product(self, depth: int) -> Fraction:
        value = self.atom(depth)
        while self.peek() in ("*", "/"):
            value = value * self.atom(depth) if self.take() == "*" else value / self.atom(depth)
        return value

    def atom(self, depth: int) -> Fraction:
        token = self.take()
        if token == "(" and depth < DEEPEST:
            value = self.sum(depth + 1)
            if self.take() != ")":
                raise _Refused
            return value
        if not _NUMBER.fullmatch(token):
            raise _Refused
        self.numbers.append(int(token))
        return Fraction(int(token))
