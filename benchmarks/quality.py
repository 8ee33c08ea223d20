"""What each weight format loses: bits per byte and right answers on calf, divergence of the logits on (M).

    python benchmarks/quality.py --checkpoint M --out results/kernels/quality

Reference: the checkpoint's own bfloat16 numbers, computed in float32. Formats run as they are served, through the
native kernels; int4 also with its scales by plain rounding to nearest. calf: worked replies to held-out problems of
every task (bits per byte of the reply, and KL at each of its tokens), and greedy pass@1 on other held-out problems.
(M), whose weights are random: KL at every position of random tokens, of the logits as served, of the same with the
reference's choice of experts replayed, and of the stored numbers alone, computed in float32. Intervals: 95 %, bootstrap
over problems (calf) or positions (M); differences from BF16 are paired, on the same problems.
"""

import argparse
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_common import random_ids, write

import finback
from finback.engine import Engine
from finback.evaluate import evaluate
from finback.kernels import native
from finback.kernels.quantise import FORMATS, Int4, _int4_codes
from finback.machine import read
from finback.model.weight import DenseWeight
from finback.paths import PACKAGE
from finback.tasks import TASKS, sample
from finback.text.chat import example_ids

_RESAMPLES = 2000


class Nearest(Int4):
    """The same codes with one scale tried: the largest number becomes `level`, of either sign where it is positive."""

    def __init__(self, level: float) -> None:
        self.level = level

    def quantise(self, w_RC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        grouped = torch.nn.functional.pad(w_RC.float(), (0, -w_RC.shape[-1] % 32)).unflatten(-1, (-1, 32))
        largest = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))
        scale = (largest.abs() if self.level > 0 else largest) / self.level
        scale = scale.to(self.scale_dtype)
        low, high = (_int4_codes(grouped, scale.float()) + 8).to(torch.uint8).chunk(2, dim=-1)
        return (low | high << 4).flatten(-2), scale.squeeze(-1)


SCALES = {"int4, largest / 7": Nearest(7.0), "int4, largest / -8": Nearest(-8.0)}
SERVED = {"BF16": None, "FP8 128 x 128": "fp8", "int8 by row": "int8", "int4, scale search": "int4"}
NAMES = (*SERVED, *SCALES)
PLAIN = "BF16, plain torch"


@contextmanager
def loaded(folder: Path, name: str, dtype: str = "bfloat16") -> Iterator[Any]:
    """A model in a format, in bfloat16 as it is served; its pack in a folder that is thrown away."""
    with tempfile.TemporaryDirectory(prefix="quality-") as place:
        for file in folder.iterdir():
            if file.is_file():
                try:
                    os.link(file, Path(place) / file.name)
                except OSError:  # another file system
                    shutil.copy(file, place)
        search = FORMATS["int4"]
        FORMATS["int4"] = SCALES.get(name, search)
        native.use("torch" if name == PLAIN else None)
        try:
            yield finback.load(place, dtype, quantize=None if name == PLAIN else SERVED.get(name, "int4"))
        finally:
            FORMATS["int4"] = search
            native.use(None)


def interval(values: np.ndarray, statistic) -> tuple[float, float, float]:
    """A statistic of rows, and the 95 % interval of its bootstrap."""
    draw = np.random.default_rng(0)
    resampled = [statistic(values[draw.integers(len(values), size=len(values))]) for _ in range(_RESAMPLES)]
    return float(statistic(values)), *map(float, np.percentile(resampled, (2.5, 97.5)))


def divergence(exact: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL of each row of logits from the exact one, in nats, and whether the likeliest token is the same."""
    p, q = (each.double().log_softmax(-1) for each in (exact, logits))
    return (p.exp() * (p - q)).sum(-1), p.argmax(-1) == q.argmax(-1)


def kl_figures(kl: np.ndarray, same: np.ndarray) -> dict[str, Any]:
    mean, p99 = interval(kl, np.mean), interval(kl, lambda values: np.percentile(values, 99))
    return {"kl_mean": mean, "kl_median": float(np.median(kl)), "kl_p99": p99, "same": float(same.mean())}


class Replies:
    """Worked replies to held-out problems, and what the reference gives them."""

    def __init__(self, count: int) -> None:
        tokenizer = finback.load_tokenizer("calf")
        self.examples, self.bytes = [], []
        for problem in (problem for task in TASKS for problem in sample(task, 1, count)):
            reply = {"role": "assistant", "content": problem.answer, "reasoning": problem.reasoning}
            self.examples.append(example_ids(tokenizer, [{"role": "user", "content": problem.question}, reply]))
            self.bytes.append(len((problem.reasoning + problem.answer).encode()))
        self.exact = finback.load("calf", "float32")

    @torch.inference_mode()
    def measure(self, model: Any) -> dict[str, Any]:
        """Of each problem (nats, bytes, tokens), and the divergence at each token of the replies."""
        rows, divergences = [], []
        for (prompt, reply), size in zip(self.examples, self.bytes, strict=True):
            ids = torch.tensor([prompt + reply])
            logits = model(ids)[0, len(prompt) - 1 : -1]
            nats = torch.nn.functional.cross_entropy(logits.double(), torch.tensor(reply), reduction="sum")
            rows.append((nats.item(), size, len(reply)))
            if model is not self.exact:
                divergences.append(divergence(self.exact(ids)[0, len(prompt) - 1 : -1], logits))
        found: dict[str, Any] = {"rows": np.array(rows)}
        if divergences:
            kl, same = (torch.cat(each).numpy() for each in zip(*divergences, strict=True))
            found |= kl_figures(kl, same)
        return found


def bits_per_byte(rows: np.ndarray) -> float:
    return rows[:, 0].sum() / rows[:, 1].sum() / math.log(2)


def answers(model: Any, count: int, folder: Path) -> tuple[dict[str, Any], np.ndarray]:
    """Scores of calf on every task, and for each problem whether it was right."""
    engine = Engine(model, finback.load_tokenizer("calf"), max_batch=64)
    records = folder / "records.jsonl"
    scores = evaluate(engine, None, count, records=records)["tasks"]
    return scores, np.array([json.loads(line)["correct"] for line in records.read_text().splitlines()], dtype=float)


def calf(texts: int, problems: int) -> dict[str, Any]:
    replies, log = Replies(texts), {}
    plain = replies.measure(replies.exact)
    log["float32"] = {"bits_per_byte": interval(plain["rows"], bits_per_byte)}
    base: dict[str, np.ndarray] = {}
    for name in NAMES:
        with loaded(PACKAGE / "models" / "calf", name) as model, tempfile.TemporaryDirectory() as folder:
            found = replies.measure(model)
            scores, right = answers(model, problems, Path(folder))
        rows = found.pop("rows")
        base = base or {"rows": rows, "right": right}
        both = np.concatenate((rows, base["rows"]), axis=1)
        figures = {
            "bits_per_byte": interval(rows, bits_per_byte),
            "more_bits": interval(both, lambda values: bits_per_byte(values[:, :3]) - bits_per_byte(values[:, 3:])),
            "perplexity": math.exp(rows[:, 0].sum() / rows[:, 2].sum()),
            "right": interval(right, np.mean),
            "more_right": interval(right - base["right"], np.mean),
            "tasks": scores,
        }
        log[name] = found | figures
        print("calf", name, {key: value for key, value in log[name].items() if key != "tasks"}, flush=True)
    return log


Choices = list[dict[int, torch.Tensor]]


@torch.inference_mode()
def logits_of(model: Any, sequences: int, tokens: int, choices: Choices) -> torch.Tensor:
    """[positions, V] of random tokens; the choice of experts is replayed from `choices`, or written there."""
    found = []
    for seed in range(sequences):
        ids = torch.tensor([random_ids(tokens, model.config.vocab_size, seed)])
        if len(choices) == seed:
            choices.append({})
        found.append(model(ids, routing=choices[seed])[0])
    return torch.cat(found)


def matrices(model: Any, most: int) -> Iterator[torch.Tensor]:
    """Matrices of the layers in float32: of a stack one expert's."""
    weights = [module for module in model.decoder.layers.modules() if isinstance(module, DenseWeight)]
    for weight in weights[:most]:
        dense = weight.dense().detach()
        yield dense[0] if dense.ndim == 3 else dense


def errors(model: Any, most: int) -> dict[str, Any]:
    """Mean squared error of each format over the mean square, over all numbers of some matrices."""
    forms = {"FP8 128 x 128": FORMATS["fp8"], "int8 by row": FORMATS["int8"], "int4, scale search": FORMATS["int4"]}
    lost, total = dict.fromkeys((*forms, *SCALES), 0.0), 0.0
    for matrix in matrices(model, most):
        total += matrix.double().square().sum().item()
        for name, form in (forms | SCALES).items():
            there = form.dequantise(*form.quantise(matrix), matrix.shape[-1], torch.float32)
            lost[name] += (there - matrix).double().square().sum().item()
    return {name: value / total for name, value in lost.items()}


def large(checkpoint: Path, sequences: int, tokens: int) -> dict[str, Any]:
    model = finback.load(checkpoint, "float32")
    choices: Choices = []
    exact = logits_of(model, sequences, tokens, choices)
    log: dict[str, Any] = {"errors": errors(model, 40), "served": {}, "replayed": {}, "numbers": {}}
    del model

    def compare(kind: str, name: str, model: Any, chosen: Choices) -> None:
        kl, same = divergence(exact, logits_of(model, sequences, tokens, chosen))
        log[kind][name] = kl_figures(kl.numpy(), same.numpy())
        print(checkpoint.name, kind, name, log[kind][name], flush=True)

    for name in (PLAIN, *NAMES):
        with loaded(checkpoint, name) as model:
            compare("served", name, model, [])
            compare("replayed", name, model, choices)
        del model
        if name not in (PLAIN, "BF16"):
            with loaded(checkpoint, name, "float32") as model:
                compare("numbers", name, model, [])
            del model
    return log


def span(found: tuple[float, float, float], digits: int = 4, sign: str = "") -> str:
    value, low, high = (f"{each:{sign}.{digits}f}" for each in found)
    return f"{value} ({low} – {high})"


def small(found: tuple[float, float, float]) -> str:
    return "{:.2e} ({:.2e} – {:.2e})".format(*found)


def report(log: dict[str, Any]) -> list[str]:
    calf_log, args = log["calf"], log["arguments"]
    lines = [
        f"calf ({args['texts']} worked replies and {args['problems']} problems a task, {len(TASKS)} tasks), path "
        f"{log['path']}; in float32 {span(calf_log['float32']['bits_per_byte'])} bits per byte",
        "",
        "| weights | bits per byte | more than BF16 | perplexity a token | right answers | more than BF16 |",
        "|---|---|---|---|---|---|",
    ]
    for name in NAMES:
        row = calf_log[name]
        bits = f"{span(row['bits_per_byte'])} | {span(row['more_bits'], 5, '+')} | {row['perplexity']:.4f}"
        lines.append(f"| {name} | {bits} | {span(row['right'])} | {span(row['more_right'], 4, '+')} |")
    tables = {"calf, at every token of the replies, as served": calf_log}
    if "M" in log:
        title = f"{args['checkpoint']}, random weights, {args['sequences']} x {args['tokens']} random tokens"
        tables[f"{title}, as served"] = log["M"]["served"]
        tables["the same with the reference's choice of experts replayed"] = log["M"]["replayed"]
        tables["the same of the stored numbers alone, computed in float32"] = log["M"]["numbers"]
    for title, rows in ((title, rows) for title, rows in tables.items() if rows):
        lines += ["", f"Divergence from the same BF16 numbers in float32: {title}", ""]
        lines += ["| weights | KL, mean, nats | median | 99th percentile | likeliest token the same |"]
        lines += ["|---|---|---|---|---|"]
        for name in (name for name in (PLAIN, *NAMES) if name in rows):
            row = rows[name]
            figures = f"{small(row['kl_mean'])} | {row['kl_median']:.2e} | {small(row['kl_p99'])} | {row['same']:.2%}"
            lines.append(f"| {name} | {figures} |")
    lines += ["", "Mean squared error of the stored numbers, over their mean square", ""]
    keys = {"calf": "calf"} | ({"M": args["checkpoint"]} if "M" in log else {})
    lines += [f"| weights | {' | '.join(keys.values())} |", "|---|" + "---|" * len(keys)]
    for name in log["calf"]["errors"]:
        lines.append(f"| {name} | {' | '.join(format(log[key]['errors'][name], '.3e') for key in keys)} |")
    commands = " and ".join(f"`{command}`" for command in dict.fromkeys(log["commands"].values()))
    return [*lines, "", f"Commands: {commands}; torch {log['torch']}, {log['processor']}."]


def machine() -> str:
    """The processor's name, as the system gives it."""
    lines = (line.partition(":") for line in read("/proc/cpuinfo").splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == "model name"), "unknown processor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="(M); without it calf alone")
    parser.add_argument("--texts", type=int, default=60, help="worked replies of each task")
    parser.add_argument("--problems", type=int, default=100, help="problems of each task to answer")
    parser.add_argument("--sequences", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument(
        "--part", nargs="+", choices=("calf", "M"), default=["calf", "M"], help="others stay as in --out"
    )
    parser.add_argument("--out", type=Path, default=Path("results/kernels/quality"))
    args = parser.parse_args()
    shown = {key: value.name if isinstance(value, Path) else value for key, value in vars(args).items() if key != "out"}
    given = shown | {"part": " ".join(args.part)}
    options = " ".join(f"--{key} {value}" for key, value in given.items() if value is not None)
    before = args.out.with_suffix(".json")
    log: dict[str, Any] = json.loads(before.read_text()) if set(args.part) < {"calf", "M"} else {"commands": {}}
    log |= {"path": native.level(), "torch": torch.__version__, "processor": machine()}
    for part in args.part:
        log["commands"][part] = f"python benchmarks/quality.py {options} --out results/kernels/{args.out.name}"
    if "calf" in args.part:
        log["calf"] = calf(args.texts, args.problems) | {"errors": errors(finback.load("calf", "float32"), 1000)}
        log["arguments"] = log.get("arguments", {}) | {key: shown[key] for key in ("texts", "problems")}
    if "M" in args.part and args.checkpoint is not None:
        log["M"] = large(args.checkpoint, args.sequences, args.tokens)
        chosen = ("checkpoint", "sequences", "tokens")
        log["arguments"] = log.get("arguments", {}) | {key: shown[key] for key in chosen}
    write(args.out, "\n".join(report(log)), log)


if __name__ == "__main__":
    main()
