"""Folders of safetensors files: rows of one tensor at a time in, shards and their index out."""

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from finback.errors import UserError
from finback.kernels.quantise import BLOCK, FORMATS
from finback.paths import read_json

SHARD_LIMIT = 5 * 10**9
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_DTYPES = {
    **FLOATS,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_READ = 2 << 20  # bytes at a time: checked for NaN while they are still in cache
_PANEL = 8 << 20


def check_links(folder: Path) -> None:
    """Raise UserError for a link that leads out of the folder, except into the blobs of a hub's cache around it."""
    allowed = (folder.resolve(), folder.resolve().parent.parent / "blobs")
    for path in folder.iterdir():
        leads = Path(os.path.realpath(path))  # where a loop is no error
        if path.is_symlink() and not any(leads.is_relative_to(root) for root in allowed):
            raise UserError(f"{path}: a link to {leads}, outside of the model's folder; copy the file there")


class Source(ABC):
    """Where a model's tensors are read from, by their names in the layout of the families. `where` is for messages."""

    where: Path

    @abstractmethod
    def names(self) -> set[str]: ...

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]: ...

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """As stored; raises UserError for a type that cannot be read."""

    @abstractmethod
    def position(self, name: str) -> tuple[str, int]:
        """File and offset: reading in this order is reading forwards."""

    def ahead(self, names: Sequence[str]) -> None:  # noqa: B027  a hint: none is needed
        """Tell the system that these tensors are read next, so that a disk fetches them together."""

    @abstractmethod
    def panels(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """The tensor as floats, a panel of rows at a time with the number of its first row, a multiple of 128."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start .. stop - 1 of the tensor's own numbers; of codes too, where the source can hold any."""
        return torch.cat([values for _, values in self.panels(name)])[start:stop]

    @abstractmethod
    def into(self, name: str, out: Tensor) -> None:
        """The tensor's own numbers, codes included, into `out` of the same shape, on any device."""


class _Entry(NamedTuple):
    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]


class Checkpoint(Source):
    """The tensors of a model folder, read on demand; opening it reads headers only, and nothing is mapped into memory.

    Raises UserError for a missing, truncated or damaged file, for a tensor of an unknown type, and for one that holds
    NaN or infinity. FP8 matrices with their `_scale_inv` read as floats.
    """

    def __init__(self, folder: Path) -> None:
        self.where = folder
        indexed = self._index()
        held = {file: _header(folder / file) for file in sorted(set(indexed.values())) or [SINGLE]}
        for name, file in indexed.items():
            if name not in held[file]:
                raise UserError(f"{folder / INDEX}: says tensor {name!r} is in {file}, which does not hold it")
        where = indexed or dict.fromkeys(held[SINGLE], SINGLE)
        self._entries = {name: held[file][name] for name, file in where.items()}

    def names(self) -> set[str]:
        return set(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        stored = self._entries[name].dtype
        if stored not in _DTYPES:
            raise UserError(f"{self.where}: tensor {name!r} is stored as {stored}; allowed: {', '.join(_DTYPES)}")
        return _DTYPES[stored]

    def position(self, name: str) -> tuple[str, int]:
        return self._entries[name].file.name, self._entries[name].offset

    def ahead(self, names: Sequence[str]) -> None:
        for name in names if hasattr(os, "posix_fadvise") else ():
            entry = self._entries[name]
            size = math.prod(entry.shape) * self.dtype(name).itemsize
            with open(entry.file, "rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), entry.offset, size, os.POSIX_FADV_WILLNEED)

    def into(self, name: str, out: Tensor) -> None:
        if out.dtype != self.dtype(name) or out.device.type != "cpu" or not out.is_contiguous():
            for start, stop in panel_rows(self.shape(name)):
                part = self.rows(name, start, stop)
                out[start:stop].copy_(part.float() if part.dtype == torch.float8_e8m0fnu else part)
            return
        entry = self._entries[name]
        flat = out.view(-1).view(torch.uint8)
        with open(entry.file, "rb", buffering=0) as file:
            for start in range(0, len(flat), _READ):
                part = flat[start : start + _READ]
                self._read(name, file.fileno(), entry.offset + start, part)
                self._check_finite(name, part.view(out.dtype))

    def panels(self, name: str) -> Iterator[tuple[int, Tensor]]:
        shape, dtype = self.shape(name), self.dtype(name)
        fp8 = FORMATS["fp8"]
        scale = self._whole(name + fp8.suffix).float() if dtype == fp8.code_dtype else None
        for start, stop in panel_rows(shape):
            part = self.rows(name, start, stop)
            if scale is not None:
                part = fp8.dequantise(part, scale[fp8.scale_rows(slice(start, stop))], shape[-1], torch.float32)
            yield start, part

    def _whole(self, name: str) -> Tensor:
        return self.rows(name, 0, self.shape(name)[0])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        entry = self._entries[name]
        out = torch.empty(stop - start, *entry.shape[1:], dtype=self.dtype(name))
        offset = entry.offset + start * (out.nbytes // max(stop - start, 1))
        with open(entry.file, "rb", buffering=0) as file:
            self._read(name, file.fileno(), offset, out.view(-1).view(torch.uint8))
        self._check_finite(name, out)
        return out

    def _read(self, name: str, handle: int, offset: int, out_bytes: Tensor) -> None:
        view, done = memoryview(out_bytes.numpy().data), 0
        while done < len(view):
            got = os.preadv(handle, [view[done:]], offset + done)
            if not got:
                raise UserError(f"{self._entries[name].file}: ends within tensor {name!r}; copy or download it again")
            done += got

    def _check_finite(self, name: str, part: Tensor) -> None:
        if part.dtype == torch.float8_e4m3fn:
            bad = bool((part.view(torch.uint8) & 127).eq(127).any())
        elif part.dtype == torch.float8_e8m0fnu:
            bad = bool(part.view(torch.uint8).eq(255).any())
        else:
            # A sum passes NaN and infinity on, and is far faster than a look at every number; float16's would overflow.
            wide = torch.float32 if part.dtype == torch.float16 else None
            doubtful = part.is_floating_point() and not part.sum(dtype=wide).isfinite()
            bad = doubtful and not part.isfinite().all()
        if bad:
            raise UserError(f"{self._entries[name].file}: tensor {name!r} holds NaN or infinity; the file is damaged")

    def _index(self) -> dict[str, str]:
        path = self.where / INDEX
        if (self.where / SINGLE).is_file() or not path.is_file():
            return {}
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{path}: has no 'weight_map' from tensor names to files")
        for file in weight_map.values():
            if not isinstance(file, str) or Path(file).name != file:
                raise UserError(f"{path}: names the file {file!r}; only files of the same folder are allowed")
        return weight_map


def panel_rows(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Rows of a tensor to handle at a time: whole blocks of 128, a few megabytes as float32."""
    row = 4 * torch.Size(shape[1:]).numel()
    step = max(_PANEL // max(row, 1) // BLOCK, 1) * BLOCK
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def _header(path: Path) -> dict[str, _Entry]:
    """Where every tensor of a file lies. The library vouches for it: sizes, no overlap, no gap, the whole file."""
    if not path.is_file():
        pickles = "; its pickles are read by finback convert alone" if next(path.parent.glob("*.bin"), None) else ""
        raise UserError(f"{path}: missing; the folder must hold {SINGLE}, or {INDEX} and the files it names{pickles}")
    try:
        with safe_open(path, framework="pt"):
            pass
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); copy or download it again") from None
    header.pop("__metadata__", None)
    return {
        name: _Entry(path, 8 + size + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
        for name, entry in header.items()
    }


def write(folder: Path, entries: Iterable[tuple[str, Tensor]], limit: int = SHARD_LIMIT) -> None:
    """Write named tensors as `model.safetensors`, or as shards of at most `limit` bytes and their index.

    Only one shard is held in memory beside the model. A tensor above the limit gets a shard of its own.
    """
    shard: dict[str, Tensor] = {}
    shards: list[list[str]] = []
    size = total = 0

    def flush() -> None:
        shards.append(list(shard))
        save_file(shard, path := folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors writes for the owner alone
        shard.clear()

    for name, tensor in entries:
        if shard and size + tensor.nbytes > limit:
            flush()
            size = 0
        # Copied, because experts are views of one stack and safetensors refuses tensors that share storage.
        shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
