"""Sorting whole numbers: pad, deal into groups by the first digit, read the groups off in order."""

import random
import re

from finback.tasks.base import Problem, Task, casual, final_answer, join_words, pick_length

FORMS = {
    "ascending": (
        "Sort {n} in ascending order.",
        "Sort these numbers: {n}",
        "Sort {n} from smallest to largest.",
        "Order the numbers {n} from low to high.",
        "Put {n} in increasing order.",
        "Arrange {n} from least to greatest.",
        "Sort ascending: {n}",
        "Please sort {n}, smallest first.",
        "{n} - sort from smallest to biggest",
        "What is {n} in sorted order?",
    ),
    "descending": (
        "Sort {n} in descending order.",
        "Sort these numbers from high to low: {n}",
        "Sort {n} from largest to smallest.",
        "Order the numbers {n} from high to low.",
        "Put {n} in decreasing order.",
        "Arrange {n} from greatest to least.",
        "Sort descending: {n}",
        "Please sort {n}, largest first.",
        "{n} - sort from biggest to smallest",
    ),
}
COUNTS = {1: (3, 4), 2: (4, 5), 3: (6, 6), 4: (7, 9), 5: (9, 12)}
DIGITS = {1: 2, 2: 3, 3: 3, 4: 4, 5: 5}


class Sorting(Task):
    name = "sorting"
    description = "sort 6 numbers up to 999, ascending or descending"

    def generate(self, rng: random.Random, difficulty: int) -> Problem:
        order = rng.choice(("ascending", "descending"))
        count, digits = rng.randint(*COUNTS[difficulty]), DIGITS[difficulty]
        if rng.random() < 0.8:
            numbers = [rng.randrange(10**digits) for _ in range(count)]
        else:
            numbers = [pick_length(rng, digits) for _ in range(count)]
        ordered = sorted(numbers, reverse=order == "descending")
        texts = [str(number) for number in numbers]
        shown = rng.choice((", ".join(texts), ", ".join(texts), " ".join(texts), join_words(texts)))
        question = casual(rng, rng.choice(FORMS[order]).format(n=shown))
        answer = ", ".join(map(str, ordered))
        key = f"{order}|{answer}"
        data = {"order": order, "numbers": numbers}
        return self.problem(difficulty, question, work(numbers, order), answer, key, data)

    def verify(self, problem: Problem, response: str) -> bool:
        text = final_answer(response)
        if not re.fullmatch(r"(0|[1-9][0-9]{0,8})(, ?(0|[1-9][0-9]{0,8}))*", text, re.ASCII):
            return False
        descending = problem.data["order"] == "descending"
        return [int(part) for part in text.split(",")] == sorted(problem.data["numbers"], reverse=descending)


def work(numbers: list[int], order: str) -> str:
    """Three lines: the numbers with leading zeros, dealt by their first digit, and in order."""
    width = len(str(max(numbers)))
    texts = [str(number).zfill(width) for number in numbers]
    digits = "0123456789" if order == "ascending" else "9876543210"
    groups = " ".join(f"{digit}:{' '.join(text for text in texts if text[0] == digit)}" for digit in digits)
    ordered = sorted(texts, reverse=order == "descending")
    return f"{order}: {' '.join(texts)}\n{groups}\n{' '.join(ordered)}"
