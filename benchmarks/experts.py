"""Experts on disk: speed against hit rate, within a memory limit that the resident model does not fit.

    python benchmarks/experts.py --checkpoint M --cgroup /sys/fs/cgroup/memory/finback --out results/experts

M: a V3-style folder in BF16. Every run is a process of its own in a new memory cgroup (v1 or v2; made here and removed,
needs root) whose limit is the dense part + the budget + ROOM; the file is dropped from the page cache before it, since
pages that others read would serve it beyond its limit. Greedy tokens after one prompt; the first WARM are not timed,
and the counters are of the rest. Skewed routing: -s · ln(rank) added to the correction biases, ranks drawn anew for
each layer, because random weights route almost evenly and trained ones do not. `reading` times one expert's matrices
in the ways that were tried. `foreseen`: how many of a layer's experts the layer before could have asked for, by the
router applied one layer early: what reading ahead would live on.
"""

import argparse
import ctypes
import json
import math
import mmap
import os
import random
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOM = 700 * 10**6  # the interpreter and torch, the cache of a short context, activations, file pages on their way
WARM, TOKENS, PROMPT = 16, 48, 64
QUIET = 0.1  # CPUs that other processes may take in a run; above it is repeated, twice at most
SKEWS, SHARES = (0.0, 0.3), (1 / 6, 1 / 3, 2 / 3, 1)
COMMAND = "python benchmarks/experts.py --checkpoint M --cgroup /sys/fs/cgroup/memory/finback --out results/experts"


def drop(folder: Path) -> None:
    """Drop the weights from the page cache."""
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _busy() -> float:
    """Seconds that all CPUs have worked, for whomever."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def skew(model: Any, strength: float) -> None:
    import torch

    generator = torch.Generator().manual_seed(1)
    for _, router in model.routers():
        bias = router.e_score_correction_bias
        ranks = 1 + torch.randperm(len(bias), generator=generator)
        bias -= strength * ranks.log()


def foresee(model: Any) -> dict[str, int]:
    """Count, while the model runs a token at a time, which experts the next layer's router names a layer early."""
    counts = {"chosen": 0, "foreseen": 0}
    layers = [layer.mlp for layer in model.decoder.layers.values() if hasattr(layer.mlp, "gate")]
    guess: dict[int, set[int]] = {}

    def hook(number: int) -> Any:
        def look(moe: Any, args: Any) -> None:
            x = args[0]
            if x.shape[:2].numel() != 1:
                return
            chosen = set(moe.gate(x, None)[0].flatten().tolist())
            if number in guess:
                counts["chosen"] += len(chosen)
                counts["foreseen"] += len(chosen & guess.pop(number))
            if number + 1 < len(layers):
                guess[number + 1] = set(layers[number + 1].gate(x, None)[0].flatten().tolist())

        return look

    for number, moe in enumerate(layers):
        moe.register_forward_pre_hook(hook(number))
    return counts


def worker(options: dict[str, Any]) -> None:
    """One run; in its cgroup before anything heavy is imported. Prints its result as JSON."""
    ctypes.CDLL(None).prctl(1, 9)  # ends with its parent
    if options["cgroup"]:
        Path(options["cgroup"], "cgroup.procs").write_text(str(os.getpid()))
    import torch

    from finback.engine import Engine, Sampling
    from finback.weights import load

    start = time.perf_counter()
    model = load(options["checkpoint"], force=True, expert_memory=options["budget"])
    result: dict[str, Any] = {"load_seconds": time.perf_counter() - start, "threads": torch.get_num_threads()}
    skew(model, options["skew"])
    counts = foresee(model) if options["foresee"] else None
    used: dict[int, list[int]] = {}
    engine = Engine(model, max_batch=1)
    prompt = torch.randint(model.config.vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(2)).tolist()
    sampling = Sampling(max_tokens=WARM + TOKENS, temperature=0, ignore_eos=True)
    request = engine.submit(prompt, sampling, routing=True)
    done, hot = 0, model.expert_cache
    while not request.done:
        engine.step()
        done += 1
        if done == WARM:
            start, before = time.perf_counter(), None if hot is None else hot.stats()
    seconds = time.perf_counter() - start
    completion = request.completion()
    result |= {"tokens": completion.token_ids, "tokens_per_s": (done - WARM) / seconds}
    if hot is not None:
        after = hot.stats()
        keys = ("hits", "misses", "bytes_read", "seconds_reading")
        result |= {key: after[key] - before[key] for key in keys} | {"resident_bytes": after["resident_bytes"]}
        result["hit_rate"] = result["hits"] / (result["hits"] + result["misses"])
    for layer, chosen in (completion.routing or {}).items():
        used[int(layer)] = torch.bincount(chosen[-TOKENS:].flatten(), minlength=model.config.n_routed_experts).tolist()
    if used:  # share of uses by the quarter of each layer's experts that is used most
        tops = [sum(sorted(u)[-len(u) // 4 :]) / sum(u) for u in used.values()]
        result["top_quarter"] = statistics.mean(tops)
    status = Path("/proc/self/status").read_text().splitlines()
    result["peak_rss"] = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    print(json.dumps(result | ({} if counts is None else counts)))


def run(checkpoint: Path, cgroup: Path | None, limit: int | None, **options: Any) -> dict[str, Any]:
    """A worker in a new cgroup; `killed` where the limit ended it."""
    drop(checkpoint)
    settings = {"budget": None, "skew": 0.0, "foresee": False} | options
    group = cgroup if limit is not None else None
    told: dict[str, Any] = settings | {"limit": limit}
    if group is not None:
        group.mkdir()
        old = (group / "memory.limit_in_bytes").exists()
        (group / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(limit))
    try:
        work = settings | {"checkpoint": str(checkpoint), "cgroup": None if group is None else str(group)}
        command = [sys.executable, __file__, "--worker", json.dumps(work)]
        start, busy, own = time.perf_counter(), _busy(), os.times()
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        now = os.times()
        ours = now.children_user + now.children_system - own.children_user - own.children_system
        told["others_cpus"] = (_busy() - busy - ours) / (time.perf_counter() - start)
        if group is not None:
            peak = group / ("memory.max_usage_in_bytes" if old else "memory.peak")
            told["group_peak"] = int(peak.read_text())
        if done.returncode == -9:
            return told | {"killed": True}
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        return told | json.loads(done.stdout.splitlines()[-1])
    finally:
        for _ in range(100 if group is not None and group.exists() else 0):
            try:
                group.rmdir()
                break
            except OSError:  # the worker is still ending
                time.sleep(0.1)


def reading(checkpoint: Path, rounds: int = 3, count: int = 96) -> dict[str, list[float]]:
    """Milliseconds for one expert's three matrices, by way."""
    import torch

    from finback.weights import store

    source = store.Checkpoint(checkpoint)
    gates = sorted(name for name in source.names() if ".mlp.experts." in name and ".gate_proj." in name)
    experts = [[name.replace("gate_proj", f"{part}_proj") for part in ("gate", "up", "down")] for name in gates]
    kept = [torch.zeros(source.shape(name), dtype=source.dtype(name)) for name in experts[0]]
    maps = {}
    for path in checkpoint.glob("*.safetensors"):
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        maps[path.name] = torch.frombuffer(mapped, dtype=torch.uint8)

    def reused(names: list[str]) -> None:
        for name, out in zip(names, kept, strict=True):
            source.into(name, out)

    def fresh(names: list[str]) -> None:
        for name, like in zip(names, kept, strict=True):
            source.into(name, torch.empty_like(like))

    def copied(names: list[str]) -> None:
        for name, out in zip(names, kept, strict=True):
            file, offset = source.position(name)
            out.view(-1).view(torch.uint8).copy_(maps[file][offset : offset + out.nbytes])
            assert out.sum().isfinite()

    def announced(names: list[str]) -> None:
        source.ahead(names)
        reused(names)

    def together(names: list[str]) -> None:
        list(pool.map(source.into, names, kept))

    ways = {"mmap, copied": copied, "preadv, fresh": fresh, "preadv, reused": reused}
    ways |= {"preadv, reused, announced": announced, "preadv, reused, 3 threads": together}
    times: dict[str, list[float]] = {}
    draw = random.Random(0)
    with ThreadPoolExecutor(3) as pool:
        for name in (name for names in experts for name in names):
            source.into(name, kept[0].new_empty(source.shape(name)))
        for state in ("cached", "cold"):
            for _ in range(rounds):
                for way, read in ways.items():
                    chosen = draw.sample(experts, min(count, len(experts)))
                    if state == "cold":
                        drop(checkpoint)
                    start = time.perf_counter()
                    for names in chosen:
                        read(names)
                    times.setdefault(f"{way} ({state})", []).append((time.perf_counter() - start) / len(chosen) * 1e3)
            print({way: f"{statistics.median(t):.2f} ms" for way, t in times.items()}, flush=True)
    return times


def in_turn(checkpoint: Path, whole: int) -> dict[str, Any]:
    """Resident and on disk with room for all, in one process, a token each in turn: what a hit costs."""
    import torch

    from finback.engine import Engine, Sampling
    from finback.weights import load

    engines = [Engine(load(checkpoint, force=True, expert_memory=limit), max_batch=1) for limit in (None, whole)]
    prompt = torch.randint(1000, (512,), generator=torch.Generator().manual_seed(2)).tolist()
    sampling = Sampling(max_tokens=3 * TOKENS, temperature=0, ignore_eos=True)
    requests = [engine.submit(prompt, sampling) for engine in engines]
    seconds: list[list[float]] = [[], []]
    while not requests[0].done:
        for engine, times in zip(engines, seconds, strict=True):
            start = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - start)
    same = len({tuple(request.completion().token_ids) for request in requests}) == 1
    ratios = sorted(b / a for a, b in zip(*(times[WARM:] for times in seconds), strict=True))
    quarters = [ratios[len(ratios) * q // 4] for q in (1, 2, 3)]
    return {"ratio_quartiles": quarters, "identical": same, "seconds": seconds}


def sizes_of(checkpoint: Path) -> tuple[int, int]:
    """Bytes of the routed experts and of all else."""
    from finback.weights import store

    source = store.Checkpoint(checkpoint)
    size = {n: math.prod(source.shape(n)) * source.dtype(n).itemsize for n in source.names()}
    experts = sum(bytes_ for name, bytes_ in size.items() if ".mlp.experts." in name)
    return experts, sum(size.values()) - experts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--cgroup", type=Path)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker")
    options = parser.parse_args()
    if options.worker:
        worker(json.loads(options.worker))
        return
    whole, dense = sizes_of(options.checkpoint)
    times = reading(options.checkpoint)
    beside = in_turn(options.checkpoint, whole)
    print(beside["ratio_quartiles"], beside["identical"], flush=True)
    rows: list[dict[str, Any]] = []

    def do(**how: Any) -> dict[str, Any]:
        budget = how.get("budget")
        limit = how.pop("limit", None if options.cgroup is None or budget is None else dense + budget + ROOM)
        row = run(options.checkpoint, options.cgroup, limit, **how)
        for _ in range(2):
            if row["others_cpus"] < QUIET or row["foresee"] or row.get("killed"):
                break
            again = run(options.checkpoint, options.cgroup, limit, **how)
            row = min(row, again, key=lambda one: one["others_cpus"])
        rows.append(row)
        print({key: value for key, value in row.items() if key != "tokens"}, flush=True)
        return row

    if options.cgroup is not None:
        do(limit=dense + whole // 3 + ROOM)  # the resident model under the limit of a third: it is killed
    for number in range(options.rounds):
        for strength in SKEWS:
            do(skew=strength)
            for share in SHARES:
                do(skew=strength, budget=int(whole * share))
        for strength in SKEWS if number == 0 else ():
            do(skew=strength, foresee=True)
    write(options.out, times, beside, rows, whole, dense)


def write(
    out: Path,
    times: dict[str, list[float]],
    beside: dict[str, Any],
    rows: list[dict[str, Any]],
    whole: int,
    dense: int,
) -> None:
    import torch

    out.mkdir(parents=True, exist_ok=True)
    facts = {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "experts": whole, "dense": dense}
    (out / "log.json").write_text(json.dumps({**facts, "reading_ms": times, "in_turn": beside, "runs": rows}) + "\n")
    lines = ["# Experts on disk", "", f"`{COMMAND}`", ""]
    lines += [f"Routed experts {whole / 1e6:,.0f} MB, all else {dense / 1e6:,.0f} MB; torch {torch.__version__}.", ""]
    for row in (row for row in rows if row.get("killed")):
        lines += [f"The resident model under a limit of {row['limit'] / 1e6:,.0f} MB: killed by the system.", ""]
    lines += [
        "| skew | top quarter | expert memory | limit MB | hit rate | tokens/s | reading | peak RSS MB | tokens |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    kinds = {(r["skew"], r["budget"]): r for r in rows if not r.get("killed") and not r["foresee"]}
    for (strength, budget), first in kinds.items():
        same = [
            r for r in rows if (r["skew"], r["budget"], r["foresee"]) == (strength, budget, False) and "tokens" in r
        ]
        speeds = [r["tokens_per_s"] for r in same]
        speed = f"{statistics.median(speeds):.2f} ({min(speeds):.2f} – {max(speeds):.2f})"
        equal = all(r["tokens"] == kinds[strength, None]["tokens"] for r in same)
        limit = "none" if first["limit"] is None else f"{first['limit'] / 1e6:,.0f}"
        share, rate, reads = "all, resident", "", ""
        if budget is not None:
            share, rate = f"{budget / 1e6:,.0f} MB ({budget / whole:.0%})", f"{first['hit_rate']:.1%}"
            reads = (
                f"{statistics.median(r['seconds_reading'] * r['tokens_per_s'] / TOKENS for r in same):.0%} of the time"
            )
        peak = statistics.median(r["peak_rss"] for r in same) / 1e6
        cells = (strength, f"{first['top_quarter']:.0%}", share, limit, rate, speed, reads, f"{peak:,.0f}")
        lines.append(f"| {' | '.join(map(str, cells))} | {'identical' if equal else 'DIFFERENT'} |")
    low, middle, high = beside["ratio_quartiles"]
    told = "identical" if beside["identical"] else "DIFFERENT"
    lines += ["", f"All experts hot, a token each in turn with the resident model: {middle:.2f}x its time a token"]
    lines[-1] += f" (quartiles {low:.2f} – {high:.2f}), tokens {told}."
    lines += ["", "One expert's three matrices:", "", "| way | ms, median (min – max) |", "|---|---|"]
    lines += [f"| {w} | {statistics.median(t):.2f} ({min(t):.2f} – {max(t):.2f}) |" for w, t in times.items()]
    for row in (row for row in rows if row["foresee"]):
        share = row["foreseen"] / row["chosen"]
        lines += ["", f"Skew {row['skew']}: {share:.0%} of the experts are those the router names a layer early."]
    others = max(row["others_cpus"] for row in rows if "tokens" in row and not row["foresee"])
    lines += ["", f"Other processes took at most {others:.2f} of a CPU during a run of the first table."]
    (out / "report.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
