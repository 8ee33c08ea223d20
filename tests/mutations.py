"""Planted bugs: each is put into a copy of the package, and the tests named beside it must then fail.

Every room lists its own in `tests/mutations_<room>.py` as `MUTATIONS`. `tests/test_mutations.py` runs them all.
"""

import atexit
import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import nanobind

from finback.kernels import native

ROOT = Path(__file__).parent.parent
CXX = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing"]
_LOCK = threading.Lock()
LIMIT_S = 300

# An editable install finds the package by a hook that comes before the path; in the copy it must not.
SITECUSTOMIZE = """import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__name__.startswith("ScikitBuild")]
"""


@dataclass(frozen=True)
class Mutation:
    """One planted bug: in `file` (under finback/) `old`, which occurs exactly once, becomes `new`.

    `tests` are pytest names that must catch it: "test_x.py" or "test_x.py::test_name", under tests/. `why` says what
    the bug would be in life.
    """

    file: str
    old: str
    new: str
    tests: Sequence[str]
    why: str


def everything() -> list[Mutation]:
    """The planted bugs of all rooms."""
    modules = sorted(path.stem for path in Path(__file__).parent.glob("mutations_*.py"))
    return [mutation for name in modules for mutation in importlib.import_module(name).MUTATIONS]


def copy(target: Path) -> None:
    """A copy of all that tests use. Models are linked: they are large, and no bug is planted in them."""
    leave = shutil.ignore_patterns("__pycache__", "models")
    for name in ("finback", "tests"):
        shutil.copytree(ROOT / name, target / name, ignore=leave)
    if (ROOT / "finback" / "models").is_dir():
        (target / "finback" / "models").symlink_to(ROOT / "finback" / "models")
    for module in (
        find_spec(f"finback.kernels._{level}") for level in native.LEVELS | native.BY_NAME
    ):  # built, not in sources
        if module is not None and module.origin is not None:
            shutil.copy(module.origin, target / "finback" / "kernels")
    for name in ("pyproject.toml", "README.md", "recipes"):
        (target / name).symlink_to(ROOT / name)
    (target / "sitecustomize.py").write_text(SITECUSTOMIZE)


def plant(mutation: Mutation, target: Path) -> None:
    """Put the bug into the copy at `target`."""
    path = target / "finback" / mutation.file
    text = path.read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1, f"{mutation.file}: {mutation.old!r} occurs {text.count(mutation.old)} times"
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    if path.parent.name == "cpu":
        build(target)


@cache
def _binding() -> tuple[str, Path]:
    """nanobind's headers, and its own code compiled: once for all bugs in native code."""
    root = Path(nanobind.__file__).parent
    made = Path(tempfile.mkdtemp()) / "nanobind.o"
    atexit.register(shutil.rmtree, made.parent, ignore_errors=True)
    include = (
        f"-I{root / 'include'}",
        f"-I{root / 'ext' / 'robin_map' / 'include'}",
        f"-I{sysconfig.get_path('include')}",
    )
    flags = " ".join(include)
    subprocess.run(["c++", *CXX, *include, "-c", str(root / "src" / "nb_combined.cpp"), "-o", str(made)], check=True)
    return flags, made


def build(target: Path) -> None:
    """Compile the AVX2 kernels of the copy at `target`: every processor that runs any path runs this one."""
    with _LOCK:
        include, binding = _binding()
    source, out = target / "finback" / "kernels" / "cpu" / "module.cpp", target / "finback" / "kernels"
    name = f"_avx2{sysconfig.get_config_var('EXT_SUFFIX')}"
    options = ["-shared", "-mavx2", "-mfma", "-mf16c", "-fopenmp", "-DFINBACK_MODULE=_avx2", *include.split()]
    subprocess.run(["c++", *CXX, *options, str(source), str(binding), "-o", str(out / name)], check=True)


def run(tests: Sequence[str], target: Path, limit_s: int = LIMIT_S) -> subprocess.CompletedProcess[str]:
    """Run `tests` on the copy at `target`. pytest's exit code: 0 passed, 1 failed, else it could not run them."""
    environment = {**os.environ, "PYTHONPATH": str(target), "CI": "true", "PYTEST_ADDOPTS": "", "OMP_NUM_THREADS": "1"}
    options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=mutation"]
    command = [sys.executable, "-m", "pytest", *options, *(f"tests/{test}" for test in tests)]
    return subprocess.run(command, cwd=target, env=environment, capture_output=True, text=True, timeout=limit_s)
