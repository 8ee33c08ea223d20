"""Verifiable tasks and exact verifiers, and the honest answer to everything else. Pure Python, no torch."""

import random
from collections.abc import Iterator
from typing import Literal

from finback.errors import UserError
from finback.tasks.arithmetic import Arithmetic
from finback.tasks.base import Problem, Task, check_level
from finback.tasks.bases import Bases
from finback.tasks.countdown import Countdown
from finback.tasks.decimals import Decimals
from finback.tasks.equations import Equations
from finback.tasks.letters import Letters
from finback.tasks.open import Open
from finback.tasks.relations import Relations
from finback.tasks.sorting import Sorting

__all__ = ["TASKS", "Problem", "Split", "Task", "draw", "is_held_out", "sample", "task", "verify"]

Split = Literal["train", "held_out"]
TASKS: dict[str, Task] = {
    each.name: each
    for each in (
        Arithmetic(),
        Decimals(),
        Letters(),
        Equations(),
        Sorting(),
        Bases(),
        Relations(),
        Countdown(),
        Open(),
    )
}


def task(name: str) -> Task:
    """The task of this name; UserError names the ones there are."""
    if name not in TASKS:
        raise UserError(f"there is no task {name!r}: use one of {', '.join(TASKS)}")
    return TASKS[name]


def is_held_out(problem: Problem) -> bool:
    """Whether this problem, in any phrasing, is never trained on: decided by the SHA-256 of its key alone."""
    return TASKS[problem.task].held_out(problem.key)


def draw(name: str, rng: random.Random, split: Split, difficulty: int | None = None) -> Problem:
    """One problem of the split; problems of the other are thrown away. The default difficulty is the task's own."""
    chosen = task(name)
    level = check_level(name, chosen.default if difficulty is None else difficulty)
    while True:
        problem = chosen.generate(rng, level)
        if is_held_out(problem) == (split == "held_out"):
            return problem


def sample(
    name: str, seed: int, n: int, *, split: Split = "held_out", difficulty: int | None = None
) -> Iterator[Problem]:
    """`n` problems of a task, the same for the same (name, seed, split, difficulty)."""
    rng = random.Random(f"{name}/{seed}/{split}")
    for _ in range(n):
        yield draw(name, rng, split, difficulty)


def verify(problem: Problem, response: str) -> bool:
    """Whether `response`, the text after the thinking, answers the problem rightly."""
    return TASKS[problem.task].verify(problem, response)
