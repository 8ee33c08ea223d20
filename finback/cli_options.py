"""Options that several commands share."""

from typing import Annotated, Literal

import typer

from finback import machine

Model = Annotated[str, typer.Option("--model", help="A model's name, its folder, or a GGUF file.")]
Think = Annotated[bool, typer.Option("--think/--no-think", help="Think before answering.")]
MaxTokens = Annotated[
    int | None, typer.Option(help="New tokens at most, thinking included. [default: the context's rest]")
]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy. [default: the model's generation_config.json]")]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16 or auto, the checkpoint's. [default: auto; without native kernels float32 up to 1 GiB]"
    ),
]
Quantize = Annotated[
    Literal["int8", "int4", "fp8"] | None,
    typer.Option(help="Pack the weights; kept beside the model for the next time. [default: as they are stored]"),
]
Force = Annotated[bool, typer.Option("--force", help="Load even what memory seems too small for.")]
ExpertMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Leave the routed experts on disk, at most so much of them in memory: 4GiB. [default: all in memory]",
    ),
]
Speculate = Annotated[Literal["off", "auto", "mtp", "ngram"], typer.Option(help="Guess tokens ahead.")]
CacheFormat = Annotated[
    Literal["bfloat16", "float32", "int8", "fp8"] | None, typer.Option(help="[default: entries as they are computed]")
]
ThinkingTokens = Annotated[
    int | None, typer.Option(help="Tokens of thinking at most; then the answer. [default: no limit of its own]")
]
PrefixCache = Annotated[
    bool, typer.Option("--prefix-cache", help="Keep what is computed of prompts on disk for the next time.")
]
Seed = Annotated[int, typer.Option(help="Equal seeds give equal results.")]


def expert_bytes(expert_memory: str | None) -> int | None:
    """--expert-memory in bytes; UserError for what is no size."""
    return None if expert_memory is None else machine.parse_bytes(expert_memory, "--expert-memory")
