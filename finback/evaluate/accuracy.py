"""How often a model is right: greedy pass@1 on problems that training never sees."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finback.engine import Completion, Engine, Sampling
from finback.errors import UserError
from finback.paths import atomic_file, check_writable
from finback.progress import bar
from finback.tasks import TASKS, Problem, sample, verify
from finback.text import prompt_ids
from finback.weights import load, load_tokenizer

_Z = 1.959963984540054  # the standard normal's 97.5th percentile
Graded = tuple[Problem, Completion, bool]


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927), which stays inside [0, 1] and is honest near its ends."""
    assert 0 <= successes <= n > 0, f"{successes} of {n}"
    share, z2 = successes / n, _Z * _Z
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # The ends are exact: rounding must not leave 3e-17 of them.
    return centre - half if successes else 0.0, centre + half if successes < n else 1.0


def evaluate(
    model: str | Engine,
    tasks: Sequence[str] | None = None,
    n: int = 500,
    seed: int = 0,
    *,
    name: str | None = None,
    difficulty: int | None = None,
    think: bool = True,
    max_tokens: int | None = None,
    batch: int = 64,
    dtype: str = "auto",
    quantize: str | None = None,
    force: bool = False,
    expert_memory: int | None = None,
    records: Path | None = None,
) -> dict[str, Any]:
    """Greedy pass@1 on `n` held-out problems of each task (None: all), the same problems for the same seed.

    `model`: a name or path, loaded here as `dtype`, `quantize` and `expert_memory` say, with `batch` rows, or an engine
    (then `name` is what the result calls it). `max_tokens`: at most so many new tokens, as far as the context has room
    (None: all). Returns {"model", "seed", "tasks": {NAME: {"n", "pass@1", "low", "high"}}} with 95 % Wilson intervals,
    and "experts" where they stay on disk (`HotExperts.stats`); `records` gets one JSON line a problem. Raises UserError
    for an unknown task, n < 1, or a model without a tokenizer.
    """
    if records is not None:
        check_writable(records)  # before the work, not after it
    names = list(dict.fromkeys(tasks or TASKS))
    if n < 1:
        raise UserError(f"n is {n}; it must be at least 1")
    problems = [problem for task in names for problem in sample(task, seed, n, split="held_out", difficulty=difficulty)]
    if isinstance(model, Engine):
        engine, label = model, name or "model"
    else:
        loaded = load(model, dtype, quantize=quantize, force=force, expert_memory=expert_memory)
        engine, label = Engine(loaded, load_tokenizer(model), max_batch=batch), name or model
    graded = _grade(engine, problems, think, max_tokens)
    if records is not None:
        _write(records, graded)
    scores = {task: _score([g for g in graded if g[0].task == task]) for task in names}
    hot = engine.model.expert_cache
    return {"model": label, "seed": seed, "tasks": scores} | ({} if hot is None else {"experts": hot.stats()})


def _grade(engine: Engine, problems: Sequence[Problem], think: bool, max_tokens: int | None) -> list[Graded]:
    """Every problem with the model's completion and whether it is right, in the order given."""
    if engine.tokenizer is None:
        raise UserError("the engine to evaluate has no tokenizer; give Engine(model, tokenizer)")
    prompts = [prompt_ids(engine.tokenizer, [{"role": "user", "content": p.question}], think) for p in problems]
    rooms = [max(1, engine.context - len(prompt)) for prompt in prompts]
    limits = [room if max_tokens is None else min(room, max_tokens) for room in rooms]
    sampling = [Sampling(temperature=0, max_tokens=limit) for limit in limits]
    graded: list[Graded | None] = [None] * len(problems)
    right = 0
    with bar(len(problems), "problems") as progress:
        for completion in engine.generate(prompts, sampling):
            if completion.error is not None:
                raise UserError(completion.error)
            problem = problems[completion.index]
            correct = verify(problem, completion.text)
            graded[completion.index] = (problem, completion, correct)
            right += correct
            progress.advance(1, right=right)
    return [entry for entry in graded if entry is not None]


def _score(graded: Sequence[Graded]) -> dict[str, Any]:
    right = sum(correct for _, _, correct in graded)
    low, high = wilson(right, len(graded))
    return {"n": len(graded), "pass@1": right / len(graded), "low": round(low, 4), "high": round(high, 4)}


def _write(path: Path, graded: Sequence[Graded]) -> None:
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for problem, completion, correct in graded:
            record = {
                "task": problem.task,
                "difficulty": problem.difficulty,
                "question": problem.question,
                "expected": problem.answer,
                "answer": completion.text,
                "correct": correct,
                "reasoning": completion.reasoning,
                "finish_reason": completion.finish_reason,
                "completion_tokens": len(completion.token_ids),
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
