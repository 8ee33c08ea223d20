"""Decoding after 512-token prompts: tokens a second beside transformers, one process, in turn.

    python benchmarks/engine_decode.py --checkpoint M --batch 1 8 16 --dtype bfloat16 --out results/engine/decode-M

Both hold the same model and the same prompts (random ids); greedy. Each side prefills once per batch size, then the
sides decode by turns, `--steps` tokens for every row a round. transformers runs as it is best uncompiled: eager
attention, its default experts path, generated one forward call a token (no `generate`). malloc keeps freed memory for
both. `--peer-dtype` may differ from ours where that is better for it.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from engine_common import keep_memory, random_ids, spread, write

keep_memory()

import torch  # noqa: E402

import finback  # noqa: E402
from finback.engine import Engine, Options, Sampling  # noqa: E402
from finback.evaluate.limits import machine_limits  # noqa: E402

DEPTH, ROOM = 512, 400
Steps = Callable[[int], None]


def prompts(batch: int, vocab_size: int) -> list[list[int]]:
    return [random_ids(DEPTH, vocab_size, 1 + row) for row in range(batch)]


def ours(model, batch: int) -> Steps:
    engine = Engine(model, max_batch=batch, options=Options(step_tokens=2048, prefix_cache=False))
    sampling = Sampling(max_tokens=ROOM, temperature=0, ignore_eos=True)
    requests = [engine.submit(prompt, sampling) for prompt in prompts(batch, model.config.vocab_size)]
    while not all(request.choices for request in requests):
        engine.step()

    def steps(count: int) -> None:
        for _ in range(count):
            engine.step()

    return steps


def theirs(model, batch: int) -> Steps:
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache(config=model.config)
    state = {}
    with torch.inference_mode():
        out = model(
            torch.tensor(prompts(batch, model.config.vocab_size)),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    state["next"] = out.logits[:, -1:].argmax(-1)

    @torch.inference_mode()
    def steps(count: int) -> None:
        for _ in range(count):
            place = torch.full((batch, 1), cache.get_seq_length())
            out = model(state["next"], past_key_values=cache, use_cache=True, position_ids=place)
            state["next"] = out.logits[:, -1:].argmax(-1)

    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--peer-dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    import transformers

    model = finback.load(args.checkpoint, args.dtype)
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        args.checkpoint, dtype=getattr(torch, args.peer_dtype), attn_implementation="eager"
    ).eval()
    lines = [
        "| rows | ours tok/s, median (min – max) | transformers tok/s | ratio, median of rounds (min – max) |",
        "|---|---|---|---|",
    ]
    log = {"checkpoint": args.checkpoint.name, "dtype": args.dtype, "peer_dtype": args.peer_dtype, "rounds": []}
    for batch in args.batch:
        sides = {"ours": ours(model, batch), "transformers": theirs(peer, batch)}
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(args.rounds + 1):
            for name, steps in sides.items():
                start = time.perf_counter()
                steps(args.steps)
                rate = batch * args.steps / (time.perf_counter() - start)
                if number:  # the first round warms up
                    rates[name].append(rate)
                    log["rounds"].append({"batch": batch, "side": name, "tokens_per_s": rate})
        ratios = [a / b for a, b in zip(*rates.values(), strict=True)]
        own, other = (spread(rates[name]) for name in sides)
        ratio = f"**{statistics.median(ratios):.2f}x** ({min(ratios):.2f} – {max(ratios):.2f})"
        lines.append(f"| {batch} | {own} | {other} | {ratio} |")
        print(lines[-1], flush=True)
    limits = machine_limits(4.0)
    log["limits"] = vars(limits)
    log["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    text = "\n".join(
        [
            f"{args.checkpoint.name}, ours {args.dtype}, transformers {args.peer_dtype}, {args.threads} threads",
            "",
            *lines,
        ]
    )
    write(args.out, text, log)


if __name__ == "__main__":
    main()
