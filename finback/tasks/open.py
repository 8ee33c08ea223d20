"""Open questions: everything that is not one of the eight kinds gets one honest answer that says what calf can do."""

import random

from finback.tasks.base import Problem, Task, final_answer, hashed_out
from finback.tasks.open_data import SENTENCES, TEMPLATES, TOPICS
from finback.tasks.words import WORDS

ANSWER = (
    "I cannot answer that. I am calf, a small model for eight kinds of problems: arithmetic, decimals, "
    "counting letters, equations, sorting, number bases, comparing people and countdown. "
    'For anything else, load a larger model: finback ask --model PATH "..."'
)
REASONING = "This is not one of the kinds of problems I know."
HELD_OUT_SHARE = 0.1
BEFORE = ("hey, ", "Please: ", "ok ", "Hi! ", "um, ", "so ", "Question: ", "hello, ", "quick question: ", "Dear calf, ")
AFTER = (" please", " thanks", " Thank you!", " asap", " :)", "??", "...", " Explain briefly.", " in one sentence", "!")


class Open(Task):
    name = "open"
    description = "questions outside the eight kinds: an honest answer that says what this model can do"

    def generate(self, rng: random.Random, difficulty: int) -> Problem:
        style = rng.random()
        if style < 0.65:
            group, template = rng.choice(TEMPLATES)
            topic = rng.choice(TOPICS[group])
            text = template.replace("{t}", topic)
            while "{n}" in text:
                text = text.replace("{n}", str(rng.choice((rng.randint(2, 20), rng.randint(2, 999)))), 1)
        elif style < 0.92:
            template, topic = rng.choice(SENTENCES), "-"
            text = template
        else:
            template, topic = "nonsense", _nonsense(rng)
            text = topic
        question = _style(rng, text) if topic != text else text
        return self.problem(difficulty, question, REASONING, ANSWER, f"{template}|{topic}", {})

    def verify(self, problem: Problem, response: str) -> bool:
        return _normal(final_answer(response)) == _normal(ANSWER)

    def held_out(self, key: str) -> bool:
        """Whole templates and whole topics are held out, so a held-out question is never a trained one reworded."""
        template, _, topic = key.partition("|")
        new_topic = topic != "-" and hashed_out(f"open topic:{topic}", HELD_OUT_SHARE)
        return new_topic or (template != "nonsense" and hashed_out(f"open template:{template}", HELD_OUT_SHARE))


def _normal(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def _style(rng: random.Random, text: str) -> str:
    """As people type: with a greeting or thanks, without capitals or marks, shouting, with a slip of the finger."""
    if rng.random() < 0.1:
        text = rng.choice(BEFORE) + text[0].lower() + text[1:]
    if rng.random() < 0.1:
        text = text.rstrip("?.! ") + rng.choice(AFTER)
    if rng.random() < 0.2:
        text = text.rstrip("?.! ") or text
    style = rng.random()
    if style < 0.25:
        text = text.lower()
    elif style < 0.27:
        text = text.upper()
    if rng.random() < 0.08 and len(text) > 4:
        spot = rng.randrange(1, len(text) - 1)
        swapped = text[spot + 1] + text[spot] if rng.random() < 0.5 else text[spot + 1]
        text = text[:spot] + swapped + text[spot + 2 :]
    return text


def _nonsense(rng: random.Random) -> str:
    """A few unrelated words, letters without sense, or one word alone."""
    style = rng.random()
    if style < 0.4:
        return " ".join(rng.choices(WORDS, k=rng.randint(2, 6)))
    if style < 0.6:
        return rng.choice(WORDS)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 9))) for _ in range(rng.randint(1, 4))]
    return " ".join(words)
