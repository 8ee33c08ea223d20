"""One training step of configuration (S) beside transformers: tokens/s in turn, and where our time goes.

    python benchmarks/train_step.py [--rounds 20] [--steps 2] [--warm 8] [--compiled] [--out results/train_step]

(S) is 10.4 M parameters, 4.95 M active; a step reads 32 x 256 tokens, forward + backward + fused AdamW, bf16 autocast
with fp32 weights, MTP and balance losses off. Each side has a process of its own, all with the same malloc settings;
they take a few steps in turn, `rounds` times, so that a slow minute of the machine falls on all of them. Figures are
medians with their range, over steps for rates and over rounds for ratios.
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


def child(side: str, warm: int) -> None:
    """Warm one side up, then answer each line read with one JSON line: of "step" its times, of "where" its profile."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    attention = "sdpa" if side.endswith("sdpa") else "eager"
    loss, parameters = ours() if side == "finback" else theirs(attention, side.endswith("compiled"))
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> dict[str, float]:
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss()
        middle = time.perf_counter()
        value.backward()
        end = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "forward": middle - start, "backward": end - middle, "loss": value.item()}

    rows = [step() for _ in range(warm)]
    print(
        json.dumps({"side": side, "first": rows[0]["seconds"], "losses": [row["loss"] for row in rows[:4]]}), flush=True
    )
    for line in sys.stdin:
        print(json.dumps(where(step) if line.strip() == "where" else step()), flush=True)


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


class Side:
    """One side in a process of its own, which sleeps while it is not asked."""

    def __init__(self, name: str, warm: int) -> None:
        command = [sys.executable, __file__, "--child", name, "--warm", str(warm)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env={**os.environ, **MALLOC}, stdin=pipe, stdout=pipe, text=True)
        self.name = name
        self.start = self._read()

    def ask(self, what: str) -> dict:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        sys.exit(f"{self.name} ended with exit code {self.process.wait()}")


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} – {max(values):.{digits}f})"


def report(sides: list[Side], rounds: list[dict[str, list[dict]]], where_time: dict[str, float], limit: float) -> str:
    """Rates from all steps; ratios from the steps of the same round, which met the same neighbours on the machine."""
    took = {side.name: [sum(row["seconds"] for row in turn[side.name]) for turn in rounds] for side in sides}
    rate = {side.name: [TOKENS / row["seconds"] for turn in rounds for row in turn[side.name]] for side in sides}
    ratio = {name: [theirs / ours for theirs, ours in zip(took[name], took["finback"], strict=True)] for name in took}
    best = min(("transformers-eager", "transformers-sdpa"), key=lambda name: statistics.median(ratio[name]))
    lines = [
        f"Machine: bf16 matrix product {limit / 1e9:.0f} GFLOP/s. "
        f"6 x active parameters = {6 * ACTIVE / 1e6:.1f} MFLOP a token. "
        f"{len(rounds)} rounds; all sides take their steps in turn in every round.",
        "",
        "| | tok/s: median (min – max) | share of the machine's limit | first step s | ours is faster, by round |",
        "|---|---|---|---|---|",
    ]
    for side in sides:
        share = statistics.median(rate[side.name]) * 6 * ACTIVE / limit
        by_round = "" if side.name == "finback" else f"{spread(ratio[side.name], 2)}x"
        first = f"{side.start['first']:.1f}"
        lines.append(f"| {SIDES[side.name]} | {spread(rate[side.name], 0)} | {share:.0%} | {first} | {by_round} |")
    lines += ["", f"Ours is {statistics.median(ratio[best]):.2f}x the best uncompiled setting ({SIDES[best]}).", ""]
    whole = sum(where_time.values())
    lines += ["| where our step goes | s | share |", "|---|---|---|"]
    lines += [f"| {kind} | {seconds:.3f} | {seconds / whole:.0%} |" for kind, seconds in where_time.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=2, help="of each side in a round, after one uncounted")
    parser.add_argument("--warm", type=int, default=8)
    parser.add_argument("--compiled", action="store_true", help="also transformers under torch.compile")
    parser.add_argument("--out", type=Path, help="keep the report and the raw figures there")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child, arguments.warm)
    limit = peak()
    sides = [Side(name, arguments.warm) for name in SIDES if arguments.compiled or name != "transformers-compiled"]
    rounds: list[dict[str, list[dict]]] = []
    for number in range(arguments.rounds):
        # A side's first step of a round finds its data out of cache and is not counted.
        turns = {side.name: [side.ask("step") for _ in range(1 + arguments.steps)] for side in sides}
        rounds.append({name: rows[1:] for name, rows in turns.items()})
        seconds = {name: [round(row["seconds"], 3) for row in rows] for name, rows in rounds[-1].items()}
        print(f"round {number + 1}/{arguments.rounds}: {seconds}", file=sys.stderr, flush=True)
    text = report(sides, rounds, sides[0].ask("where"), limit)
    print(text)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "report.md").write_text(text + "\n", encoding="utf-8")
        raw = [{"peak": limit}, *(side.start for side in sides), *rounds]
        (arguments.out / "raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in raw), encoding="utf-8")


if __name__ == "__main__":
    main()
