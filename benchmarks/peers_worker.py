"""One peer in a process of its own, for benchmarks/peers.py: prints a line of JSON for each thing it measured.

    python benchmarks/peers_worker.py finback CHECKPOINT --form int8 --what decode-1 prefill-512

Runs under the peer's own Python, so nothing is imported before it is needed. decode-B: B requests of 512 random tokens,
then a token for each of them per step, greedily, prompts left out of the time. prefill-N: from a fresh prompt of N
tokens to its first token. Both in tokens/s, a value for every repeat.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DEPTH = 512
ROOM = 64  # tokens that a request may have made before the last of a batch has its first
FEW = 8  # steps by which the better of two settings is told


def ids(count: int, vocab_size: int, seed: int) -> list[int]:
    import torch

    return torch.randint(5, vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def repeats(what: str, times: int = 1) -> int:
    """How often a process measures it; those that take long once, since rounds repeat them."""
    return times * (3 if what == "decode-1" or (what.startswith("prefill-") and int(what.split("-")[1]) <= 1024) else 1)


def tokens(what: str) -> int:
    """How many steps of decoding are timed."""
    return 128 if what == "decode-1" else 64


def finback(options: argparse.Namespace, what: str, loaded: dict) -> dict[str, Any]:
    """Our engine, without its prefix cache."""
    import finback
    from finback.engine import Engine, Options, Sampling
    from finback.kernels import native

    if not loaded:
        form = None if options.form == "bfloat16" else options.form
        loaded["model"] = finback.load(options.checkpoint, dtype="bfloat16", quantize=form)
    model, kind, count = loaded["model"], *what.split("-")
    rows = int(count) if kind == "decode" else 1
    engine = Engine(model, max_batch=rows, options=Options(step_tokens=2048, prefix_cache=False))
    vocabulary, steps = model.config.vocab_size, tokens(what)

    def decode(seed: int) -> float:
        sampling = Sampling(max_tokens=steps + ROOM, temperature=0, ignore_eos=True)
        requests = [engine.submit(ids(DEPTH, vocabulary, seed + row), sampling) for row in range(rows)]
        while not all(request.choices for request in requests):
            engine.step()
        before = sum(len(request.choices) for request in requests)
        seconds = timed(lambda: [engine.step() for _ in range(steps)])
        made = sum(len(request.choices) for request in requests) - before
        for request in requests:
            engine.cancel(request)
        return made / seconds

    def prefill(seed: int) -> float:
        request = engine.submit(ids(int(count), vocabulary, seed), Sampling(max_tokens=1, temperature=0))
        return int(count) / timed(lambda: [engine.step() for _ in iter(lambda: bool(request.choices), True)])

    run = decode if kind == "decode" else prefill
    run(100)
    values = [run(1000 * (number + 1)) for number in range(repeats(what, options.repeats))]
    return {"tokens_per_s": values, "version": finback.__version__, "setting": native.level()}


def transformers(options: argparse.Namespace, what: str, loaded: dict) -> dict[str, Any]:
    """A forward call a token, with the faster of eager attention and sdpa; --compiled: the steps by torch.compile."""
    import torch
    import transformers

    if not loaded:
        loaded["model"] = transformers.AutoModelForCausalLM.from_pretrained(
            options.checkpoint, dtype=torch.bfloat16, attn_implementation="eager"
        ).eval()
    model, kind, count = loaded["model"], *what.split("-")
    vocabulary = model.config.vocab_size
    work = int(count) * (tokens(what) if kind == "decode" else 1)

    @torch.inference_mode()
    def seconds(seed: int, steps: int = tokens(what)) -> float:
        if kind == "decode":
            return decode_steps(model, int(count), steps, seed, options.compiled)
        prompt = torch.tensor([ids(int(count), vocabulary, seed)])
        return timed(lambda: model(prompt, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1))

    trials = {}
    for attention in ("eager",) if options.compiled else ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        seconds(100, FEW)
        trials[attention] = seconds(200, FEW)
    best = min(trials, key=lambda name: trials[name])
    model.set_attn_implementation(best)
    values = [work / seconds(1000 * (number + 1)) for number in range(repeats(what, options.repeats))]
    setting = best + (", torch.compile" if options.compiled else "")
    return {"tokens_per_s": values, "version": transformers.__version__, "setting": setting, "trials_s": trials}


def decode_steps(model: Any, rows: int, steps: int, seed: int, compiled: bool) -> float:
    """Seconds of `steps` forward calls after the prompts and one step that is not counted."""
    import torch
    from transformers.cache_utils import DynamicCache, StaticCache

    if compiled:
        cache = StaticCache(config=model.config, max_cache_len=DEPTH + tokens(f"decode-{rows}") + 2)
        if not hasattr(model, "compiled_step"):
            model.compiled_step = torch.compile(model.forward, dynamic=False)
        step = model.compiled_step
    else:
        cache, step = DynamicCache(config=model.config), model
    prompts = torch.tensor([ids(DEPTH, model.config.vocab_size, seed + row) for row in range(rows)])
    chosen = model(prompts, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
    start = 0.0
    for number in range(steps + 1):
        if number == 1:
            start = time.perf_counter()
        place = torch.full((rows, 1), DEPTH + number)
        chosen = step(chosen, past_key_values=cache, use_cache=True, position_ids=place).logits[:, -1:].argmax(-1)
    return time.perf_counter() - start


def vllm(options: argparse.Namespace, what: str, loaded: dict) -> dict[str, Any]:
    """Its own engine, stepped as ours is."""
    import vllm

    kind, count = what.split("-")
    if not loaded:
        longest = max([int(each.split("-")[1]) for each in options.what if each.startswith("prefill-")], default=0)
        batches = [int(each.split("-")[1]) for each in options.what if each.startswith("decode-")]
        loaded["model"] = vllm.LLM(
            model=str(options.checkpoint),
            dtype="bfloat16",
            max_model_len=max(longest, DEPTH + 128) + 16,
            max_num_seqs=max(batches, default=1),
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
    vocabulary = json.loads((options.checkpoint / "config.json").read_text())["vocab_size"]

    engine, steps = loaded["model"].llm_engine, tokens(what)
    rows, length = (int(count), DEPTH) if kind == "decode" else (1, int(count))

    def one(seed: int) -> float:
        most = steps + ROOM if kind == "decode" else 1
        sampling = vllm.SamplingParams(temperature=0.0, max_tokens=most, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        for row in range(rows):
            prompt = {"prompt_token_ids": ids(length, vocabulary, seed + row)}
            engine.add_request(f"{what}-{seed + row}", prompt, sampling)
        made: dict[str, int] = {}

        def step() -> None:
            made.update({each.request_id: len(each.outputs[0].token_ids) for each in engine.step()})

        while len(made) < rows:
            step()
        if kind == "prefill":
            return length / (time.perf_counter() - start)
        before, start = dict(made), time.perf_counter()
        while min(made[name] - before[name] for name in made) < steps:
            step()
        seconds = time.perf_counter() - start
        engine.abort_request(list(made))
        while engine.has_unfinished_requests():
            engine.step()
        return (sum(made.values()) - sum(before.values())) / seconds

    one(100)
    values = [one(1000 * (number + 1)) for number in range(repeats(what, options.repeats))]
    setting = "MLA off" if os.environ.get("VLLM_MLA_DISABLE") == "1" else ""
    return {"tokens_per_s": values, "version": vllm.__version__, "setting": setting}


def machine(options: argparse.Namespace, what: str, loaded: dict) -> dict[str, Any]:
    """Bytes/s that this machine reads, over as many as the checkpoint has, and its FLOP/s for each form of weights."""
    import torch

    from finback.evaluate.limits import machine_limits

    size = sum(file.stat().st_size for file in options.checkpoint.glob("*.safetensors"))
    slow = os.environ.get("ONEDNN_MAX_CPU_ISA") == "AVX2"  # below AVX-512 torch's bfloat16 products are emulated
    limits = machine_limits(4.0, size=min(512 << 20, size), side=512 if slow else 2048)
    products = {form: limits.product(kind) for form, kind in (("bfloat16", "bf16"), ("int8", "int8"), ("int4", "int4"))}
    return {"read": limits.bandwidth(), "product": products, "version": torch.__version__}


PEERS: dict[str, Callable[[argparse.Namespace, str, dict], dict[str, Any]]] = {
    "finback": finback,
    "transformers": transformers,
    "vllm": vllm,
    "machine": machine,
}


def measured(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    loaded: dict[str, Any] = {}
    for what in options.what:
        yield {"what": what} | PEERS[options.peer](options, what, loaded)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--form", default="bfloat16")
    parser.add_argument("--what", nargs="+", required=True)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=1, help="times what is usual")
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args()
    if options.threads and options.peer != "vllm":  # which sets its own, by its environment
        import torch

        torch.set_num_threads(options.threads)
    for line in measured(options):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
