"""llama.cpp for benchmarks/peers.py: its files, its commands, and what they print."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peers_worker import DEPTH, repeats, tokens

from finback import UserError
from finback.model import Config

FILES = {"bfloat16": "bf16", "int8": "q8_0", "int4": "q4_k_m"}
TOOLS = ("llama-bench", "llama-batched-bench")


def absent(folder: Path | None) -> str | None:
    """Why it cannot run; None where it can."""
    if folder is None:
        return "no --llama-bin"
    missing = [tool for tool in TOOLS if not (folder / tool).is_file()]
    return f"{folder} has no {' and no '.join(missing)}" if missing else None


def file_of(checkpoint: Path, form: str, folder: Path, tools: Path) -> Path:
    """The GGUF file of a form, made if there is none: by `finback convert`, Q4_K_M by llama-quantize."""
    path = folder / f"{checkpoint.name}-{FILES[form]}.gguf"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    if form == "int4":
        source, partial = file_of(checkpoint, "bfloat16", folder, tools), path.with_suffix(".partial")
        command = [str(tools / "llama-quantize"), str(source), str(partial), "Q4_K_M"]
    else:
        partial = path
        command = [sys.executable, "-m", "finback", "convert", str(checkpoint), str(path), "--quantize", FILES[form]]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be made ({error})") from None
    if done.returncode:
        raise UserError(f"{path}: {command[0]} failed: {(done.stderr or done.stdout).strip()[-300:]}")
    partial.rename(path)
    return path


def command(what: str, file: Path, tools: Path, threads: int, times: int = 1) -> list[str]:
    """llama-bench for one sequence, llama-batched-bench for several; weights in memory of their own, not mapped.

    So that they lie in huge pages, as ours do: a mapped file cannot.
    """
    kind, count = what.split("-")
    base = ["-m", str(file), "-fa", "1", "-t", str(threads), "-lm", "none"]
    if kind == "decode" and count != "1":
        room = int(count) * 1024
        sizes = ["-c", str(room), "-npp", str(DEPTH), "-ntg", str(tokens(what)), "-npl", ",".join([count] * times)]
        return [str(tools / TOOLS[1]), *base, *sizes, "--output-format", "jsonl"]
    sizes = ["-p", "0", "-n", str(tokens(what)), "-d", str(DEPTH)] if kind == "decode" else ["-p", count, "-n", "0"]
    return [str(tools / TOOLS[0]), *base, *sizes, "-r", str(repeats(what, times)), "-o", "jsonl"]


def parse(what: str, output: str) -> Iterator[dict[str, Any]]:
    """The measurement in what either tool printed, as a worker would print it; nothing where there is none."""
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    values = [value for line in lines for value in line.get("samples_ts", [line.get("speed_tg")])]
    if values and None not in values:
        yield {"what": what, "tokens_per_s": values, "version": lines[0].get("build_commit", "")}


def bytes_read(file: Path, config: Config, rows: int) -> float:
    """Bytes of weights that a pass over `rows` tokens reads, by the sizes of the file's own tensors.

    Of stacked experts as many as are expected to be chosen by one token or more (finback.model.sizes.bytes_read).
    """
    from gguf import GGUFReader

    sizes = {tensor.name: (int(tensor.n_bytes), tensor.shape.tolist()) for tensor in GGUFReader(file).tensors}
    chosen = config.num_experts_per_tok / config.n_routed_experts if config.n_routed_experts else 0.0
    share = 1 - (1 - chosen) ** rows
    tied, total = "output.weight" not in sizes, 0.0
    for name, (size, shape) in sizes.items():
        if name == "token_embd.weight" and not tied:
            total += rows * size / shape[-1]
        else:
            total += size * share if "_exps." in name else size
    return total
