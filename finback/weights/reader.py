"""From a model on disk to a `Model`: what it holds is checked first, then streamed into place."""

import dataclasses
from collections.abc import Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finback import machine
from finback.errors import UserError
from finback.kernels.native import kernels
from finback.kernels.quantise import FORMATS
from finback.model.config import Config
from finback.model.decoder import Model
from finback.model.fused import lay_out, make_room
from finback.model.moe import Router
from finback.model.sizes import memory
from finback.model.weight import PackedWeight
from finback.paths import model_path, read_json
from finback.progress import bar
from finback.text import Tokenizer, tokenizer_from_gguf
from finback.weights import layout, packs, store
from finback.weights.disk import DiskWeight, HotExperts
from finback.weights.gguf_file import GGUF

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@torch.inference_mode(False)  # made in inference mode, parameters could not be filled by threads, nor trained
def load(
    name_or_path: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    quantize: str | None = None,
    *,
    context: int = 4096,
    force: bool = False,
    expert_memory: int | None = None,
    native: bool = True,
) -> Model:
    """Load a model by path (a folder, or a GGUF file), or by name from the models on this machine, in eval mode.

    `dtype`: "auto" keeps the checkpoint's (FP8 matrices stay FP8), or one of float32, bfloat16, float16. `quantize`:
    int8, int4 or fp8 packs the matrices while they are read; the result is kept beside the model and read next time.
    Router weights and correction biases are float32 always. Tensors stream into place: there is no second copy.
    `native`: bfloat16 and packed matrices on the CPU are laid out for the native kernels where there are any
    (model.fused.lay_out); such a model cannot be trained. `expert_memory`: routed experts stay on disk and at most so
    many bytes of them in memory; such a model computes what the resident one does without native kernels and cannot be
    trained either; `model.expert_cache` counts (weights.disk.HotExperts).

    Raises UserError for a folder that does not hold what its config.json describes, naming the tensor; and, unless
    `force`, for a model that with a cache of `context` tokens has no room in this machine's memory.
    """
    if quantize is not None and quantize not in FORMATS:
        raise UserError(f"quantize={quantize!r} is not known; allowed: {', '.join(FORMATS)}")
    path, config, settings = read_config(name_or_path)
    source = open_source(path)
    config = without_absent_mtp(config, source)
    fp8_stored = stored_fp8(settings, path)
    kept, place = _dtype(dtype, source), _device(device)
    form = quantize or ("fp8" if fp8_stored and dtype == "auto" else None)
    if not force and place.type == "cpu":
        check_room(str(name_or_path), config, kept, form, context, expert_memory, native)
    with torch.device("meta"):
        model = Model(config)
        check(source, model)
        if form is not None:
            pack(model, form, kept, source if quantize is None else None)
    hot = None if expert_memory is None else HotExperts(model, expert_memory, kept, place)
    native = native and hot is None and place.type == "cpu"
    if native and kept == torch.bfloat16:
        make_room(model)
    _materialise(model, kept, place)
    cached = packs.find(model, path, quantize, kept) if quantize is not None else None
    fill(model, cached or source, path.name)
    if hot is not None:
        hot.connect(cached or source)  # a matrix that is not packed yet is packed whenever it is read
        model.expert_cache = hot
        model.requires_grad_(False)
    if quantize is not None and cached is None:
        written = packs.keep(model, path, quantize, kept)
        if hot is not None and written is not None:
            hot.connect(written)
    model.eval()
    if native:
        lay_out(model)
    return model


def open_source(path: Path) -> store.Source:
    """The tensors of a model folder or GGUF file."""
    return store.Checkpoint(path) if path.is_dir() else GGUF(path)


def read_config(name_or_path: str | Path) -> tuple[Path, Config, dict[str, Any]]:
    """Where a model is (a folder, or a GGUF file), its configuration, and the config.json that it was read from."""
    path = model_path(str(name_or_path))
    if path.is_file():
        config = GGUF(path).config
        return path, config, config.to_dict()
    store.check_links(path)
    settings = read_json(path / "config.json")
    try:
        return path, Config.from_dict(settings), settings
    except UserError as error:
        raise UserError(f"{path}/{error}") from None


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """Load the tokenizer of a model folder, or of a GGUF file; names resolve as in `load`."""
    path = model_path(str(name_or_path))
    if path.is_file():
        return tokenizer_from_gguf(GGUF(path).metadata)
    store.check_links(path)
    return Tokenizer.load(path)


def check_room(
    name: str,
    config: Config,
    dtype: torch.dtype,
    form: str | None,
    context: int,
    experts: int | None = None,
    laid_out: bool = True,
) -> None:
    """Raise UserError, with the arithmetic and with what would fit, unless model and cache fit into free memory.

    `experts`: at most so many bytes of routed experts are in memory. `laid_out`: for native kernels, if there are any.
    """
    free = machine.memory_free()
    laid_out = laid_out and kernels() is not None
    panels = laid_out and dtype == torch.bfloat16 and experts is None
    need = memory(config, dtype.itemsize, form, context, experts, panels)
    if free is None or need.total <= free:
        return
    forms = {f"--quantize {name}": memory(config, 2, name, context, None, laid_out).total for name in FORMATS}
    forms |= {"--dtype bfloat16": memory(config, 2, None, context, None, laid_out).total}
    left = int((free - memory(config, dtype.itemsize, form, context, 0).total) / 1.05) >> 20
    if left << 20 > 3 * config.hidden_size * config.moe_intermediate_size * dtype.itemsize:  # at least one expert
        forms |= {f"--expert-memory {left}MiB": memory(config, dtype.itemsize, form, context, left << 20).total}
    sizes = sorted(((size, option) for option, size in forms.items() if size <= free), reverse=True)
    fitting = ", ".join(f"{option} ({_gib(size)})" for size, option in sizes)
    raise UserError(
        f"{name}: needs {_gib(need.total)} of memory: weights {_gib(need.weights)} + cache {_gib(need.cache)} "
        f"({min(context, config.max_position_embeddings):,} tokens) + margin {_gib(need.margin)}; {_gib(free)} are "
        f"free. What would fit: {fitting or 'none of its forms, only a smaller model'} (--force tries all the same)"
    )


def pack(model: Model, form: str, dtype: torch.dtype, source: store.Source | None = None) -> None:
    """Give the model's matrices their packed form, empty; those that are FP8 in `source`, or all where it is None.

    In FP8 what DeepSeek keeps in BF16 stays dense. In int8 and int4 the head is int8, a tied one as well: the embedding
    stays as it is, and the head becomes a packed copy of it.
    """
    chosen = FORMATS[form]
    owners = {weight: (owner, name) for owner in model.modules() for name, weight in owner.named_children()}
    names = None if source is None else source.names()
    for weight, name in {place.weight: place.name for place in list(layout.places(model))}.items():
        if weight is None or (names is not None and name + chosen.suffix not in names):
            continue
        if form == "fp8" and source is None and layout.is_kept(name):
            continue
        used = FORMATS["int8"] if name == layout.HEAD else chosen
        setattr(*owners[weight], PackedWeight(used, weight, dtype))
    head = model.decoder.lm_head
    if form != "fp8" and head.weight.form is None:  # tied: a checkpoint has no place for it
        head.weight = PackedWeight(FORMATS["int8"], head.weight, dtype)


def fill(model: Model, source: store.Source, name: str) -> None:
    """Read every tensor of the model from `source` but experts on disk, in the order of its files, several at once."""
    names = source.names()
    places = (place for place in layout.held(model) if not isinstance(place.weight, DiskWeight))
    todo = sorted(places, key=lambda place: source.position(place.stored(names)))
    total = sum(tensor.nbytes for place in todo for tensor in place.kinds.values())

    @torch.no_grad()
    def read(place: layout.Place) -> int:
        return place.read(source, names)

    with bar(total, f"Loading {name}", in_bytes=True) as progress, ThreadPoolExecutor(min(4, machine.cpus())) as pool:
        for done in pool.map(read, todo):
            progress.advance(done)


def without_absent_mtp(config: Config, source: store.Source) -> Config:
    """The config of what the file holds: many files announce an MTP layer that was never written."""
    if layout.has_layer(source.names(), config.num_hidden_layers):
        return config
    return dataclasses.replace(config, num_nextn_predict_layers=0)


def stored_fp8(settings: dict[str, Any], folder: Path) -> bool:
    """Whether the checkpoint is quantised as DeepSeek does it; UserError for any other way."""
    how = settings.get("quantization_config")
    if not how:
        return False
    if not isinstance(how, dict) or how.get("quant_method") != "fp8" or how.get("weight_block_size") != [128, 128]:
        raise UserError(
            f"{folder / 'config.json'}: quantization_config = {how}; of quantised checkpoints only FP8 in blocks of "
            "128 x 128 (DeepSeek's own) and GGUF files are read: take the BF16 one and load it with --quantize"
        )
    return True


def check(source: store.Source, model: Model) -> None:
    """Raise UserError unless the file holds exactly the model's tensors, each in its shape and a readable dtype."""
    where, names = source.where, source.names()
    expected = {place.name: place for place in layout.places(model)}
    if missing := expected.keys() - names:
        raise UserError(f"{where}: the checkpoint lacks {_list(missing)}, which its config.json asks for")
    scales = {place.name + FORMATS["fp8"].suffix for place in expected.values() if place.weight is not None}
    twins = {place.name: place for place in layout.copies(model) if place.name in names}
    unexpected = names - expected.keys() - scales - twins.keys()
    if unexpected := {name for name in unexpected if not layout.IGNORED.search(name)}:
        raise UserError(f"{where}: the checkpoint holds {_list(unexpected)}, unknown to its config.json")
    for name, place in (expected | twins).items():
        stored = source.dtype(name)
        fp8 = stored == FORMATS["fp8"].code_dtype and place.weight is not None
        if not fp8 and stored not in store.FLOATS.values():
            allowed = f"{', '.join(store.FLOATS)}, for matrices F8_E4M3"
            raise UserError(f"{where}: tensor {name!r} is stored as {stored}; allowed: {allowed}")
        if fp8 != ((scale := name + FORMATS["fp8"].suffix) in names):
            raise UserError(f"{where}: tensor {name!r} is {'FP8 without' if fp8 else 'not FP8 and has'} {scale!r}")
        if fp8 and source.dtype(scale) not in (*store.FLOATS.values(), torch.float8_e8m0fnu):
            raise UserError(f"{where}: tensor {scale!r} is stored as {source.dtype(scale)}; scales are floats")
        wanted = {name: place.shape} | ({scale: FORMATS["fp8"].shapes(*place.shape)[1]} if fp8 else {})
        for part, shape in wanted.items():
            if source.shape(part) != shape:
                raise UserError(
                    f"{where}: tensor {part!r} is {list(source.shape(part))}, its config.json asks for {list(shape)}"
                )


def _list(names: Set[str]) -> str:
    shown = ", ".join(repr(name) for name in sorted(names)[:3])
    return f"tensor {shown}" if len(names) == 1 else f"{len(names)} tensors ({shown}{', …' if len(names) > 3 else ''})"


def _materialise(model: Model, dtype: torch.dtype, device: torch.device) -> None:
    """Give every meta parameter of the model memory, uninitialised; buffers start at zero. What is shared stays so."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in made:
                kept = torch.float32 if isinstance(module, Router) else dtype
                made[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=kept, device=device))
            setattr(module, name, made[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype, device=device))


def _dtype(dtype: str | torch.dtype, source: store.Source) -> torch.dtype:
    if dtype == "auto":
        return source.dtype(layout.EMBEDDING) if layout.EMBEDDING in source.names() else torch.float32  # named later
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise UserError(f"dtype {name!r} is not known; allowed: auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _device(device: str | torch.device) -> torch.device:
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {str(device)!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return chosen


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
