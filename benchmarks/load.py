"""Loading: time and peak memory of a checkpoint, beside transformers, and of a large random one in every form.

    python benchmarks/load.py --checkpoint M --rounds 3 --out results/load      (M: a V3-style folder in BF16)

Every load runs in a process of its own, ours and transformers' in turn, the file in the page cache (the first round,
uncounted, puts it there). Peak is the process's high-water mark (VmHWM); `above` is what it adds to the process that
has imported what it needs and loaded nothing. A second checkpoint of stacked experts (2.6 GB, random, made here and
removed again) is loaded as it is, as float32 and packed: each peak must stay within final weights + the largest stacked
expert tensor of one layer + 300 MB.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from finback.model import Config, Model
from finback.weights import save

ALLOWANCE = 300 * 10**6
LOAD = """
import json, sys, time
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
side, path, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
import torch
if side == "ours":
    import finback.weights
    base = status("VmHWM")
    start = time.perf_counter()
    model = finback.weights.load(path, **options)
else:
    from transformers import AutoModelForCausalLM
    from transformers.models.deepseek_v3 import modeling_deepseek_v3
    base = status("VmHWM")
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
took = time.perf_counter() - start
weights = {t.data_ptr(): t.nbytes for t in model.state_dict().values()}
stacks = [t.nbytes for n, t in model.state_dict().items() if ".experts." in n]
print(json.dumps({"seconds": took, "peak": status("VmHWM"), "base": base, "weights": sum(weights.values()),
                  "stack": max(stacks)}))
"""


def run(side: str, path: Path, **options) -> dict:
    command = [sys.executable, "-c", LOAD, side, str(path), json.dumps(options)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{side} {options}: {result.stderr[-2000:]}")
    return {"side": side, **options, **json.loads(result.stdout.splitlines()[-1])}


def large(folder: Path) -> None:
    """1.3 B random parameters in BF16, nearly all of them experts of few layers."""
    config = Config(
        vocab_size=8192,
        hidden_size=2048,
        intermediate_size=4096,
        moe_intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=16,
        n_routed_experts=64,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        q_lora_rank=512,
        kv_lora_rank=256,
    )
    with torch.device("meta"):
        model = Model(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            for part in parameter if parameter.dim() == 3 else [parameter]:
                part.copy_(torch.empty(part.shape, dtype=torch.float32).normal_(0, 0.02, generator=generator))
        for _, router in model.routers():
            router.e_score_correction_bias.zero_()
    save(model, None, folder)


def beside_transformers(path: Path, rounds: int) -> tuple[list[str], list[dict]]:
    rows = []
    for number in range(rounds + 1):
        for side in ("ours", "transformers"):
            row = run(side, path)
            print(f"round {number}: {side} {row['seconds']:.2f} s, peak {row['peak'] / 2**20:,.0f} MiB", flush=True)
            rows += [row | {"round": number}] if number else []
    sides = {side: [row for row in rows if row["side"] == side] for side in ("ours", "transformers")}
    lines = ["| | seconds, median (min – max) | peak MiB | above its imports, MiB |", "|---|---|---|---|"]
    for side, own in sides.items():
        times = [row["seconds"] for row in own]
        peak, base = (statistics.median(row[key] for row in own) / 2**20 for key in ("peak", "base"))
        spread = f"{statistics.median(times):.2f} ({min(times):.2f} – {max(times):.2f})"
        lines.append(f"| {side} | {spread} | {peak:,.0f} | {peak - base:,.0f} |")
    pairs = list(zip(*sides.values(), strict=True))
    time_ratio = statistics.median(a["seconds"] / b["seconds"] for a, b in pairs)
    peak_ratio = statistics.median(a["peak"] / b["peak"] for a, b in pairs)
    lines += [
        "",
        f"Ours takes {time_ratio:.2f}x the time and {peak_ratio:.0%} of the peak, medians of {rounds} rounds.",
    ]
    return lines, rows


def bounded(folder: Path) -> tuple[list[str], list[dict]]:
    large(folder)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    lines = [f"A random checkpoint of {size / 1e9:.2f} GB in BF16:", ""]
    lines += ["| options | seconds | weights MB | peak above imports, MB | allowed MB | |", "|---|---|---|---|---|---|"]
    rows = []
    settings = [{}, {"dtype": "float32"}]
    for form in ("int8", "int4", "fp8"):
        settings += [{"quantize": form}, {"quantize": form}]
    for options in settings:
        row = run("ours", folder, **options)
        above, allowed = row["peak"] - row["base"], row["weights"] + row["stack"] + ALLOWANCE
        again = ", packed before" if rows and options and rows[-1].get("quantize") == options.get("quantize", 0) else ""
        what = ", ".join(f"{key}={value}" for key, value in options.items()) or "as it is"
        verdict = "within" if above <= allowed else "OVER"
        numbers = " | ".join(f"{value / 1e6:,.0f}" for value in (row["weights"], above, allowed))
        lines.append(f"| {what}{again} | {row['seconds']:.2f} | {numbers} | {verdict} |")
        print(lines[-1], flush=True)
        rows.append(row)
    return lines, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    peer, rows = beside_transformers(options.checkpoint, options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        bounds, more = bounded(Path(folder) / "large")
    options.out.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    (options.out / "log.json").write_text(json.dumps({**versions, "peer": rows, "bounds": more}) + "\n")
    title = f"# Loading\n\n`python benchmarks/load.py --checkpoint M --rounds {options.rounds} --out results/load`"
    (options.out / "report.md").write_text("\n".join([title, "", *peer, "", *bounds]) + "\n")
    print("\n".join(["", *peer, "", *bounds]))


if __name__ == "__main__":
    main()
