"""From a finished run of recipes/calf.toml to results/calf and the model card: scores, honesty, curves.

    finback train recipes/calf.toml --out runs/calf
    finback eval --model runs/calf/model --n 500 --json --out runs/calf/records.jsonl > runs/calf/eval.json
    python benchmarks/calf_report.py runs/calf

Writes results/calf/{recipe.toml, log.jsonl, eval.json, failures.jsonl, report.md, curves.png} and copies the model into
the package, finback/models/calf, with its MODEL_CARD.md. Needs the `plots` extra (matplotlib).
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from finback.evaluate import wilson
from finback.paths import PACKAGE
from finback.tasks import TASKS, sample

ROOT = Path(__file__).parent.parent
HONEST = next(sample("open", 0, 1)).answer


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def score_table(scores: dict[str, dict[str, float]]) -> list[str]:
    rows = ["| family | pass@1 | 95 % interval |", "|---|---|---|"]
    for name, score in scores.items():
        rows.append(f"| {name} | {score['pass@1']:.3f} | {score['low']:.3f} – {score['high']:.3f} |")
    return rows


def honesty(records: list[dict[str, Any]]) -> list[str]:
    asked = [r for r in records if r["task"] != "open"]
    given = sum(r["answer"].strip() == HONEST for r in asked)
    low, high = wilson(given, len(asked))
    return [
        f"The honest answer was given to {given} of {len(asked)} task questions "
        f"({given / len(asked):.2%}, 95 % interval {low:.2%} – {high:.2%}); to open questions see `open` above."
    ]


def training(log: list[dict[str, Any]]) -> list[str]:
    last = log[-1]
    return [
        f"{last['step']:,} steps, {last['tokens'] / 1e6:.1f} M tokens, {last['seconds'] / 60:.0f} minutes on 2 cores "
        "(AMD EPYC Zen 4, shared with other work and paused for measurements; the log has every step). Last losses: "
        f"{last['loss']:.4f} on replies, {last['mtp']:.4f} for the token after the next."
    ]


def curves(log: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for stage in dict.fromkeys(record["stage"] for record in log):
        part = [record for record in log if record["stage"] == stage]
        steps = [record["step"] for record in part]
        left.plot(steps, [record["loss"] for record in part], label=f"{stage}: next token")
        left.plot(steps, [record["mtp"] for record in part], label=f"{stage}: token after it", alpha=0.6)
        right.plot(steps, [record["load"] for record in part], label=stage)
    left.set(xlabel="step", ylabel="loss, nats a token", yscale="log", title="Loss")
    right.set(xlabel="step", ylabel="largest / mean", title="Load of the worst router's fullest expert")
    for axis in (left, right):
        axis.legend(frameon=False)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def card(written: str, scores: dict[str, Any], records: list[dict[str, Any]], log: list[dict[str, Any]]) -> str:
    kinds = [f"- **{name}**: {task.description}" for name, task in TASKS.items()]
    head = [
        "# calf",
        "",
        "A small DeepSeek-V3 that thinks before it answers, trained from nothing by Finback on two CPU cores. It "
        "solves eight kinds of problems and says so when it is asked anything else.",
        "",
        "## Scores",
        "",
        "Greedy pass@1 at the default difficulty on held-out problems (none, in any phrasing, occurs in training): "
        "`finback eval --model calf --n 500 --json`, seed 0.",
        "",
        *score_table(scores),
        "",
        *honesty(records),
        "",
        "## Data",
        "",
        "Only text that Finback generates: seeded problems in several phrasings with worked solutions, about 5 % of "
        "all problems held out by a hash of their content. No outside text.",
        "",
        *kinds,
        "",
        "## Training",
        "",
        *training(log),
        "",
        "`finback train recipes/calf.toml` makes the model again, from the same data in the same order; other "
        "processors and kernels round differently. This run was stopped and resumed four times, for faster kernels and "
        "an earlier end of pre-training; the recipe states the schedule it really had. Stage lengths and the mixture "
        "were chosen with sight of small held-out samples of other seeds (LOG.md).",
        "",
        "## Limits",
        "",
        "- It knows nothing but these problems. Its answers about itself are learned, too.",
        "- English only. Harder levels than the default, longer numbers or words, and unusual phrasings fail often.",
        "- `--no-think` answers at once and is often wrong where several steps are needed.",
        "- The thinking is the worked solution it was trained on: it is the computation, not an explanation of it.",
        "",
        "## As written by the run",
        "",
    ]
    body = written.split("\n", 2)[2]
    return "\n".join(head) + "\n" + body


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    log = [record for record in lines(run / "log.jsonl") if "loss" in record]
    records, evaluation = lines(run / "records.jsonl"), json.loads((run / "eval.json").read_text(encoding="utf-8"))
    evaluation["model"] = "calf"
    out = ROOT / "results" / "calf"
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "recipes" / "calf.toml", out / "recipe.toml")
    shutil.copy(run / "log.jsonl", out / "log.jsonl")
    (out / "eval.json").write_text(json.dumps(evaluation, indent=2) + "\n", encoding="utf-8")
    wrong = [json.dumps(record, ensure_ascii=False) + "\n" for record in records if not record["correct"]]
    (out / "failures.jsonl").write_text("".join(wrong), encoding="utf-8")
    curves(log, out / "curves.png")
    report = [
        "# calf",
        "",
        *score_table(evaluation["tasks"]),
        "",
        *honesty(records),
        "",
        *training(log),
        "",
        "![curves](curves.png)",
        "",
        "Commands: `finback train recipes/calf.toml --out runs/calf`, "
        "`finback eval --model calf --n 500 --json`, `python benchmarks/calf_report.py runs/calf`.",
    ]
    (out / "report.md").write_text("\n".join(report) + "\n", encoding="utf-8")
    target = PACKAGE / "models" / "calf"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(run / "model", target)
    written = (run / "model" / "MODEL_CARD.md").read_text(encoding="utf-8")
    text = card(written, evaluation["tasks"], records, log)
    (target / "MODEL_CARD.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
