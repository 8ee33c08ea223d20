"""Counting letters: how many r's in strawberry; words from a list and made-up ones, spelled with a running count."""

import random
import string

from finback.tasks.base import Problem, Task, casual, final_answer, parse_number
from finback.tasks.words import WORDS

FORMS = (
    "How many {L}'s are in {w}?",
    "How many times does the letter {L} occur in {w}?",
    "How many {L}s are there in {w}?",
    "How often does {L} appear in the word {w}?",
    "Count the letter {L} in {w}.",
    "Count the {L}'s in the word {w}.",
    "number of {L} in {w}",
    "In {w}, how many times do you see the letter {L}?",
    "How many {L} are in {w}",
    "What is the number of {L}'s in {w}?",
    "Tell me how many {L}'s {w} has.",
    "How many of the letters of {w} are {L}?",
    "{w}: how many {L}'s?",
)
LENGTHS = {1: (3, 6), 2: (4, 8), 3: (4, 12), 4: (9, 18), 5: (4, 12)}
BY_LENGTH = {level: [w for w in WORDS if low <= len(w) <= high] for level, (low, high) in LENGTHS.items()}
VOWELS, CONSONANTS = "aeiou", "bcdfghklmnprstvwyz"
SYLLABLES = [c + v for c in CONSONANTS for v in VOWELS] + [
    c + v + e for c in CONSONANTS for v in VOWELS for e in "nrstl"
]


class Letters(Task):
    name = "letters"
    description = "how many times a letter occurs in a word of 4 to 12 letters, half of the words made up"

    def generate(self, rng: random.Random, difficulty: int) -> Problem:
        words = [_word(rng, difficulty) for _ in range(rng.randint(2, 3) if difficulty == 5 else 1)]
        text = " ".join(words)
        letter = rng.choice(string.ascii_lowercase) if rng.random() < 0.15 else rng.choice(text.replace(" ", ""))
        steps, count = [], 0
        for each in text.replace(" ", ""):
            count += each == letter
            steps.append(f"{each}{count}")
        reasoning = f"{letter}: {' '.join(steps)} -> {count}"
        question = _ask(rng, text, letter)
        data = {"letter": letter, "text": text}
        return self.problem(difficulty, question, reasoning, str(count), f"{letter}|{text}", data)

    def verify(self, problem: Problem, response: str) -> bool:
        return parse_number(final_answer(response), "whole") == problem.data["text"].count(problem.data["letter"])


def _ask(rng: random.Random, text: str, letter: str) -> str:
    shown = text.capitalize() if rng.random() < 0.05 else text
    mark = rng.choice(("", "", "", '"', "'")) if " " not in text else '"'
    sign = letter.upper() if rng.random() < 0.3 else letter
    sign = f'"{sign}"' if rng.random() < 0.1 else sign
    return casual(rng, rng.choice(FORMS).format(w=f"{mark}{shown}{mark}", L=sign), lower=False)


def _word(rng: random.Random, level: int) -> str:
    if rng.random() < 0.5:
        return rng.choice(BY_LENGTH[level])
    low, high = LENGTHS[level]
    length = rng.randint(low, high)
    if rng.random() < 0.5:
        made = ""
        while len(made) < length:
            made += rng.choice(SYLLABLES)
        return made[:length]
    # A small alphabet makes letters repeat, which is what is asked about.
    alphabet = rng.sample(string.ascii_lowercase, rng.randint(3, 8))
    return "".join(rng.choices(alphabet, k=length))
