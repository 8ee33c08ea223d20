"""Packed weights kept beside their model, so that they are quantised once: packs/int8-bfloat16/ in its folder."""

import json
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError

from finback.errors import UserError
from finback.model.decoder import Model
from finback.model.sizes import memory
from finback.paths import atomic_folder, read_json
from finback.weights import layout, store
from finback.weights.gguf_file import parts

FOLDER = "packs"
_STAMP = "pack.json"
_VERSION = 1
_SHARD = 64 * 2**20


def find(packed: Model, model: Path, form: str, dtype: torch.dtype) -> store.Source | None:
    """A pack made from exactly these files that holds just what `packed` needs, or None."""
    kept = _place(model, form, dtype)
    try:
        if read_json(kept / _STAMP) != _stamp(model):
            return None
        source = store.Checkpoint(kept)
        wanted = {p.name + suffix: t for p in layout.held(packed) for suffix, t in p.kinds.items()}
        whole = wanted.keys() == source.names() and all(source.shape(n) == t.shape for n, t in wanted.items())
        return source if whole else None
    except UserError:  # damaged: it is made anew
        return None


def keep(packed: Model, model: Path, form: str, dtype: torch.dtype) -> store.Source | None:
    """Write a packed model's tensors beside the checkpoint; where that cannot be, a warning says so."""
    try:
        with atomic_folder(_place(model, form, dtype)) as temporary:
            # One at a time: those of experts on disk are read when their turn comes.
            held = ((p.name + suffix, tensor) for p in layout.held(packed) for suffix, tensor in p.tensors.items())
            # Small shards: each is copied on its way to disk, beside a model that may just fit.
            whole = memory(packed.config, dtype.itemsize, form, 0).weights
            store.write(temporary, held, max(_SHARD, whole // 256))
            (temporary / _STAMP).write_text(json.dumps(_stamp(model)), encoding="utf-8")
        return store.Checkpoint(_place(model, form, dtype))
    except (OSError, SafetensorError) as error:
        warnings.warn(f"{model}: the packed weights could not be kept ({error})", stacklevel=2)
        return None


def _place(model: Path, form: str, dtype: torch.dtype) -> Path:
    folder, name = (model, "") if model.is_dir() else (model.parent, f"{model.stem}-")
    return folder / FOLDER / f"{name}{form}-{str(dtype).removeprefix('torch.')}"


def _stamp(model: Path) -> dict[str, object]:
    """What a pack is made from: every weight file's name, size and time."""
    weights = [*sorted(model.glob("*.safetensors")), model / "config.json"] if model.is_dir() else parts(model)
    files = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in weights}
    return {"version": _VERSION, "files": files}
