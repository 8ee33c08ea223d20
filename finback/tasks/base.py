"""What a task is: a problem, its worked chain of thought, and an exact verifier. Pure Python, no torch."""

import hashlib
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from finback.errors import UserError

LEVELS = range(1, 6)
HELD_OUT_SHARE = 0.05
LONGEST_RESPONSE = 100_000
LONGEST_ANSWER = 1_000


@dataclass(frozen=True)
class Problem:
    """One question with its worked reasoning and one right answer.

    `key` is the content without the phrasing: two problems with one key are the same problem, and the split between
    training and held-out problems hashes it. `data` is what the verifier needs, plain JSON values.
    """

    task: str
    difficulty: int
    question: str
    reasoning: str
    answer: str
    key: str
    data: dict


class Task(ABC):
    """A family of problems with a difficulty dial from 1 to 5; `default` is the level that scores are quoted at."""

    name: str
    description: str
    default: int = 3

    @abstractmethod
    def generate(self, rng: random.Random, difficulty: int) -> Problem:
        """Draw one problem; the same state of `rng` gives the same problem."""

    @abstractmethod
    def verify(self, problem: Problem, response: str) -> bool:
        """Whether `response`, the text after the thinking, gives a right answer. Exact, never raises, bounded work."""

    def held_out(self, key: str) -> bool:
        """Whether the problem with this key is kept away from training."""
        return hashed_out(f"{self.name}:{key}", HELD_OUT_SHARE)

    def problem(self, level: int, question: str, reasoning: str, answer: str, key: str, data: dict) -> Problem:
        return Problem(self.name, level, question, reasoning, answer, key, data)


def hashed_out(text: str, share: float) -> bool:
    """A fixed pseudo-random choice of about `share` of all texts, by SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < share * 2**64


def check_level(name: str, difficulty: int) -> int:
    if difficulty not in LEVELS:
        raise UserError(f"difficulty {difficulty!r} of task {name} does not exist: use {LEVELS[0]} to {LEVELS[-1]}")
    return difficulty


def casual(rng: random.Random, text: str, lower: bool = True) -> str:
    """People leave out the final mark or the first capital: so does one question in five each."""
    if rng.random() < 0.2:
        text = text.rstrip("?.! ")
    # A capital that no small letter follows is no first word: `AE base 15`.
    if lower and rng.random() < 0.2 and text[1:2].islower():
        text = text[0].lower() + text[1:]
    return text


def pick_length(rng: random.Random, longest: int) -> int:
    """A whole number of 1 to `longest` digits, each length equally likely."""
    digits = rng.randint(1, longest)
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def join_words(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + " and " + words[-1]


def final_answer(response: str, before: str = "") -> str:
    r"""The final answer inside a response, or "" when there is none.

    The content of the last `\boxed{...}` if there is one; otherwise the whole text, or what follows its last
    "Answer:". What matches the pattern `before` is dropped from its front ("x ="), and one period from its end.
    """
    if len(response) > LONGEST_RESPONSE:
        return ""
    start = response.rfind("\\boxed{")
    if start >= 0:
        text = _braced(response, start + len("\\boxed{"))
    else:
        text = re.split(r"answer:", response, flags=re.IGNORECASE)[-1]
    text = text.strip()
    if len(text) > LONGEST_ANSWER:
        return ""
    text = re.sub(f"^(?:{before})", "", text)
    return text[:-1].rstrip() if text.endswith(".") else text


def same_words(text: str, answer: str) -> bool:
    """Equal but for the case of ASCII letters (lower() alone would take a Kelvin sign for a k)."""
    return text.isascii() and text.lower() == answer.lower()


def _braced(text: str, start: int) -> str:
    depth = 1
    for place in range(start, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return text[start:place]
    return ""


_WHOLE = r"(?:0|[1-9][0-9]{0,29})"
_NUMBER = re.compile(rf"([-−]?)(?:({_WHOLE})(?:/([1-9][0-9]{{0,29}})|\.([0-9]{{1,30}}))?)")
_FRACTION = re.compile(rf"([-−]?)\\[dt]?frac\{{({_WHOLE})\}}\{{([1-9][0-9]{{0,29}})\}}()")


def parse_number(text: str, form: Literal["whole", "decimal", "rational"]) -> Fraction | None:
    r"""The value of one plain number of at most 30 digits a part, or None where the text is not one of that form.

    Whole: "-3". Decimal: also "2.5". Rational: also "5/2" and "\frac{5}{2}". Never a number: a plus sign, "-0", leading
    zeros, exponents, digits of other scripts, thousands separators.
    """
    match = _NUMBER.fullmatch(text) or _FRACTION.fullmatch(text)
    if match is None:
        return None
    sign, whole, denominator, places = match.groups()
    if (denominator and form != "rational") or (places and form == "whole"):
        return None
    value = Fraction(f"{whole}.{places}") if places else Fraction(int(whole), int(denominator or 1))
    if sign and value == 0:
        return None
    return -value if sign else value
