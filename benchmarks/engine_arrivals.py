"""A short prompt that arrives while a long one is computed: its time to first token beside an idle engine's.

    python benchmarks/engine_arrivals.py --checkpoint M --out results/engine/arrivals

A prompt of `--long` tokens is given to the engine, again and again until there are enough arrivals; prompts of 128
tokens arrive as a Poisson process while it is computed, one new token each. Time to first token counts from the
arrival, so it holds the rest of the step that was running. The idle time is measured before, in between and after. The
checkpoint's context is raised to 32,768 in a copy of its config.json. Goal: p95 at most 3 times the idle median.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

from engine_common import keep_memory, percentile, random_ids, spread, with_context, write

keep_memory()

import torch  # noqa: E402

import finback  # noqa: E402
from finback.engine import Engine, Options, Sampling  # noqa: E402

SHORT = 128
ONE = Sampling(max_tokens=1, temperature=0, ignore_eos=True)


def idle(engine: Engine, vocab_size: int, seed: int, count: int) -> list[float]:
    """Seconds to the first token of prompts that come alone."""
    times = []
    for number in range(count):
        start = time.perf_counter()
        engine.submit(random_ids(SHORT, vocab_size, seed + number), ONE)
        while engine.busy:
            engine.step()
        times.append(time.perf_counter() - start)
    return times


def under_load(engine: Engine, vocab_size: int, long: int, mean_s: float, seed: int, most_s: float):
    """Times to first token of those that arrive while a long prompt is computed, its seconds, and how far it came."""
    draw = random.Random(seed)
    start = time.perf_counter()
    whole = engine.submit(random_ids(long, vocab_size, seed), ONE)
    due = start + draw.expovariate(1 / mean_s)
    pending, times, count = [], [], 0
    while engine.busy:
        while due <= time.perf_counter() < start + most_s and not whole.done:
            count += 1
            pending.append((engine.submit(random_ids(SHORT, vocab_size, seed + count), ONE), due))
            due += draw.expovariate(1 / mean_s)
        engine.step()
        now = time.perf_counter()
        times += [now - arrival for request, arrival in pending if request.done]
        pending = [entry for entry in pending if not entry[0].done]
        if now - start > most_s and not pending:
            engine.cancel(whole)
    return times, time.perf_counter() - start, whole.cached


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--long", type=int, default=16_384)
    parser.add_argument("--arrivals", type=int, default=60)
    parser.add_argument("--mean-s", type=float, default=3.0)
    parser.add_argument("--most-s", type=float, default=3600, help="leave the long prompt after so many seconds")
    parser.add_argument("--step-tokens", type=int, default=None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(dir=args.checkpoint.parent) as folder:
        model = finback.load(with_context(args.checkpoint, 32_768, Path(folder)), context=32_768)
    options = Options(step_tokens=args.step_tokens, prefix_cache=False)
    engine = Engine(model, max_batch=8, options=options)
    vocab_size = model.config.vocab_size
    idle(engine, vocab_size, 1, 3)  # warms up
    alone, loaded, took, depths = idle(engine, vocab_size, 100, 8), [], [], []
    while len(loaded) < args.arrivals:
        seed = 1000 * (1 + len(took))
        times, seconds, depth = under_load(engine, vocab_size, args.long, args.mean_s, seed, args.most_s)
        loaded += times
        took.append(seconds)
        depths.append(depth)
        alone += idle(engine, vocab_size, 200 + 10 * len(took), 8)
        print(f"{len(loaded)} arrivals, {depth:,} tokens of the long prompt in {seconds:.0f} s", flush=True)
    base = statistics.median(alone)
    ratio = percentile(loaded, 0.95) / base
    computed = ", ".join(f"{d:,} of them in {s:.0f} s" for d, s in zip(depths, took, strict=True))
    text = "\n".join(
        [
            f"{args.checkpoint.name}: prompts of {SHORT} tokens while one of {args.long:,} is computed "
            f"({computed}), step_tokens {engine.core.scheduler.budget}",
            "",
            "| | time to first token, s |",
            "|---|---|",
            f"| idle, median (min – max) of {len(alone)} | {spread(alone, 3)} |",
            f"| with the long prompt, median (min – max) of {len(loaded)} | {spread(loaded, 3)} |",
            f"| its p95 | {percentile(loaded, 0.95):.3f}, **{ratio:.2f}x** idle |",
        ]
    )
    write(
        args.out, text, {"idle_s": alone, "loaded_s": loaded, "long_s": took, "depths": depths, "options": vars(args)}
    )


if __name__ == "__main__":
    main()
