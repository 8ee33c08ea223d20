"""What an 8-bit cache loses and saves: bytes a token, divergence of the next-token distribution, calf's answers.

    python benchmarks/engine_cache.py --checkpoint M --out results/engine/cache

Divergence: KL of the distribution after `--tokens` random tokens, whose entries come from the cache in each format,
against the cache in the model's own dtype; mean over several sequences, and how often the likeliest token stays.
Answers: greedy pass@1 of calf on held-out problems of every task.
"""

import argparse
from pathlib import Path

import torch
from engine_common import random_ids, write

import finback
from finback.engine import Engine, Options, Sampling
from finback.evaluate import evaluate

FORMATS = (None, "int8", "fp8")


def distributions(model, form: str | None, count: int, sequences: int) -> tuple[torch.Tensor, int]:
    """Log-probabilities [sequences, V] of a token computed by itself after a cached prefix; bytes a token."""
    options = Options(cache_format=form, step_tokens=512, prefix_cache=False)
    engine = Engine(model, max_batch=1, options=options)
    found = []
    for seed in range(sequences):
        request = engine.submit(
            random_ids(count, model.config.vocab_size, 50 + seed),
            Sampling(max_tokens=2, temperature=0, ignore_eos=True, logprobs=model.config.vocab_size),
        )
        while engine.busy:
            engine.step()
        row = torch.full((model.config.vocab_size,), float("-inf"), dtype=torch.float64)
        for token, logprob in request.completion().top_logprobs[0]:
            row[token] = logprob
        found.append(row)
    return torch.stack(found), engine.stats().bytes_per_token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=520)
    parser.add_argument("--sequences", type=int, default=12)
    parser.add_argument("--n", type=int, default=100, help="problems of each task")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, calf = finback.load(args.checkpoint), finback.load("calf")
    tokenizer = finback.load_tokenizer("calf")
    log, exact = {}, None
    for form in FORMATS:
        logprobs, size = distributions(model, form, args.tokens, args.sequences)
        exact = logprobs if exact is None else exact
        divergence = torch.nn.functional.kl_div(logprobs, exact, log_target=True, reduction="none").sum(-1)
        kept = (logprobs.argmax(-1) == exact.argmax(-1)).double().mean().item()
        engine = Engine(calf, tokenizer, max_batch=32, options=Options(cache_format=form))
        scores = evaluate(engine, None, args.n)["tasks"]
        right = sum(score["pass@1"] for score in scores.values()) / len(scores)
        log[form or "as computed"] = {
            "bytes": size, "kl": divergence.mean().item(), "kl_max": divergence.max().item(), "kept": kept,
            "calf": right, "tasks": {task: score["pass@1"] for task, score in scores.items()},
        }  # fmt: skip
        print(form, log[form or "as computed"], flush=True)
    lines = [
        "| cache | bytes a token | KL, mean (max) | likeliest token kept | calf, pass@1 |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {row['bytes']:,} | {row['kl']:.2e} ({row['kl_max']:.2e}) | {row['kept']:.0%} | {row['calf']:.4f} |"
        for name, row in log.items()
    ]
    title = f"{args.checkpoint.name} (BF16) after {args.tokens} tokens, {args.sequences} sequences; calf on {args.n} "
    write(args.out, "\n".join([title + "problems of each task", "", *lines]), log)


if __name__ == "__main__":
    main()
