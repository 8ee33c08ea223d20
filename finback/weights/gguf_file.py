"""GGUF files, in by the names of the families' own checkpoints, and out in BF16, Q8_0 or float32."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finback.errors import UserError
from finback.model.config import Config
from finback.model.decoder import Model
from finback.paths import atomic_file
from finback.progress import bar
from finback.text import Tokenizer, gguf_tokenizer
from finback.weights import layout, store
from finback.weights.gguf_keys import ARCHITECTURES, config_of, is_writable, metadata_of, rope_factors

KINDS = {"bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "f32": "ALL_F32"}
_SPLIT = re.compile(r"(.*-)00001-of-(\d{5})\.gguf")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+_proj)\.weight")
_HEADS = re.compile(r".*\.self_attn\.([qk])_proj\.(weight|bias)")
_FREQS = "rope_freqs.weight"


@dataclass(frozen=True)
class _Stored:
    """A tensor of a file, `size` bytes from `offset`; `kind` is the gguf library's type."""

    file: Path
    offset: int
    size: int
    shape: tuple[int, ...]
    kind: Any


class GGUF(store.Source):
    """The tensors of a GGUF file (or of all parts of a split one) under their original names, as floats.

    Opening reads and checks the headers: every offset lies within its file. Raises UserError for a damaged file,
    another architecture, and types of tensors that the gguf library does not dequantise.
    """

    def __init__(self, path: Path) -> None:
        self.where = path
        self.metadata: dict[str, Any] = {}
        self._tensors: dict[str, _Stored] = {}
        for part in parts(path):
            fields, tensors = _header(part)
            self.metadata = self.metadata or fields
            self._tensors |= tensors
        if "token_embd.weight" not in self._tensors:
            raise UserError(f"{path}: has no tensor 'token_embd.weight'; it holds no language model")
        factors = self._whole(_FREQS) if _FREQS in self._tensors else None
        tied = "output.weight" not in self._tensors
        self.config = config_of(self.metadata, self._tensors["token_embd.weight"].shape[0], tied, factors)

    @cached_property
    def _found(self) -> dict[str, tuple[tuple[str, ...], int | None]]:
        """Where each of the checkpoint's tensors is; who wants configuration or tokenizer alone needs none of it."""
        find = _names(self.config)
        with torch.device("meta"):
            wanted = [place.name for place in layout.places(Model(self.config))]
        places = {name: self._locate(*find(name)) for name in wanted}
        return {name: place for name, place in places.items() if place is not None}

    def names(self) -> set[str]:
        used = {name for names, _ in self._found.values() for name in names}
        # Some files hold kv_b whole and split.
        used |= {name.replace("attn_kv_b", part) for name in used for part in ("attn_k_b", "attn_v_b")}
        # Layers past the last are forgiven where the file announces them, as MTP's.
        announced = self.metadata.get(f"{self.metadata['general.architecture']}.block_count", 0)
        past = range(self.config.num_hidden_layers, announced)
        left = (name for name in self._tensors.keys() - used - {_FREQS} if _block(name) not in past)
        return self._found.keys() | {f"{name} (GGUF)" for name in left}

    def shape(self, name: str) -> tuple[int, ...]:
        names, expert = self._found[name]
        shape = self._tensors[names[0]].shape
        if len(names) == 2:  # keys [H, L, nope] and values [H, v, L]
            return shape[0] * (shape[2] + self._tensors[names[1]].shape[1]), shape[1]
        return shape if expert is None else shape[1:]

    def dtype(self, name: str) -> torch.dtype:
        """Of what is quantised: bfloat16, as which it is read where nothing else is asked for."""
        return store.FLOATS.get(self._tensors[self._found[name][0][0]].kind.name, torch.bfloat16)

    def position(self, name: str) -> tuple[str, int]:
        names, expert = self._found[name]
        tensor = self._tensors[names[0]]
        return tensor.file.name, tensor.offset + (expert or 0) * (tensor.size // tensor.shape[0])

    def panels(self, name: str) -> Iterator[tuple[int, Tensor]]:
        names, expert = self._found[name]
        shape, heads = self.shape(name), _dealt(self.config, name)
        whole: Tensor | None = None
        if len(names) == 2:
            keys, values = (self._whole(part) for part in names)
            whole = torch.cat((keys.transpose(1, 2), values), dim=1).flatten(0, 1)
        elif heads or len(shape) == 1:
            whole = self._whole(names[0])
            if heads:
                whole = whole.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        for start, stop in store.panel_rows(shape):
            if whole is not None:
                yield start, whole[start:stop]
            else:
                yield start, self._rows(names[0], (expert or 0) * shape[0] + start, stop - start)

    def into(self, name: str, out: Tensor) -> None:
        for start, values in self.panels(name):
            out[start : start + len(values)].copy_(values)

    def _locate(self, name: str, expert: int | None) -> tuple[tuple[str, ...], int | None] | None:
        """The tensors of the file that hold one of the checkpoint's, and which matrix of a stack it is."""
        split = tuple(name.replace("attn_kv_b", part) for part in ("attn_k_b", "attn_v_b"))
        if name not in self._tensors and self._tensors.keys() >= {*split} and split[0] != name:
            return (split, None) if all(len(self._tensors[part].shape) == 3 for part in split) else None
        if name not in self._tensors or (expert is not None and expert >= self._tensors[name].shape[0]):
            return None
        return (name,), expert

    def _whole(self, name: str) -> Tensor:
        shape = self._tensors[name].shape
        return self._rows(name, 0, torch.Size(shape[:-1]).numel()).view(shape)

    def _rows(self, name: str, start: int, count: int) -> Tensor:
        """Rows of a tensor, counted through all its matrices, as float32 [count, columns]."""
        quants, tensor = _library().quants, self._tensors[name]
        width = tensor.size // torch.Size(tensor.shape[:-1]).numel()
        data = np.fromfile(tensor.file, np.uint8, width * count, offset=tensor.offset + start * width)
        values = quants.dequantize(data.reshape(count, width), tensor.kind)
        if not np.isfinite(values.sum(dtype=np.float64)):  # no sum of float32 overflows there
            raise UserError(f"{tensor.file}: tensor {name!r} holds NaN or infinity; the file is damaged")
        return torch.from_numpy(np.asarray(values, np.float32))


def write(model: Model, tokenizer: Tokenizer, path: Path, kind: str) -> None:
    """Write `model` as a GGUF file, its matrices in `kind` ("bf16", "q8_0" or "f32"), all else in float32.

    MTP modules are left out: no reader of such files knows them. Raises UserError for what the format cannot say, and
    for a file that cannot be written; then there is none.
    """
    if not is_writable(model.config):
        raise UserError(f"{path}: GGUF files cannot hold this rope_scaling: {model.config.rope_scaling}")
    try:
        with atomic_file(path) as temporary:
            _write(model, tokenizer, temporary, kind)
    except OSError as error:
        raise UserError(f"{path}: the file could not be written ({error})") from None


def _write(model: Model, tokenizer: Tokenizer, path: Path, kind: str) -> None:
    gguf, config = _library(), model.config
    types = gguf.GGMLQuantizationType
    entries = list(_entries(model))
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.model_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType[KINDS[kind]])
    for key, value in (metadata_of(config) | gguf_tokenizer(tokenizer, config.vocab_size)).items():
        _add(writer, gguf.GGUFValueType, key, value)
    stored = []
    for name, shape, _ in entries:
        exact = len(shape) == 1 or "ffn_gate_inp" in name  # vectors and the router
        fits = kind != "q8_0" or shape[-1] % 32 == 0
        one = types.F32 if exact else types[kind.upper()] if fits else types.BF16
        bytes_shape = gguf.quants.quant_shape_to_byte_shape(shape, one)
        writer.add_tensor_info(name, bytes_shape, np.dtype(np.uint8), int(np.prod(bytes_shape)), one)
        stored.append(one)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with bar(sum(int(np.prod(shape)) for _, shape, _ in entries), f"Writing {path.name}") as progress:
        for (_, shape, make), one in zip(entries, stored, strict=True):
            values = make().detach().float().cpu().contiguous().numpy().reshape(shape)
            writer.write_tensor_data(gguf.quants.quantize(values, one).view(np.uint8))
            progress.advance(values.size)
    writer.close()


_Entry = tuple[str, tuple[int, ...], Callable[[], Tensor]]


def _entries(model: Model) -> Iterator[_Entry]:
    """The tensors of the file: name, shape, and how to make it."""
    config, find = model.config, _names(model.config)
    groups: dict[str, list[layout.Place]] = {}
    past = tuple(f"model.layers.{layer}." for layer in model.mtp)
    for place in layout.places(model):
        name, _ = find(place.name)
        if not place.name.startswith(past):
            assert not name.startswith("None"), f"{place.name} has no name in GGUF files"
            groups.setdefault(name, []).append(place)
    for name, places in groups.items():
        first, heads = places[0], _dealt(config, places[0].name)
        if "attn_kv_b" in name:
            yield from _split_kv_b(config, name, first)
        elif heads:
            yield name, first.shape, partial(_deal, first, heads)
        elif _EXPERT.fullmatch(first.name):
            yield name, (len(places), *first.shape), partial(_stack, places)
        else:
            yield name, first.shape, first.values
    if config.model_type == "llama" and config.rope_scaling is not None:
        yield _FREQS, (config.rope_dim // 2,), lambda: rope_factors(config)


def _deal(place: layout.Place, heads: int) -> Tensor:
    return place.values().unflatten(0, (heads, 2, -1)).transpose(1, 2)


def _stack(places: list[layout.Place]) -> Tensor:
    return torch.stack([place.values() for place in places])


def _split_kv_b(config: Config, name: str, place: layout.Place) -> Iterator[_Entry]:
    """W_UK [H, L, nope] and W_UV [H, v, L], as llama.cpp's absorbed attention wants them."""
    heads, nope, value = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    rank = place.shape[1]

    def part(rows: slice) -> Tensor:
        return place.values().unflatten(0, (heads, -1))[:, rows]

    yield name.replace("kv_b", "k_b"), (heads, rank, nope), lambda: part(slice(nope)).transpose(1, 2)
    yield name.replace("kv_b", "v_b"), (heads, value, rank), lambda: part(slice(nope, None))


def _dealt(config: Config, name: str) -> int:
    """The heads of a tensor whose halves llama.cpp deals out to neighbours, as its rotation wants them; else 0."""
    found = _HEADS.fullmatch(name)
    if found is None or config.model_type not in ("llama", "deepseek"):
        return 0
    return config.num_attention_heads if found[1] == "q" else config.kv_heads


def _names(config: Config) -> Callable[[str], tuple[str, int | None]]:
    """From a checkpoint's name to the file's, and the number of the matrix in its stack."""
    gguf = _library()
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[config.model_type])
    table = gguf.get_tensor_name_map(arch, config.num_hidden_layers)

    def find(name: str) -> tuple[str, int | None]:
        expert = _EXPERT.fullmatch(name)
        stem, _, kind = (f"{expert[1]}.{expert[3]}.weight" if expert else name).rpartition(".")
        if kind == "e_score_correction_bias":
            stem, kind = f"{stem}.e_score_correction", "bias"
        return f"{table.get_name(stem)}.{kind}", int(expert[2]) if expert else None

    return find


def _block(name: str) -> int | None:
    found = re.match(r"blk\.(\d{1,6})\.", name)
    return None if found is None else int(found[1])


def _add(writer: Any, types: Any, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        kinds = {bool: types.BOOL, int: types.UINT32, float: types.FLOAT32, str: types.STRING}
        writer.add_key_value(key, value, kinds[type(value)])


def parts(path: Path) -> list[Path]:
    """The files of a split model, given its first one."""
    found = _SPLIT.fullmatch(path.name)
    if found is None:
        return [path]
    files = [path.with_name(f"{found[1]}{number:05d}-of-{found[2]}.gguf") for number in range(1, int(found[2]) + 1)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{path}: its parts {', '.join(missing[:3])} are missing; all must lie in one folder")
    return files


def _header(path: Path) -> tuple[dict[str, Any], dict[str, _Stored]]:
    """Metadata and tensors of one file, everything within its bounds."""
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    return _parsed(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=32)  # a vocabulary takes seconds to parse; size and time tell a changed file
def _parsed(path: Path, _size: int, _time: int) -> tuple[dict[str, Any], dict[str, _Stored]]:
    gguf = _library()

    class Bounded(gguf.GGUFReader):  # type: ignore[misc, name-defined]
        """Where the library's reader would take what is there, or go on for ever, past the end is an error."""

        def _get(self, offset: int, dtype: Any, count: int = 1, *rest: Any, **more: Any) -> Any:
            if not 0 <= int(offset) + np.dtype(dtype).itemsize * int(count) <= len(self.data):
                raise ValueError(f"offset {int(offset):,} lies past the end")
            return super()._get(offset, dtype, count, *rest, **more)

        def _get_field_parts(self, offset: int, kind: int) -> Any:
            if kind == gguf.GGUFValueType.ARRAY and int(self._get(offset + 4, np.uint64)[0]) > len(self.data) - offset:
                raise ValueError(f"an array at offset {int(offset):,} has more elements than the file has bytes")
            return super()._get_field_parts(offset, kind)

    try:
        reader = Bounded(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (OSError, ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        raise UserError(f"{path}: not a whole GGUF file ({error}); copy or download it again") from None
    tensors = {}
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape.tolist()))
        block = gguf.GGML_QUANT_SIZES[tensor.tensor_type][0]
        if not shape or min(shape) < 1 or shape[-1] % block:
            raise UserError(f"{path}: tensor {tensor.name!r} has the shape {list(shape)}; the file is damaged")
        if not _readable(tensor.tensor_type):
            what = f"tensor {tensor.name!r} is {tensor.tensor_type.name}, which cannot be read"
            raise UserError(f"{path}: {what}; take the model in another type")
        place = int(tensor.data_offset), int(tensor.n_bytes)
        tensors[tensor.name] = _Stored(path, *place, shape, tensor.tensor_type)
    return fields, tensors


@cache
def _readable(kind: Any) -> bool:
    """Whether the library turns this type into numbers, tried on one block: it has no list of those it does."""
    gguf = _library()
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files need the gguf library: pip install 'finback[gguf]'") from None
    return gguf
