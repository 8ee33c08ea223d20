"""One training step of configuration (S) beside transformers: tokens/s in turn, and where our time goes.

    python benchmarks/train_step.py [--rounds 3] [--steps 6] [--warm 8] [--compiled] [--out results/train_step]

(S) is 10.4 M parameters, 4.95 M active; a step reads 32 x 256 tokens, forward + backward + fused AdamW, bf16 autocast
with fp32 weights, MTP and balance losses off. Each side runs in a process of its own, all with the same malloc
settings, one after the other, `rounds` times; the figures are medians over all measured steps with their range.
Needs the `test` extra (transformers).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

BATCH, SEQUENCE = 32, 256
TOKENS = BATCH * SEQUENCE
ACTIVE = 4.95e6  # parameters a token multiplies with, head included, embedding not
S = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "moe_intermediate_size": 192,
    "num_hidden_layers": 6, "first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "q_lora_rank": 96, "kv_lora_rank": 64,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "num_attention_heads": 8,
    "max_position_embeddings": 4096, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
}  # fmt: skip
# Freed memory stays with the process, in huge pages: what is touched for the first time costs more than the arithmetic.
MALLOC = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.trim_threshold=8589934592"
    ":glibc.malloc.mmap_max=0:glibc.malloc.top_pad=67108864"
}
SIDES = {
    "finback": "ours",
    "transformers-eager": "transformers, eager attention",
    "transformers-sdpa": "transformers, sdpa",
    "transformers-compiled": "transformers, eager attention, torch.compile",
}


def batch():
    import torch

    return torch.randint(5, S["vocab_size"], (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(1))


def ours():
    """A function that runs forward and returns the loss, and the parameters."""
    import torch

    from finback.kernels import dispatch
    from finback.kernels.reference import IGNORED
    from finback.model import Config, Model

    model = Model(Config(**S))
    model.init_weights(0)
    model.train()
    ids = batch()
    targets = torch.cat((ids[:, 1:], torch.full((BATCH, 1), IGNORED)), 1).flatten()

    def loss():
        hidden = model.decoder(ids).flatten(0, 1)
        return dispatch.cross_entropy(hidden, model.decoder.lm_head.weight.dense(), targets) / (BATCH * (SEQUENCE - 1))

    return loss, list(model.parameters())


def theirs(attention: str, compiled: bool):
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(**S, num_key_value_heads=S["num_attention_heads"], use_cache=False)
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(config).train()
    run = torch.compile(model) if compiled else model
    ids = batch()
    return lambda: run(input_ids=ids, labels=ids).loss, list(model.parameters())


def child(side: str, warm: int, steps: int, profile: bool) -> None:
    """Measure one side and print one JSON line."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    attention = "sdpa" if side.endswith("sdpa") else "eager"
    loss, parameters = ours() if side == "finback" else theirs(attention, side.endswith("compiled"))
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    rows = []

    def step() -> None:
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss()
        middle = time.perf_counter()
        value.backward()
        end = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rows.append((time.perf_counter() - start, middle - start, end - middle, value.item()))

    for _ in range(warm + steps):
        step()
    result = {
        "side": side,
        "seconds": [round(row[0], 4) for row in rows[warm:]],
        "forward": statistics.median(row[1] for row in rows[warm:]),
        "backward": statistics.median(row[2] for row in rows[warm:]),
        "first": rows[0][0],
        "losses": [round(row[3], 4) for row in rows[:4]],
    }
    if profile:
        result["where"] = where(step)
    print(json.dumps(result))


def where(step) -> dict[str, float]:
    """Seconds of one step by kind of work."""
    import torch

    kinds = {
        "matrix products": ("aten::mm", "aten::addmm", "aten::_grouped_mm"),
        "attention products": ("aten::bmm", "aten::baddbmm", "aten::baddbmm_"),
        "softmax": ("aten::_softmax",),
        "copies and casts": ("aten::copy_", "aten::cat", "aten::index_select", "aten::clone"),
        "optimiser": ("aten::_fused_adamw_",),
    }
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    totals = dict.fromkeys((*kinds, "elementwise and reductions", "Python and autograd"), 0.0)
    for event in profiler.key_averages():
        kind = next((kind for kind, names in kinds.items() if event.key in names), None)
        other = "elementwise and reductions" if event.key.startswith("aten::") else "Python and autograd"
        totals[kind or other] += event.self_cpu_time_total / 1e6
    return {kind: round(seconds, 3) for kind, seconds in totals.items()}


def peak() -> float:
    """This machine's bf16 matrix product, 4096³, in FLOP/s: median of 5."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    a, b = torch.randn(4096, 4096).bfloat16(), torch.randn(4096, 4096).bfloat16()
    times = []
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * 4096**3 / statistics.median(times[1:])


def measure(side: str, arguments: argparse.Namespace) -> dict:
    command = [
        sys.executable,
        __file__,
        "--child",
        side,
        "--warm",
        str(arguments.warm),
        "--steps",
        str(arguments.steps),
    ]
    done = subprocess.run(command, env={**os.environ, **MALLOC}, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        sys.exit(f"{side} failed:\n{done.stderr[-2000:]}")
    print(lines[-1], file=sys.stderr, flush=True)
    return json.loads(lines[-1])


def report(runs: list[dict], limit: float) -> str:
    rates: dict[str, list[float]] = {}
    for run in runs:
        rates.setdefault(run["side"], []).extend(TOKENS / seconds for seconds in run["seconds"])
    median = {side: statistics.median(values) for side, values in rates.items()}
    best = max((side for side in median if side in ("transformers-eager", "transformers-sdpa")), key=median.__getitem__)
    lines = [
        f"Machine: bf16 matrix product {limit / 1e9:.0f} GFLOP/s. "
        f"6 x active parameters = {6 * ACTIVE / 1e6:.1f} MFLOP a token.",
        "",
        "| | tok/s: median (min – max) | share of the machine's limit | first step s | to ours |",
        "|---|---|---|---|---|",
    ]
    for side, values in rates.items():
        first = max(run["first"] for run in runs if run["side"] == side)
        share = median[side] * 6 * ACTIVE / limit
        ratio = median["finback"] / median[side]
        spread = f"{median[side]:.0f} ({min(values):.0f} – {max(values):.0f})"
        lines.append(f"| {SIDES[side]} | {spread} | {share:.0%} | {first:.1f} | {ratio:.2f}x |")
    lines += ["", f"Ours is {median['finback'] / median[best]:.2f}x the best uncompiled setting ({SIDES[best]}).", ""]
    where_time = next(run["where"] for run in runs if "where" in run)
    whole = sum(where_time.values())
    lines += ["| where our step goes | s | share |", "|---|---|---|"]
    lines += [f"| {kind} | {seconds:.3f} | {seconds / whole:.0%} |" for kind, seconds in where_time.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warm", type=int, default=8)
    parser.add_argument("--compiled", action="store_true", help="also transformers under torch.compile, once")
    parser.add_argument("--out", type=Path, help="keep the report and the raw figures there")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child, arguments.warm, arguments.steps, arguments.child == "finback")
    limit = peak()
    runs = [
        measure(side, arguments)
        for _ in range(arguments.rounds)
        for side in ("finback", "transformers-eager", "transformers-sdpa")
    ]
    if arguments.compiled:
        runs.append(measure("transformers-compiled", arguments))
    text = report(runs, limit)
    print(text)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "report.md").write_text(text + "\n", encoding="utf-8")
        (arguments.out / "raw.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs), encoding="utf-8")


if __name__ == "__main__":
    main()
