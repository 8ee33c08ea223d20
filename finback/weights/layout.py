"""The names the families' checkpoints use on disk: the only place that knows them.

Source: DeepSeek-V3 `README_WEIGHTS.md`, `inference/convert.py`; transformers' models of the same names.
"""

import re
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace

from torch import Tensor

from finback.model.decoder import Model
from finback.model.weight import Index, Weight
from finback.weights import store

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
# Tables that old converters stored and every loader recomputes.
IGNORED = re.compile(r"rotary_emb\.inv_freq$")
_STACKS = {"gate_up": ("gate", "up"), "down": ("down",)}


@dataclass(frozen=True)
class Place:
    """A tensor of a checkpoint and where it lives in the model.

    `tensors`: views by what their names on disk add to `name`: one, or the codes ("") and scales of a packed matrix.
    `weight`: whose matrix number `index` this is; None for what is no matrix product's (norms, embedding, router).
    `twin`: the tensor of a checkpoint that has the same numbers, where a checkpoint does not hold this one.
    """

    name: str
    tensors: dict[str, Tensor]
    shape: tuple[int, ...]
    weight: Weight | None = None
    index: Index = ()
    twin: str = ""

    def stored(self, names: Set[str]) -> str:
        """Which of `names` it is read from."""
        whole = all(self.name + suffix in names for suffix in self.tensors)
        return self.name if whole or not self.twin else self.twin

    def values(self) -> Tensor:
        """The tensor itself, what is packed dequantised."""
        if self.weight is not None and self.weight.form is not None:
            codes, scale = self.tensors.values()
            return self.weight.form.dequantise(codes, scale, self.shape[-1], self.weight.dtype)
        return self.tensors[""]

    def read(self, source: store.Source, names: Set[str]) -> int:
        """Fill it from `source`, which holds `names`; returns its bytes."""
        parts = {self.name + suffix: tensor for suffix, tensor in self.tensors.items()}
        # Numbers, or codes with their scales, as they are to be held; else floats, to be rounded or packed.
        if parts.keys() <= names and source.dtype(self.name) == self.tensors[""].dtype:
            for part, tensor in parts.items():
                source.into(part, tensor)
        else:
            for start, values in source.panels(self.stored(names)):
                self.fill(start, values)
        return sum(tensor.nbytes for tensor in parts.values())

    def fill(self, start: int, values: Tensor) -> None:
        """Store rows start .. start + len(values) - 1 of it, given as floats."""
        if self.weight is None:
            self.tensors[""][start : start + len(values)].copy_(values)
        else:
            self.weight.fill(self.index, start, values)


def places(model: Model) -> Iterator[Place]:
    """Every tensor on disk with its place in the model, in the order of the layers.

    An expert stack `gate_up [E, 2F, D]` is 2E matrices on disk (`gate_proj` and `up_proj` of each expert) and
    `down [E, D, F]` is E. A tied head has no place of its own.
    """
    kept = model.state_dict().keys()
    for path, module in model.named_modules():
        if isinstance(module, Weight):
            if not (model.config.tie_word_embeddings and _disk_name(path) == HEAD):
                yield from matrices(path, module)
            continue
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if (full := f"{path}.{name}") in kept:
                yield Place(_disk_name(full), {"": value.data}, tuple(value.shape))


def held(model: Model) -> Iterator[Place]:
    """`places`, and the head of a tied model where it is packed: then it has numbers of its own, the embedding's."""
    yield from places(model)
    head = model.decoder.lm_head.weight
    if model.config.tie_word_embeddings and head.form is not None:
        yield from (replace(place, twin=EMBEDDING) for place in matrices("decoder.lm_head.weight", head))


def copies(model: Model) -> Iterator[Place]:
    """The copies of embedding and head in each MTP layer, and a tied head's: allowed in a file, never loaded."""
    embedding, tied = model.decoder.embed_tokens.weight, model.config.tie_word_embeddings
    twins = [HEAD] if tied else []
    twins += [f"model.layers.{layer}.shared_head.head.weight" for layer in model.mtp]
    for name in (f"model.layers.{layer}.embed_tokens.weight" for layer in model.mtp):
        yield Place(name, {"": embedding.data}, tuple(embedding.shape))
    for name in twins:
        head = embedding if tied else model.decoder.lm_head.weight.dense()
        yield Place(name, {"": head.data}, tuple(head.shape))


def is_kept(name: str) -> bool:
    """Whether DeepSeek's FP8 checkpoints keep this matrix in BF16: the head, and what joins the halves for MTP."""
    return name == HEAD or name.endswith(".eh_proj.weight")


def has_layer(names: set[str], layer: int) -> bool:
    """Whether any of these tensors on disk belongs to the layer."""
    return any(name.startswith(f"model.layers.{layer}.") for name in names)


def matrices(path: str, weight: Weight, first: int = 0) -> Iterator[Place]:
    """The matrices of the module at `path`; `weight` may hold a part of its stack, from expert `first` on."""
    shape = (weight.shape[-2] // weight.parts, weight.shape[-1])
    prefix, _, stack = path.rpartition(".")
    for index, tensors in weight.pieces():
        name = f"{prefix}.{first + index[0]}.{_STACKS[stack][index[1]]}_proj.weight" if index else path
        yield Place(_disk_name(name), tensors, shape, weight, index)


def _disk_name(path: str) -> str:
    if path.startswith("mtp."):
        _, layer, rest = path.split(".", 2)
        rest = (
            rest.removeprefix("block.") if rest.startswith("block.") else re.sub(r"^norm\.", "shared_head.norm.", rest)
        )
        return f"model.layers.{layer}.{rest}"
    path = path.removeprefix("decoder.")
    return path if path.startswith("lm_head.") else f"model.{path}"
