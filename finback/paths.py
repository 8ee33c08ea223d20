"""Where things live: the models on this machine, the model that ships inside the package, atomic writes."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finback.errors import UserError

PACKAGE = Path(__file__).parent
DEFAULT_MODEL = "calf"


def home() -> Path:
    """The folder of pulled and trained models: `$FINBACK_HOME`, by default `~/.finback`."""
    return Path(os.environ.get("FINBACK_HOME") or Path.home() / ".finback").expanduser()


def model_folder(name: str) -> Path:
    """The folder of a model given as a path, a name under `home()/models`, or the name of a packaged model.

    Raises UserError that lists the names which exist.
    """
    candidates = [Path(name).expanduser(), home() / "models" / name, PACKAGE / "models" / name]
    for folder in candidates:
        if (folder / "config.json").is_file():
            return folder
    known = sorted({p.parent.name for root in candidates[1:] for p in root.parent.glob("*/config.json")})
    raise UserError(f"--model {name!r}: no folder with a config.json there; known models: {', '.join(known) or 'none'}")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it into place, else remove it."""
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
        if path.exists():
            old = temporary.with_suffix(".old")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # renamed after a success; else the first error is the one to tell
