"""Folders of safetensors files: one tensor at a time in, shards and their index out."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from finback.errors import UserError

SHARD_LIMIT = 5 * 10**9
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises UserError when it is missing, is not JSON, or is not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {type(value).__name__}, must hold a JSON object")
    return value


class Checkpoint:
    """The tensors of a model folder, read on demand; opening it reads headers only.

    Raises UserError for a missing, truncated or damaged file, and for a tensor that is not BF16, F16 or F32.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        indexed = self._index()
        files = {file: self._open(file) for file in sorted(set(indexed.values())) or [SINGLE]}
        held = {file: set(handle.keys()) for file, handle in files.items()}
        for name, file in indexed.items():
            if name not in held[file]:
                raise UserError(f"{folder / INDEX}: says tensor {name!r} is in {file}, which does not hold it")
        where = indexed or dict.fromkeys(held[SINGLE], SINGLE)
        self._where = {name: files[file] for name, file in where.items()}

    def names(self) -> set[str]:
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._where[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        stored = self._where[name].get_slice(name).get_dtype()
        if stored not in DTYPES:
            raise UserError(
                f"{self.folder}: tensor {name!r} is stored as {stored}; this version reads {', '.join(DTYPES)}: "
                "convert the checkpoint to BF16 first"
            )
        return DTYPES[stored]

    def tensor(self, name: str) -> Tensor:
        """The tensor on the CPU, backed by the file: copy it into its place, do not keep it."""
        return self._where[name].get_tensor(name)

    def _index(self) -> dict[str, str]:
        path = self.folder / INDEX
        if (self.folder / SINGLE).is_file() or not path.is_file():
            return {}
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{path}: has no 'weight_map' from tensor names to files")
        for file in set(weight_map.values()):
            if Path(str(file)).name != file:
                raise UserError(f"{path}: names the file {file!r}; only files of the same folder are allowed")
        return weight_map

    def _open(self, file: str) -> Any:
        path = self.folder / file
        if not path.is_file():
            raise UserError(f"{path}: missing; the folder must hold {SINGLE}, or {INDEX} and the files it names")
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a whole safetensors file ({error}); copy or download it again") from None


def write(folder: Path, entries: Iterable[tuple[str, Tensor]], limit: int = SHARD_LIMIT) -> None:
    """Write named tensors as `model.safetensors`, or as shards of at most `limit` bytes and their index.

    Only one shard is held in memory beside the model. A tensor above the limit gets a shard of its own.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, tensor in entries:
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # Copied, because experts are views of one stack and safetensors refuses tensors that share storage.
        owned = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in shard.items()}
        save_file(owned, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(owned, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
