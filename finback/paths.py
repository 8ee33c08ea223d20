"""Where things live: the models on this machine, the model that ships inside the package, atomic writes."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finback.errors import UserError

PACKAGE = Path(__file__).parent
DEFAULT_MODEL = "calf"
JSON_LIMIT = 200 << 20
MANIFEST = "finback.json"  # in each pulled folder: where it comes from, its files with their sizes and hashes


def home() -> Path:
    """The folder of pulled and trained models: `$FINBACK_HOME`, by default `~/.finback`."""
    return expanded(os.environ.get("FINBACK_HOME") or "~/.finback")


def prefix_folder() -> Path:
    """Where the prefix cache is kept on disk: `$FINBACK_HOME/prefix`."""
    return home() / "prefix"


def expanded(path: str | Path) -> Path:
    """The path with `~` and `~user` replaced. Raises UserError for a user who is not there."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: {error}") from None


def model_path(name: str) -> Path:
    """The folder or GGUF file of a model: a path, a name ("NAME", "ORG/NAME") under `home()/models`, or a packaged one.

    A folder without safetensors that holds one GGUF model (its first part, where it is split) means that. Raises
    UserError that lists the names which exist.
    """
    if not name.strip():
        raise UserError("--model: the name is empty; give a name, a folder or a GGUF file")
    roots = [] if Path(name).is_absolute() or ".." in Path(name).parts else _roots()  # a name stays inside its root
    for folder in [expanded(name), *(root / name for root in roots)]:
        if (path := _model_at(folder)) is not None:
            return path
    known = ", ".join(known for known, folder in installed() if (folder / "config.json").is_file())
    raise UserError(f"--model {name!r}: no folder with a config.json and no GGUF file; known models: {known or 'none'}")


def _model_at(place: Path) -> Path | None:
    if place.suffix == ".gguf" and place.is_file():
        return place
    if next(place.glob("*.safetensors"), None) is None:
        files = sorted((*place.glob("*.gguf"), *place.glob("*/*.gguf")))
        first = [file for file in files if "-of-" not in file.stem or "-00001-of-" in file.stem]
        if len(first) > 1:
            raise UserError(f"{place}: holds {len(first)} GGUF models; name one, as in --model {first[0]}")
        if first:
            return first[0]
    return place if (place / "config.json").is_file() else None


def installed() -> list[tuple[str, Path]]:
    """The models that names mean, with their folders; a user's hides the packaged one of the same name."""
    found: dict[str, Path] = {}
    for root in _roots():
        for pattern in ("*", "*/*"):  # a folder inside a model is not another model
            marks = ("config.json", MANIFEST, "*.gguf")
            folders = {file.parent for mark in marks for file in root.glob(f"{pattern}/{mark}")}
            for folder in folders:
                name = folder.relative_to(root)
                hidden = any(part.startswith(".") for part in name.parts)
                if not hidden and str(name.parent) not in found:
                    found.setdefault(name.as_posix(), folder)
    return sorted(found.items())


def _roots() -> list[Path]:
    return [home() / "models", PACKAGE / "models"]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises UserError when it is missing, no JSON, no object or absurdly large."""
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise UserError(f"{path}: {path.stat().st_size:,} bytes; a JSON file here has at most {JSON_LIMIT:,}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {type(value).__name__}, must hold a JSON object")
    return value


def check_writable(path: Path) -> None:
    """Raise UserError if `path` is there and is no regular file: a rename would replace a device as well."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is there and is no file; give another name")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it into place, else remove it."""
    check_writable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it takes the name `path` (replacing what was there)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield temporary
        temporary.chmod(0o755)
        replace_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # renamed after a success; else the first error is the one to tell


def replace_folder(new: Path, path: Path) -> None:
    """Give the folder `new` the name `path` on the same disk; what was there is deleted afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = new.with_name(f"{new.name}.old")
    if path.exists():
        path.rename(old)
    try:
        new.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    if old.exists():
        shutil.rmtree(old)


def remove_folder(path: Path) -> None:
    """Delete a folder: its name is gone at once, whatever happens to its files after that."""
    doomed = Path(tempfile.mkdtemp(dir=path.parent, prefix=".removed."))
    try:
        path.rename(doomed / path.name)
    finally:
        shutil.rmtree(doomed)
