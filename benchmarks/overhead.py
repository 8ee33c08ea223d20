"""What a decode step of one request spends outside the compiled kernels: Python, torch, the scheduler, the sampler.

    python benchmarks/overhead.py --checkpoint M --out results/kernels/overhead

A prompt of `--depth` tokens is computed, then `--steps` tokens are decoded greedily; every native call is timed where
it is made. Figures are medians over steps. Goal: less than a tenth of a step of (M) in BF16.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from engine_common import keep_memory, random_ids, spread, write

keep_memory()

import torch  # noqa: E402

import finback  # noqa: E402
from finback.engine import Engine, Sampling  # noqa: E402
from finback.kernels import native  # noqa: E402

_LINEAR = native.linear


class Timed:
    """A native call that counts its time under a name."""

    def __init__(self, call: Any, spent: dict[str, float], name: str) -> None:
        self.call, self.spent, self.name = call, spent, name

    def __call__(self, *args: Any) -> Any:
        start = time.perf_counter()
        try:
            return self.call(*args)
        finally:
            self.spent[self.name] += time.perf_counter() - start


def measure(checkpoint: Path, form: str | None, depth: int, steps: int) -> tuple[list[float], dict[str, list[float]]]:
    """Seconds of each step, and of its native calls by kind."""
    model = finback.load(checkpoint, quantize=form)
    spent = dict.fromkeys(("layers", "head"), 0.0)
    model.decoder.fused.call = Timed(model.decoder.fused.call, spent, "layers")
    native.linear = Timed(_LINEAR, spent, "head")
    engine = Engine(model, max_batch=1)
    engine.submit(
        random_ids(depth, model.config.vocab_size, 1), Sampling(max_tokens=steps + 8, temperature=0, ignore_eos=True)
    )
    times: list[float] = []
    parts: dict[str, list[float]] = {name: [] for name in spent}
    while engine.busy:
        spent.update(dict.fromkeys(spent, 0.0))
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
        for name, seconds in spent.items():
            parts[name].append(seconds)
    return times[-steps:], {name: seconds[-steps:] for name, seconds in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--depth", type=int, default=512)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--forms", nargs="+", default=["bfloat16", "int8", "int4"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = ["| | step, ms | layers | head | outside native calls | share |", "|---|---|---|---|---|---|"]
    log = {}
    for form in args.forms:
        times, parts = measure(args.checkpoint, None if form == "bfloat16" else form, args.depth, args.steps)
        outside = [step - sum(row) for step, *row in zip(times, *parts.values(), strict=True)]
        ms = [f"{statistics.median(seconds) * 1e3:.2f}" for seconds in parts.values()]
        share = statistics.median(outside) / statistics.median(times)
        step, rest = spread([1e3 * t for t in times], 2), spread([1e3 * t for t in outside], 2)
        lines.append(f"| {form} | {step} | {' | '.join(ms)} | {rest} | **{share:.1%}** |")
        log[form] = {"step_s": times, "native_s": parts}
    write(args.out, "\n".join(lines), log)


if __name__ == "__main__":
    main()
