"""The names DeepSeek-V3 checkpoints use on disk: the only place that knows them.

Source: DeepSeek-V3 `README_WEIGHTS.md`, `inference/convert.py`; transformers' `deepseek_v3`.
"""

import re
from collections.abc import Iterator

from torch import Tensor

from finback.model.decoder import Model

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
# Tables that old converters stored and every loader recomputes.
IGNORED = re.compile(r"rotary_emb\.inv_freq$")
_EXPERTS = re.compile(r"^(.*\.experts)\.(gate_up|down)\.value$")


def tensors(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Every tensor on disk with its place in the model, a view: written from to save, copied into to load.

    An expert stack `gate_up [E, 2F, D]` is 2E tensors on disk (`gate_proj` and `up_proj` of each expert) and
    `down [E, D, F]` is E. A tied head has no tensor of its own.
    """
    for name, value in model.state_dict().items():
        experts = _EXPERTS.match(name)
        if experts:
            yield from _expert_tensors(_disk_name(experts[1]), experts[2], value)
        elif not (model.config.tie_word_embeddings and _disk_name(name) == HEAD):
            yield _disk_name(name), value


def copies(model: Model) -> Iterator[tuple[str, Tensor]]:
    """The copies of embedding and head that each MTP layer keeps, and a tied head's: allowed in a file, never read."""
    embedding, head = model.decoder.embed_tokens.weight, model.decoder.lm_head.weight.dense()
    if model.config.tie_word_embeddings:
        yield HEAD, head
    for layer in model.mtp:
        yield f"model.layers.{layer}.embed_tokens.weight", embedding
        yield f"model.layers.{layer}.shared_head.head.weight", head


def has_layer(names: set[str], layer: int) -> bool:
    """Whether any of these tensors on disk belongs to the layer."""
    return any(name.startswith(f"model.layers.{layer}.") for name in names)


def _expert_tensors(prefix: str, stack: str, value_EXX: Tensor) -> Iterator[tuple[str, Tensor]]:
    for expert, matrix in enumerate(value_EXX):
        parts = zip(("gate", "up"), matrix.chunk(2), strict=True) if stack == "gate_up" else [("down", matrix)]
        for part, tensor in parts:
            yield f"{prefix}.{expert}.{part}_proj.weight", tensor


def _disk_name(parameter: str) -> str:
    name = parameter.removesuffix(".value")
    if name.startswith("mtp."):
        _, layer, rest = name.split(".", 2)
        rest = (
            rest.removeprefix("block.") if rest.startswith("block.") else re.sub(r"^norm\.", "shared_head.norm.", rest)
        )
        return f"model.layers.{layer}.{rest}"
    name = name.removeprefix("decoder.")
    return name if name.startswith("lm_head.") else f"model.{name}"
