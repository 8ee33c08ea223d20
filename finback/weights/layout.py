"""The names the families' checkpoints use on disk: the only place that knows them.

Source: DeepSeek-V3 `README_WEIGHTS.md`, `inference/convert.py`; transformers' models of the same names.
"""

import re
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace

from torch import Tensor

from finback.kernels.quantise import Format
from finback.model.decoder import Model
from finback.model.weight import Index, PanelWeight, Weight
from finback.weights import store

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
# Tables that old converters stored and every loader recomputes.
IGNORED = re.compile(r"rotary_emb\.inv_freq$")
_STACKS = {"gate_up": ("gate", "up"), "down": ("down",)}


@dataclass(frozen=True)
class Place:
    """A tensor of a checkpoint and where it lives in the model.

    `weight`: whose matrix number `index` this is; None for what is no matrix product's (norms, embedding, router): that
    is `own`. `twin`: the tensor of a checkpoint that has the same numbers, where it does not hold this one.
    """

    name: str
    shape: tuple[int, ...]
    own: Tensor | None = None
    weight: Weight | None = None
    index: Index = ()
    twin: str = ""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By what their names on disk add to `name`: one, or the codes ("") and scales of a packed matrix."""
        return {"": self.own} if self.own is not None else self._owner.piece(self.index)

    @property
    def kinds(self) -> dict[str, Tensor]:
        """The same, of which nothing but types and shapes is looked at."""
        return {"": self.own} if self.own is not None else self._owner.stored()

    @property
    def _owner(self) -> Weight:
        assert self.weight is not None
        return self.weight

    def stored(self, names: Set[str]) -> str:
        """Which of `names` it is read from."""
        whole = all(self.name + suffix in names for suffix in self.kinds)
        return self.name if whole or not self.twin else self.twin

    def values(self) -> Tensor:
        """The tensor itself, what is packed dequantised."""
        if self.weight is not None and self.weight.form is not None:
            codes, scale = self.tensors.values()
            return self.weight.form.dequantise(codes, scale, self.shape[-1], self.weight.dtype)
        return self.tensors[""]

    def read(self, source: store.Source, names: Set[str]) -> int:
        """Fill it from `source`, which holds `names`; returns its bytes."""
        kinds, weight = self.kinds, self.weight
        # Numbers, or codes with their scales, as they are to be held; else floats, to be rounded or packed.
        exact = all(self.name + part in names for part in kinds) and source.dtype(self.name) == kinds[""].dtype
        if exact and not isinstance(weight, PanelWeight):
            for suffix, tensor in self.tensors.items():
                source.into(self.name + suffix, tensor)
        elif exact and isinstance(weight, PanelWeight) and weight.form is not None:
            self._lay(source, weight, weight.form)
        else:
            for start, values in source.panels(self.stored(names)):
                self.fill(start, values)
        return sum(tensor.nbytes for tensor in kinds.values())

    def _lay(self, source: store.Source, weight: PanelWeight, form: Format) -> None:
        """Codes and scales into panels, some rows at a time: no plain copy ever stands."""
        for start, stop in store.panel_rows(self.shape):
            scales = form.scale_rows(slice(start, stop))
            scale = source.rows(self.name + form.suffix, scales.start, scales.stop)
            weight.lay(self.index, start, source.rows(self.name, start, stop), scale.to(form.scale_dtype))

    def fill(self, start: int, values: Tensor) -> None:
        """Store rows start .. start + len(values) - 1 of it, given as floats."""
        if self.weight is None:
            assert self.own is not None
            self.own[start : start + len(values)].copy_(values)
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
                yield Place(_disk_name(full), tuple(value.shape), value.data)


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
        yield Place(name, tuple(embedding.shape), embedding.data)
    for name in twins:
        head = embedding if tied else model.decoder.lm_head.weight.dense()
        yield Place(name, tuple(head.shape), head.data)


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
    for index in weight.indices():
        name = f"{prefix}.{first + index[0]}.{_STACKS[stack][index[1]]}_proj.weight" if index else path
        yield Place(_disk_name(name), shape, None, weight, index)


def _disk_name(path: str) -> str:
    if path.startswith("mtp."):
        _, layer, rest = path.split(".", 2)
        rest = (
            rest.removeprefix("block.") if rest.startswith("block.") else re.sub(r"^norm\.", "shared_head.norm.", rest)
        )
        return f"model.layers.{layer}.{rest}"
    path = path.removeprefix("decoder.")
    return path if path.startswith("lm_head.") else f"model.{path}"
