"""Packed weights kept beside their model, so that they are quantised once: packs/int8-bfloat16/ in its folder."""

import json
import warnings
from pathlib import Path

import torch

from finback.errors import UserError
from finback.model.decoder import Model
from finback.paths import atomic_folder
from finback.weights import layout, store

FOLDER = "packs"
_STAMP = "pack.json"
_VERSION = 1
_SHARD = 64 * 2**20


def find(model: Path, form: str, dtype: torch.dtype) -> Path | None:
    """The folder of a pack made from exactly these files, or None."""
    kept = _place(model, form, dtype)
    try:
        made_from = store.read_json(kept / _STAMP)
    except UserError:
        return None
    return kept if made_from == _stamp(model) else None


def keep(packed: Model, model: Path, form: str, dtype: torch.dtype) -> None:
    """Write a packed model's tensors beside the checkpoint; where that cannot be, a warning says so."""
    try:
        with atomic_folder(_place(model, form, dtype)) as temporary:
            parts = [(p.name + suffix, tensor) for p in layout.places(packed) for suffix, tensor in p.tensors.items()]
            # Small shards: each is copied on its way to disk, beside a model that may just fit.
            store.write(temporary, parts, max(_SHARD, sum(tensor.nbytes for _, tensor in parts) // 256))
            (temporary / _STAMP).write_text(json.dumps(_stamp(model)), encoding="utf-8")
    except OSError as error:
        warnings.warn(f"{model}: the packed weights could not be kept ({error})", stacklevel=2)


def _place(model: Path, form: str, dtype: torch.dtype) -> Path:
    folder, name = (model, "") if model.is_dir() else (model.parent, f"{model.stem}-")
    return folder / FOLDER / f"{name}{form}-{str(dtype).removeprefix('torch.')}"


def _stamp(model: Path) -> dict[str, object]:
    """What a pack is made from: every weight file's name, size and time."""
    weights = sorted(model.glob("*.safetensors") if model.is_dir() else model.parent.glob("*.gguf"))
    files = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in weights}
    return {"version": _VERSION, "files": files}
