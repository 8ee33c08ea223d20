"""What the tests of `finback pull` share: a repository, the hub that serves it, and a pull from it."""

import random

import pytest
from hostile_hub import Hub

from finback.errors import UserError

WEIGHTS = random.Random(1).randbytes(300_000)
FILES = {
    "config.json": b'{"hidden_size": 8}\n',
    "model-00001-of-00002.safetensors": WEIGHTS,
    "model-00002-of-00002.safetensors": WEIGHTS[:70_000],
    "tokenizer.json": b"{}",
    "LICENSE": b"MIT",
    "empty.txt": b"",
    "README.md": b"# Minke\n",
    "modeling_minke.py": b"import os",
    "LICENSE.py": b"import os",
    ".gitattributes": b"*.bin",
    ".hidden.json": b"{}",
    "finback.json": b"{}",
    "inference/config.json": b"{}",
    "figures/niah.png": b"png",
    "pytorch_model.bin": b"pickle",
}
TAKEN = {
    *("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "tokenizer.json"),
    *("LICENSE", "empty.txt", "README.md"),
}
BIG = "model-00001-of-00002.safetensors"


@pytest.fixture
def home(monkeypatch, tmp_path):
    """An empty home, and an environment that says nothing of hubs and proxies."""
    for name in ("HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("FINBACK_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def hub():
    with Hub(dict(FILES)) as server:
        yield server
        server.shutdown()


class Waits(list):
    """Remembers how long it was to wait, and does not."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


def bring(hub, waits=None, **options):
    from finback.weights.hub import pull  # not at the top: conftest.py reads this file, and torch takes seconds

    return pull("whales/minke", endpoint=hub.url, wait=Waits() if waits is None else waits, **options)


def contents(folder) -> dict[str, bytes]:
    """The files of a folder, but for the manifest."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found.pop("finback.json", None)
    return found


def served(hub, names=TAKEN) -> dict[str, bytes]:
    return {name: hub.files[name] for name in names}


def refused(home, hub, match, **options):
    """A pull that fails with one line that matches, and installs nothing."""
    with pytest.raises(UserError, match=match) as failure:
        bring(hub, **options)
    assert "\n" not in str(failure.value)
    assert not (home / "models" / "whales").exists()
    assert {path.name for path in home.parent.iterdir()} <= {"home"}
