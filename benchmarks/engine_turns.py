"""The second turn of a long conversation: only its new tokens are computed, also after a restart.

    python benchmarks/engine_turns.py --checkpoint M --out results/engine/turns

First turn: `--tokens` tokens and 32 new ones. Second turn: all of that and 64 more. It is computed cold, then with the
prefix cache, then by a second engine in a process of its own that finds the first one's blocks on disk. Also prints
what a token's cache takes, by the formula and beside multi-head attention.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from engine_common import keep_memory, random_ids, with_context, write

keep_memory()

import torch  # noqa: E402

import finback  # noqa: E402
from finback.engine import Engine, Options, Sampling  # noqa: E402

NEW, MORE = 32, 64


def turn(engine: Engine, prompt: list[int]) -> dict:
    """One turn: seconds to the first token, and what was found."""
    request = engine.submit(prompt, Sampling(max_tokens=NEW, temperature=0, ignore_eos=True))
    start = time.perf_counter()
    while not request.choices:
        engine.step()
    first = time.perf_counter() - start
    while not request.done:
        engine.step()
    completion = request.completion()
    return {"first_s": first, "prompt": len(prompt), "hits": completion.cached_tokens, "ids": completion.token_ids}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--again", type=Path, help=argparse.SUPPRESS)  # the restarted process: where the blocks are
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.again is not None:
        return again(args)
    with tempfile.TemporaryDirectory(dir=args.checkpoint.parent) as name:
        copy = with_context(args.checkpoint, 32_768, Path(name) / "model")
        model = finback.load(copy, context=32_768)
        store = Path(name) / "prefix"
        options = Options(prefix_folder=store, step_tokens=2048)
        engine = Engine(model, max_batch=2, options=options)
        first = turn(engine, prompt := random_ids(args.tokens, model.config.vocab_size, 1))
        second_prompt = [*prompt, *first["ids"], *random_ids(MORE, model.config.vocab_size, 2)]
        engine.close()  # what the first turn left is on disk now
        cold = turn(Engine(model, max_batch=2, options=Options(step_tokens=2048)), second_prompt)
        (Path(name) / "prompt.json").write_text(json.dumps(second_prompt))
        command = [sys.executable, __file__, "--checkpoint", str(copy), "--again", str(store)]
        restarted = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        warm = turn(engine, second_prompt)
        on_disk = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    rows = {"cold": cold, "second turn": warm, "after a restart": restarted}
    same = next((n for n, pair in enumerate(zip(warm["ids"], cold["ids"], strict=True)) if len(set(pair)) > 1), NEW)
    assert warm["ids"] == restarted["ids"] and warm["hits"] == restarted["hits"]
    config = model.config
    token = 2 * (config.kv_lora_rank + config.qk_rope_head_dim) * config.num_hidden_layers
    assert engine.stats().bytes_per_token == token
    heads = 2 * config.num_attention_heads * (config.query_dim + config.v_head_dim) * config.num_hidden_layers
    lines = ["| | prompt tokens | found | computed | first token, s |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {row['prompt']:,} | {row['hits']:,} | {row['prompt'] - row['hits']:,} | {row['first_s']:.2f} |"
        for name, row in rows.items()
    ]
    lines += [
        "",
        f"The second turn's {NEW} tokens are the same before and after the restart. The cold run has {same} of them,",
        "then others: bfloat16, random weights; a prompt cut elsewhere has other last bits, near-ties fall otherwise.",
        f"On disk: {on_disk / 2**20:,.0f} MiB.",
        f"A token's cache takes {token:,} bytes = 2 x (kv_lora_rank {config.kv_lora_rank} + rope "
        f"{config.qk_rope_head_dim}) x {config.num_hidden_layers} layers; keys and values of all heads would take "
        f"{heads:,}, {heads / token:.1f} times that.",
    ]
    write(args.out, "\n".join([f"{args.checkpoint.name}, BF16", "", *lines]), rows)


def again(args: argparse.Namespace) -> None:
    """The second turn in a new process."""
    model = finback.load(args.checkpoint, context=32_768)
    engine = Engine(model, max_batch=2, options=Options(prefix_folder=args.again, step_tokens=2048))
    print(json.dumps(turn(engine, json.loads((args.again.parent / "prompt.json").read_text()))))


if __name__ == "__main__":
    main()
