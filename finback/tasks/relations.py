"""Chained relations: "A is taller than B ..." in shuffled order; who is tallest, second, in the middle."""

import random
import re
from itertools import pairwise

from finback.tasks.base import Problem, Task, casual, final_answer, same_words
from finback.tasks.words import NAMES

#: more, most, less, least, and the plain word of "not as tall as"
RELATIONS = (
    ("taller", "tallest", "shorter", "shortest", "tall"),
    ("older", "oldest", "younger", "youngest", "old"),
    ("faster", "fastest", "slower", "slowest", "fast"),
    ("heavier", "heaviest", "lighter", "lightest", "heavy"),
    ("stronger", "strongest", "weaker", "weakest", "strong"),
    ("richer", "richest", "poorer", "poorest", "rich"),
)
COUNTS = {1: (3, 3), 2: (4, 4), 3: (5, 5), 4: (6, 7), 5: (8, 10)}
ORDINALS = ("", "second ", "third ")
PLACE_FORMS = (
    "Who is the {w}?",
    "Who is {w}?",
    "Which of them is the {w}?",
    "Name the {w} person.",
    "So who is the {w}?",
)
MIDDLE_FORMS = (
    "Who is in the middle?",
    "Who stands in the middle when they are ordered by this?",
    "Who is the middle one?",
)
TRUTH_FORMS = ("Is {a} {w} than {b}?", "Is {a} {w} than {b}? Answer yes or no.", "Yes or no: is {a} {w} than {b}?")
ORDER_FORMS = (
    "Order them from {m} to {l}.",
    "List everyone from {m} to {l}.",
    "Rank them, {m} first.",
    "Who comes where, from {m} to {l}?",
)


class Relations(Task):
    name = "relations"
    description = "5 people compared pair by pair (taller, older, faster, ...): who is where in the order"

    def generate(self, rng: random.Random, difficulty: int) -> Problem:
        people = rng.sample(NAMES, rng.randint(*COUNTS[difficulty]))
        words = rng.choice(RELATIONS)
        facts = list(pairwise(people))
        rng.shuffle(facts)
        told = [_fact(rng, more, less, words) for more, less in facts]
        asked, query, answer, tail = _ask(rng, people, words)
        text = " ".join(f"{fact}." for fact in told) if rng.random() < 0.8 else ", ".join(told) + "."
        question = f"{asked} {text}" if rng.random() < 0.1 else f"{text} {casual(rng, asked, lower=False)}"
        # Neither the order of the facts nor the wording is content: the order of the people and the query are.
        key = f"{words[0]}|{'>'.join(people)}|{query}"
        reasoning = "\n".join([*_chain(people, facts), tail])
        return self.problem(difficulty, question, reasoning, answer, key, {"answer": answer})

    def verify(self, problem: Problem, response: str) -> bool:
        return same_words(re.sub(r", ?", ", ", final_answer(response)), problem.data["answer"])


def _fact(rng: random.Random, more: str, less: str, words: tuple[str, ...]) -> str:
    style = rng.random()
    if style < 0.5:
        return f"{more} is {words[0]} than {less}"
    if style < 0.9:
        return f"{less} is {words[2]} than {more}"
    return f"{less} is not as {words[4]} as {more}"


def _chain(people: list[str], facts: list[tuple[str, str]]) -> list[str]:
    """The facts as A > B, the same turned round, a walk up from the first fact to the top, and the chain down."""
    top = people.index(facts[0][0])
    return [
        ", ".join(f"{more} > {less}" for more, less in facts),
        ", ".join(f"{less} < {more}" for more, less in facts),
        "up: " + " < ".join(reversed(people[: top + 1])),
        "down: " + " > ".join(people),
    ]


def _ask(rng: random.Random, people: list[str], words: tuple[str, ...]) -> tuple[str, str, str, str]:
    """The question, the same without its wording, the answer and the last line of the reasoning."""
    style = rng.random()
    if style < 0.5:
        place = rng.randrange(min(3, len(people) - 1)) if rng.random() < 0.5 else 0
        from_top = rng.random() < 0.5
        wanted = ORDINALS[place] + (words[1] if from_top else words[3])
        answer = people[place] if from_top else people[-1 - place]
        return rng.choice(PLACE_FORMS).format(w=wanted), wanted, answer, f"{wanted}: {answer}"
    if style < 0.6 and len(people) % 2:
        answer = people[len(people) // 2]
        return rng.choice(MIDDLE_FORMS), "middle", answer, f"middle: {answer}"
    if style < 0.8:
        return _truth(rng, people, words)
    down = rng.random() < 0.5
    most, least = (words[1], words[3]) if down else (words[3], words[1])
    answer = ", ".join(people if down else reversed(people))
    return rng.choice(ORDER_FORMS).format(m=most, l=least), f"{most} first", answer, f"{most} first: {answer}"


def _truth(rng: random.Random, people: list[str], words: tuple[str, ...]) -> tuple[str, str, str, str]:
    """Walk down from the one who is said to be more; yes if the other is met."""
    a, b = rng.sample(people, 2)
    more = rng.random() < 0.5
    upper, lower = (a, b) if more else (b, a)
    start, met = people.index(upper), people.index(lower)
    answer = "yes" if start < met else "no"
    walk = people[start : met + 1] if start < met else people[start:]
    asked = rng.choice(TRUTH_FORMS).format(a=a, b=b, w=words[0] if more else words[2])
    return asked, f"{upper}>{lower}?", answer, f"{upper} > {lower}: {' > '.join(walk)}: {answer}"
