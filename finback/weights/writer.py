"""From a `Model` to a model folder, in the original DeepSeek-V3 layout."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from finback.errors import UserError
from finback.model.config import Config
from finback.model.decoder import Model
from finback.paths import atomic_folder
from finback.text.tokenizer import Tokenizer
from finback.weights import layout, store

# What `save` writes itself; every other file of the folder is kept.
_WRITTEN = shutil.ignore_patterns("config.json", "generation_config.json", "model*.safetensors", store.INDEX)


def save(model: Model, tokenizer: Tokenizer | None, folder: str | Path, shard_limit: int = store.SHARD_LIMIT) -> None:
    """Write `model` to `folder` in the original layout, so that transformers, vLLM and llama.cpp read it too.

    Tensors keep their dtype; shards stay below `shard_limit` bytes. The folder appears whole or not at all. An existing
    model folder is replaced, its other files (MODEL_CARD.md, …) are kept. Raises UserError when `folder` holds
    something that is not a model.
    """
    target = Path(folder).expanduser().resolve()
    if target == Path.cwd() or (target.exists() and not _replaceable(target)):
        raise UserError(f"{target}: not an empty folder or a model folder; save into a folder of its own")
    dtype = str(model.decoder.embed_tokens.weight.dtype).removeprefix("torch.")
    with atomic_folder(target) as temporary:
        if target.is_dir():
            shutil.copytree(target, temporary, ignore=_WRITTEN, symlinks=True, dirs_exist_ok=True)
        store.write(temporary, [*layout.tensors(model), *layout.copies(model)], shard_limit)
        _write_json(temporary / "config.json", model.config.to_dict() | {"torch_dtype": dtype})
        _write_json(temporary / "generation_config.json", _generation_config(model.config, tokenizer))
        if tokenizer is not None:
            tokenizer.save(temporary)
        for file in temporary.iterdir():
            _flush(file)


def _generation_config(config: Config, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """DeepSeek-R1's sampling defaults, with the special tokens of the tokenizer where there is one."""
    bos, eos = (tokenizer.bos_id, tokenizer.eos_id) if tokenizer else (config.bos_token_id, config.eos_token_id)
    return {"bos_token_id": bos, "eos_token_id": eos, "do_sample": True, "temperature": 0.6, "top_p": 0.95}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _replaceable(folder: Path) -> bool:
    return folder.is_dir() and ((folder / "config.json").is_file() or not any(folder.iterdir()))


def _flush(file: Path) -> None:
    """Push a file to disk, so that the rename that follows cannot reveal an empty one after a crash."""
    if file.is_file():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
