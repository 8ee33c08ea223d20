"""A model from one form on disk to another, and the proof that one is whole."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from finback.errors import UserError
from finback.model.decoder import Model
from finback.paths import MANIFEST, check_writable, expanded, model_path, read_json
from finback.progress import bar
from finback.text import Tokenizer, gguf_split
from finback.weights import gguf_file, layout, reader, store, writer

PICKLES = ("*.bin", "*.pt", "*.pth")
_KEPT = ("LICENSE*", "README.md", "MODEL_CARD.md")
_TRAINER_FILES = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*)\.(bin|pt|pth)")


def convert(
    name_or_path: str, out: Path, dtype: str = "auto", quantize: str | None = None, force: bool = False
) -> list[str]:
    """Write a model anew: into the folder `out` in its family's layout, or into the file `out` if it ends in .gguf.

    `dtype` as `load` has it. `quantize`: "fp8" or "fp8-ue8m0" (power-of-two scales) for a folder; "bf16" (also the
    default), "q8_0" or "f32" for GGUF. A folder whose weights are pickles is read by a limited process that unpickles
    tensors alone. The whole model must have room in memory. Returns remarks for the user; raises UserError for what
    cannot be, and then writes nothing.
    """
    out = expanded(out)
    to_gguf = out.suffix.lower() == ".gguf"
    allowed = tuple(gguf_file.KINDS) if to_gguf else tuple(writer.FP8)
    if quantize is not None and quantize not in allowed:
        what = "a GGUF file" if to_gguf else "a folder"
        raise UserError(f"--quantize {quantize}: {what} can be written in {', '.join(allowed)}")
    if to_gguf:
        check_writable(out)
    place = expanded(name_or_path)
    with _unpickled(place) if _pickles(place) else _as_it_is(name_or_path) as source:
        tokenizer = _tokenizer(source)
        if tokenizer is None and to_gguf:
            raise UserError(f"{source}: no tokenizer.json; a GGUF file needs the tokenizer of its model")
        model = reader.load(source, dtype=dtype, force=force, native=False)
        if not to_gguf:
            writer.save(model, tokenizer, out, quantize=quantize)
            for pattern in _KEPT if source.is_dir() else ():
                for file in source.glob(pattern):
                    if file.is_file() and not (out / file.name).exists():  # into itself: there already
                        shutil.copyfile(file, out / file.name)
            return [] if tokenizer else [f"{source} has no tokenizer.json: {out} has none either"]
        assert tokenizer is not None
        gguf_file.write(model, tokenizer, out, quantize or "bf16")
        return list(_gguf_remarks(model, tokenizer))


def verify(name_or_path: str) -> dict[str, Any]:
    """Read everything of a model: files as they were pulled, headers, names and shapes, every number.

    Returns what was read and under "problems" a line for each thing that is wrong.
    """
    path = model_path(name_or_path)
    holders = (folder for folder in (path, *path.parents[:2]) if (folder / MANIFEST).is_file())
    problems = [line for folder in list(holders)[:1] for line in _changed_files(folder)]
    tensors, tokenizer = 0, None
    try:
        _, config, settings = reader.read_config(path)
        reader.stored_fp8(settings, path)
        source = reader.open_source(path)
        with torch.device("meta"):
            model = Model(reader.without_absent_mtp(config, source))
        reader.check(source, model)
        names = source.names()
        places = [*layout.places(model), *(place for place in layout.copies(model) if place.name in names)]
        places.sort(key=lambda place: source.position(place.name))
        with bar(len(places), f"Reading {path.name}") as progress:
            for place in places:
                try:
                    for _ in source.panels(place.name):
                        pass
                except UserError as error:
                    problems.append(str(error))
                tensors += 1
                progress.advance()
        tokenizer = _tokenizer(path)
        if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
            what = f"{tokenizer.vocab_size:,} tokens, the model {config.vocab_size:,}"
            problems.append(f"{path}: the tokenizer has {what}; they do not belong together")
        if path.is_dir() and (path / "generation_config.json").is_file():
            read_json(path / "generation_config.json")
    except UserError as error:
        problems.append(str(error))
    found = {"model": name_or_path, "path": str(path), "tensors": tensors, "tokenizer": tokenizer is not None}
    return found | {"problems": problems}


def _changed_files(folder: Path) -> Iterator[str]:
    """Where a pulled folder differs from what was pulled."""
    from finback.weights.hub import manifest_of

    try:
        files = manifest_of(folder).files
    except (OSError, ValueError) as error:
        yield f"{folder / MANIFEST}: cannot be read ({str(error).splitlines()[0]})"
        return
    with bar(sum(entry.size for entry in files.values()), "Hashing", in_bytes=True) as progress:
        for name, entry in sorted(files.items()):
            path = folder / name
            if not path.is_file():
                yield f"{path}: missing; pull the model again"
            elif path.stat().st_size != entry.size:
                yield f"{path}: {path.stat().st_size:,} bytes, was {entry.size:,} when pulled; pull the model again"
            else:
                with open(path, "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                        yield f"{path}: its SHA-256 is not the one it was pulled with; pull the model again"
            progress.advance(entry.size)


def _gguf_remarks(model: Model, tokenizer: Tokenizer) -> Iterator[str]:
    if gguf_split(tokenizer) is None:
        yield "other programs have no name for how this tokenizer splits text and may split it differently"
    if model.mtp:
        yield "the MTP modules are left out: no reader of GGUF files knows them"


def _tokenizer(source: Path) -> Tokenizer | None:
    """The model's tokenizer, None where there is none at all."""
    if source.is_dir() and not any((source / name).is_file() for name in ("tokenizer.json", "tiktoken.model")):
        return None
    return reader.load_tokenizer(source)


def _pickles(folder: Path) -> list[Path]:
    """The files to unpickle: those of a folder without safetensors."""
    if not (folder / "config.json").is_file() or next(folder.glob("*.safetensors"), None):
        return []
    found = [file for pattern in PICKLES for file in sorted(folder.glob(pattern))]
    return [file for file in found if not _TRAINER_FILES.fullmatch(file.name)]


@contextmanager
def _as_it_is(name_or_path: str) -> Iterator[Path]:
    yield model_path(name_or_path)


@contextmanager
def _unpickled(folder: Path) -> Iterator[Path]:
    """The folder once more, its weights as safetensors, for as long as it is needed."""
    store.check_links(folder)
    with tempfile.TemporaryDirectory(prefix="finback-") as name:
        temporary = Path(name)
        files = [str(file) for file in _pickles(folder)]
        command = [sys.executable, "-I", str(Path(__file__).with_name("unpickle.py")), str(temporary), *files]
        environment = {key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR", "LANG") if key in os.environ}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"]
            why = next((line for line in lines if "WeightsUnpickler error" in line), lines[-1]).strip()
            raise UserError(f"{folder}: its pickles cannot be read as weights alone ({why[:300]}); nothing was written")
        for file in folder.iterdir():
            if file.is_file() and (file.suffix in (".json", ".md", ".model") or file.name.startswith("LICENSE")):
                shutil.copyfile(file, temporary / file.name)
        (temporary / store.INDEX).unlink(missing_ok=True)
        yield temporary
