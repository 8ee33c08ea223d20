"""Speculation: acceptance, tokens a step and speed with and without, in turn, the same tokens.

    python benchmarks/engine_speculation.py --out results/engine/speculation                    (calf: MTP and n-grams)
    python benchmarks/engine_speculation.py --checkpoint M --out results/engine/speculation-M   (synthetic drafts)

calf answers held-out questions of its tasks with its own MTP module (one and two tokens) and with n-grams, one request
at a time and eight together, greedy. A checkpoint of random weights has nothing to guess with, and in bfloat16 its
near-ties fall otherwise in a pass of two tokens: there the tokens are prescribed by a mask, on both sides, and a
synthetic drafter says the next one rightly with probability 0.5, 0.8 and 1.0. `adaptive` off: what drafting costs where
it does not pay is shown; the last line has it on.
"""

import argparse
import random
import time
from pathlib import Path

from engine_common import keep_memory, random_ids, spread, write

keep_memory()

import statistics  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

import finback  # noqa: E402
from finback.engine import Engine, Options, Sampling  # noqa: E402
from finback.engine.speculate import room, wants  # noqa: E402


class Prescribed:
    """In a grammar's place: allows nothing but the next of `ids`."""

    def __init__(self, ids: list[int], vocab_size: int) -> None:
        self.ids, self.vocab_size, self.place = ids, vocab_size, 0

    def mask(self) -> np.ndarray:
        allowed = np.zeros(self.vocab_size, dtype=bool)
        allowed[self.ids[self.place]] = True
        return allowed

    def accept(self, token: int) -> None:
        self.place += 1


class Synthetic:
    """Says the next prescribed token rightly with probability `rate`."""

    layers = 0

    def __init__(self, rate: float) -> None:
        self.rate, self.random = rate, random.Random(0)

    def draft(self, advances) -> None:
        for request in (advance.request for advance in advances):
            if wants(request) and room(request) > 0:
                right = request._grammar.ids[request._grammar.place]
                request.drafts = [right if self.random.random() < self.rate else right + 1]


def run(model, prompts: list, sampling: Sampling, rows: int, drafter=None, prescribe=False, **options) -> dict:
    """All prompts through one engine: tokens by prompt, seconds of the steps that decode, counters."""
    engine = Engine(model, max_batch=rows, options=Options(prefix_cache=False, **options), drafter=drafter)
    waiting, seconds, tokens, steps = list(reversed(prompts)), 0.0, 0, 0
    said = {}
    while waiting or engine.busy:
        group = [engine.submit(waiting.pop(), sampling) for _ in range(min(rows, len(waiting)))]
        for number, request in enumerate(group if prescribe else []):
            ids = random_ids(sampling.max_tokens, model.config.vocab_size - 1, 90 + number)
            request._grammar = Prescribed(ids, model.config.vocab_size)
        while not all(request.choices for request in group):
            engine.step()
        before = sum(len(request.choices) for request in group)
        start = time.perf_counter()
        while not all(request.done for request in group):
            engine.step()
            steps += 1
        seconds += time.perf_counter() - start
        tokens += sum(len(request.choices) for request in group) - before
        said |= {tuple(request.ids[: request.prompt_tokens]): request.ids for request in group}
    stats = engine.stats()
    rate = {"tokens_per_s": tokens / seconds, "tokens_per_step": tokens / max(steps, 1)}
    return {"said": said, "acceptance": stats.acceptance, "drafted": stats.drafted, **rate}


def compare(
    model, prompts: list, sampling: Sampling, rows: int, settings: dict, rounds: int, prescribe: bool = False
) -> tuple[list[str], list]:
    """Every setting in turn with plain decoding; a line each."""
    log = []
    for number in range(rounds + 1):
        plain = None
        for name, options in ({"plain": {}} | settings).items():
            result = run(model, prompts, sampling, rows, prescribe=prescribe, **options)
            plain = plain or result
            same = result["said"] == plain["said"]
            entry = {"round": number, "rows": rows, "setting": name, "same": same}
            entry |= {key: result[key] for key in ("tokens_per_s", "tokens_per_step", "acceptance", "drafted")}
            entry["ratio"] = result["tokens_per_s"] / plain["tokens_per_s"]
            log += [entry] if number else []
    lines = []
    for name in settings:
        own = [entry for entry in log if entry["setting"] == name]
        acceptance = own[0]["acceptance"]
        lines.append(
            f"| {rows} | {name} | {'–' if acceptance is None else f'{acceptance:.2f}'} "
            f"| {statistics.median(e['tokens_per_step'] for e in own) / rows:.2f} "
            f"| {spread([e['tokens_per_s'] for e in own])} | **{spread([e['ratio'] for e in own], 2)}x** "
            f"| {'yes' if all(e['same'] for e in own) else 'NO'} |"
        )
        print(lines[-1], flush=True)
    return lines, log


def of_calf(args: argparse.Namespace) -> tuple[str, list[str], list]:
    from finback.tasks import TASKS, sample
    from finback.text import prompt_ids

    model, tokenizer = finback.load("calf", "float32"), finback.load_tokenizer("calf")
    problems = [problem for task in TASKS for problem in sample(task, 7, args.n, split="held_out")]
    prompts = [prompt_ids(tokenizer, [{"role": "user", "content": p.question}]) for p in problems]
    prompts = [ids for ids in prompts if len(ids) < 200]
    sampling = Sampling(temperature=0, max_tokens=200, stop_ids=tuple(tokenizer.eos_ids))
    settings = {
        "MTP, 1 token": {"speculate": "mtp", "adaptive": False},
        "MTP, 2 tokens": {"speculate": "mtp", "draft_tokens": 2, "adaptive": False},
        "n-gram": {"speculate": "ngram", "adaptive": False},
        "MTP, adaptive": {"speculate": "mtp"},
    }
    lines, log = [], []
    for rows in (1, 8):
        more, entries = compare(model, prompts, sampling, rows, settings, args.rounds)
        lines, log = lines + more, log + entries
    return f"calf (float32), {len(prompts)} held-out questions, greedy", lines, log


def of_checkpoint(args: argparse.Namespace) -> tuple[str, list[str], list]:
    model = finback.load(args.checkpoint)
    sampling = Sampling(temperature=0, max_tokens=49, ignore_eos=True)
    lines, log = [], []
    for rows in (1, 8):
        prompts = [random_ids(128, model.config.vocab_size, 1 + row) for row in range(rows)]
        settings = {f"synthetic {rate}": {"drafter": Synthetic(rate), "adaptive": False} for rate in (0.5, 0.8, 1.0)}
        settings["synthetic 0.5, adaptive"] = {"drafter": Synthetic(0.5)}
        more, entries = compare(model, prompts, sampling, rows, settings, args.rounds, prescribe=True)
        lines, log = lines + more, log + entries
    return f"{args.checkpoint.name} (BF16, random weights), 48 prescribed tokens after 128", lines, log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--n", type=int, default=3, help="questions of each task")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    title, lines, log = of_calf(args) if args.checkpoint is None else of_checkpoint(args)
    head = "| rows | drafts | accepted | new tokens a step over rows | tok/s | against plain | same tokens |"
    write(args.out, "\n".join([title, "", head, "|---|---|---|---|---|---|---|", *lines]), log)


if __name__ == "__main__":
    main()
