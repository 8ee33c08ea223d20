"""Sampling: the time to choose one token, before and after, over vocabularies and shapes of the distribution.

    python benchmarks/sampling.py --rounds 15 --out results/sampling

`before` ranks the vocabulary twice for top-p and draws noise for all of it, as the engine did until 0.1.0; `choose` is
what it runs now; `rows` is `choose_rows` on 16 rows, per row. They run in turn in every round, on logits that differ by
round, and must choose the same token. "peaked" logits have a few tokens that hold nearly all probability, as a trained
model's; "flat" ones are nearly uniform, as an untrained one's.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from finback.engine import Sampling
from finback.engine.sampling import Row, choose, choose_rows

SETTINGS = {
    "greedy": Sampling(temperature=0),
    "0.6, top-p 0.95": Sampling(temperature=0.6, top_p=0.95),
    "temperature 1": Sampling(temperature=1, top_p=1),
}
BATCH = 16


def logits(size: int, shape: str, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    if shape == "flat":
        return generator.normal(0, 0.5, size).astype(np.float32)
    values = generator.normal(0, 2, size).astype(np.float32)
    values[generator.choice(size, 20, replace=False)] += np.linspace(4, 14, 20, dtype=np.float32)
    return values


def log_softmax(values: np.ndarray) -> np.ndarray:
    shifted = values.astype(np.float64) - values.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def before(values: np.ndarray, sampling: Sampling, position: int) -> int:
    if sampling.temperature == 0:
        log_softmax(values)
        return int(values.argmax())
    scaled = (values.astype(np.float64) - values.max()) / sampling.temperature
    log_probs = log_softmax(scaled)
    if sampling.top_p < 1:
        order = np.argsort(-log_probs, kind="stable")
        mass = np.cumsum(np.exp(log_probs[order]))[:-1]
        log_probs[order[1:][mass >= sampling.top_p]] = -np.inf
        log_probs = log_softmax(log_probs)
    counter = np.array([0, position, 0, 0], dtype=np.uint64)
    uniform = np.random.Generator(np.random.Philox(key=np.zeros(2, np.uint64), counter=counter)).random(len(values))
    noise = -np.log(-np.log(np.maximum(uniform, np.finfo(np.float64).tiny)))
    return int((log_probs + noise).argmax())


def timed(call: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    result = call()
    return (time.perf_counter() - start) * 1e3, result


def measure(size: int, shape: str, name: str, rounds: int) -> dict:
    sampling = SETTINGS[name]
    took: dict[str, list[float]] = {"before": [], "choose": [], "rows": []}
    for number in range(rounds + 1):
        values = np.stack([logits(size, shape, BATCH * number + n) for n in range(BATCH)])
        rows = [Row(sampling, 0, 0, number) for _ in range(BATCH)]
        before_ms, wanted = timed(lambda values=values, n=number: before(values[0], sampling, n))
        fast_ms, chosen = timed(lambda values=values, n=number: choose(values[0], sampling, 0, 0, n))
        rows_ms, all_chosen = timed(lambda values=values, rows=rows: choose_rows(values, rows))
        if not wanted == chosen.token == all_chosen[0].token:
            raise SystemExit(f"{size} {shape} {name}: chose {chosen.token}, before {wanted}")
        if number:  # the first warms the allocator
            for key, value in (("before", before_ms), ("choose", fast_ms), ("rows", rows_ms / BATCH)):
                took[key].append(value)
    return {"vocabulary": size, "shape": shape, "sampling": name, "ms": took}


def spread(times: list[float]) -> str:
    return f"{statistics.median(times):.3f} ({min(times):.3f} – {max(times):.3f})"


def report(results: list[dict]) -> list[str]:
    lines = ["| vocabulary | logits | sampling | before, ms | choose, ms | rows, ms a row | before / choose |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in results:
        ms = row["ms"]
        ratio = statistics.median(a / b for a, b in zip(ms["before"], ms["choose"], strict=True))
        times = " | ".join(spread(ms[key]) for key in ("before", "choose", "rows"))
        lines.append(f"| {row['vocabulary']:,} | {row['shape']} | {row['sampling']} | {times} | {ratio:.1f}x |")
    return lines


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    results = []
    for size in (2048, 32000, 129280):
        for shape in ("peaked", "flat"):
            for name in SETTINGS:
                results.append(measure(size, shape, name, options.rounds))
                print(report(results)[-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    machine = {"numpy": np.__version__, "processor": processor(), "date": time.strftime("%Y-%m-%d")}
    (options.out / "log.json").write_text(json.dumps({**machine, "rounds": options.rounds, "rows": results}) + "\n")
    title = f"# Sampling\n\n`python benchmarks/sampling.py --rounds {options.rounds} --out results/sampling`"
    note = (
        f"Medians (least – most) of {options.rounds} rounds, {processor()}, numpy {np.__version__}, one thread; "
        "every choice equals the one before."
    )
    (options.out / "report.md").write_text("\n".join([title, "", note, "", *report(results)]) + "\n")


if __name__ == "__main__":
    main()
