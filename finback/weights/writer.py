"""From a `Model` to a model folder, in the original DeepSeek-V3 layout."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from finback.errors import UserError
from finback.kernels.quantise import BLOCK, FORMATS, Fp8
from finback.model.config import Config
from finback.model.decoder import Model
from finback.paths import MANIFEST, atomic_folder
from finback.text.tokenizer import Tokenizer
from finback.weights import layout, packs, store

FP8 = {"fp8": Fp8(), "fp8-ue8m0": Fp8(power_of_two=True)}


def save(
    model: Model,
    tokenizer: Tokenizer | None,
    folder: str | Path,
    *,
    greedy: bool = False,
    quantize: str | None = None,
    shard_limit: int = store.SHARD_LIMIT,
) -> None:
    """Write `model` to `folder` in the original layout, so that transformers, vLLM and llama.cpp read it too.

    Tensors keep their dtype; int8 and int4 matrices are written as what they stand for. `quantize="fp8"` stores the
    matrices in FP8 blocks, as DeepSeek does ("fp8-ue8m0": with power-of-two scales, as V3.1); those that already are
    FP8 stay as they are. Shards stay below `shard_limit` bytes. `greedy`: the model is meant to be decoded without
    sampling; otherwise its generation_config.json asks for R1's temperature 0.6 and top-p 0.95. The folder appears
    whole or not at all. An existing model folder is replaced, its other files (MODEL_CARD.md, …) are kept. Raises
    UserError when `folder` holds something that is not a model, or the disk is full.
    """
    if quantize is not None and quantize not in FP8:
        raise UserError(f"quantize={quantize!r}: a folder is written in {', '.join(FP8)}, or as it is")
    target = Path(folder).expanduser().resolve()
    if Path.cwd().is_relative_to(target) or (target.exists() and not _replaceable(target)):
        raise UserError(f"{target}: not an empty folder or a model folder; save into a folder of its own")
    dtype = str(model.decoder.embed_tokens.weight.dtype).removeprefix("torch.")
    try:
        with atomic_folder(target) as temporary:
            if target.is_dir():
                shutil.copytree(target, temporary, ignore=_written(target), symlinks=True, dirs_exist_ok=True)
            stored = _Stored(model, quantize)
            store.write(temporary, stored.entries(), shard_limit)
            _write_json(temporary / "config.json", _settings(model.config, dtype) | stored.settings())
            _write_json(temporary / "generation_config.json", _generation_config(model.config, tokenizer, greedy))
            if tokenizer is not None:
                tokenizer.save(temporary)
            for file in temporary.iterdir():
                _flush(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{target}: the model could not be written ({error}); what was there is unchanged") from None


class _Stored:
    """A model's tensors as they go to disk, one at a time."""

    def __init__(self, model: Model, quantize: str | None) -> None:
        self._model, self._quantize = model, quantize
        self._fp8, self._powers = False, True

    def entries(self) -> Iterator[tuple[str, Tensor]]:
        for place in (*layout.places(self._model), *layout.copies(self._model)):
            yield from self._tensors(place)

    def settings(self) -> dict[str, Any]:
        """What config.json says about the quantisation, once all entries were taken."""
        if not self._fp8:
            return {}
        how: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
        powers = {"scale_fmt": "ue8m0"} if self._powers else {}
        return {"quantization_config": how | powers | {"weight_block_size": [BLOCK, BLOCK]}}

    def _tensors(self, place: layout.Place) -> Iterator[tuple[str, Tensor]]:
        fp8, weight = FORMATS["fp8"], place.weight
        tensors = place.tensors
        if weight is not None and weight.form is not None and weight.form.name != fp8.name:
            tensors = {"": place.values()}
        if self._quantize and weight is not None and len(tensors) == 1 and not layout.is_kept(place.name):
            tensors = dict(zip(("", fp8.suffix), FP8[self._quantize].quantise(tensors[""]), strict=True))
        if len(tensors) == 2:
            self._fp8 = True
            self._powers &= bool((tensors[fp8.suffix].frexp().mantissa == 0.5).all())
        yield from ((place.name + suffix, tensor) for suffix, tensor in tensors.items())


def _settings(config: Config, dtype: str) -> dict[str, Any]:
    """config.json. Other readers apply YaRN whenever it is named, so it is named only where the model applies it."""
    return dataclasses.replace(config, rope_scaling=config.active_scaling).to_dict() | {"torch_dtype": dtype}


def _generation_config(config: Config, tokenizer: Tokenizer | None, greedy: bool) -> dict[str, Any]:
    """How to decode, with the special tokens of the tokenizer where there is one."""
    bos: int | None = tokenizer.bos_id if tokenizer else config.bos_token_id
    eos: int | list[int] | None = config.eos_token_id
    if tokenizer:
        eos = tokenizer.eos_id if len(tokenizer.eos_ids) == 1 else sorted(tokenizer.eos_ids)
    sampling = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
    return {"bos_token_id": bos, "eos_token_id": eos, **sampling}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _replaceable(folder: Path) -> bool:
    return folder.is_dir() and ((folder / "config.json").is_file() or not any(folder.iterdir()))


def _written(target: Path) -> Callable[[str, list[str]], Set[str]]:
    """What `save` writes itself, and so does not carry over; every other file of the folder is kept."""
    ours = ("config.json", "generation_config.json", "model*.safetensors", store.INDEX, packs.FOLDER, MANIFEST)
    patterns = shutil.ignore_patterns(*ours)
    return lambda folder, names: patterns(folder, names) if Path(folder) == target else set()


def _flush(file: Path) -> None:
    """Push a file to disk, so that the rename that follows cannot reveal an empty one after a crash."""
    if file.is_file():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
