"""The rules of the house: who may import whom, how long things may be, what is never used. CONTRIBUTING.md says why."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "finback"

# A file imports from its own folder and from floors below; ALSO lists the one neighbour that may be used.
FLOORS = [
    {"errors", "machine", "progress", "paths"},
    {"tasks", "kernels"},
    {"model", "text"},
    {"engine", "weights"},
    {"train", "evaluate", "serve", "plan"},
    {"__init__", "__main__", "cli", "cli_bench", "cli_models", "cli_options", "about", "doctor", "terminal"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ALSO = {("train", "evaluate")}
WITHOUT_TORCH = {
    *("errors", "machine", "progress", "paths", "tasks", "text"),
    *("__init__", "cli", "cli_bench", "cli_models", "cli_options", "doctor", "terminal", "__main__"),
}

CORE = {"torch", "numpy", "safetensors", "tokenizers", "pydantic", "typer", "rich"}
LAZY = {"httpx"}  # core, but imported by the one command that needs it
EXTRAS = {
    *("fastapi", "starlette", "uvicorn", "prometheus_client", "markdown_it", "mdit_py_plugins", "pygments", "nh3"),
    *("latex2mathml", "PIL", "llguidance", "matplotlib", "reasoning_gym", "math_verify", "gguf", "ray", "triton"),
}
CUDA_ONLY = {"triton", "flash_attn", "cupy", "deep_gemm", "deep_ep", "transformer_engine", "apex", "bitsandbytes"}
BANNED = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "multiprocessing", "transformers"}
NETWORK = {"httpx", "requests", "aiohttp", "urllib.request", "http.client", "socket"}
NETWORK_PLACES = ("weights/fetch.py", "serve/")

MAX_FILE, MAX_FUNCTION = 400, 60
BUDGETS = {"Python without serve/": 15000, "Python in serve/": 3500, "C++": 5_000, "web": 2500}


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    """The folder of a file under finback/, or the name of a file that stands alone there."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Every import statement with the full dotted name of each thing it takes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from ((node, f"{prefix}.{alias.name}") for alias in node.names)


def at_module_level(tree: ast.Module) -> set[ast.stmt]:
    """The statements that run on import: not those in functions, nor under TYPE_CHECKING."""
    found: set[ast.stmt] = set()
    todo: list[ast.AST] = [tree]
    while todo:
        for node in ast.iter_child_nodes(todo.pop()):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                todo += node.orelse
                continue
            if isinstance(node, ast.stmt):
                found.add(node)
            todo.append(node)
    return found


def wrong_floors(path: Path, tree: ast.Module) -> Iterator[str]:
    room = room_of(path)
    if room not in FLOOR:
        yield f"{room} has no floor: add it to FLOORS"
        return
    for node, name in imports(tree):
        if name.startswith("."):
            yield f"line {node.lineno}: relative import of {name}"
        parts = name.split(".")
        if parts[0] != "finback" or name == "finback.__version__":
            continue
        other = parts[1] if len(parts) > 1 and parts[1] in FLOOR else "__init__"
        own_folder = other == room or (room in FLOORS[5] and other in FLOORS[5]) or {room, other} <= FLOORS[0]
        if not own_folder and FLOOR[other] >= FLOOR[room] and (room, other) not in ALSO:
            yield f"line {node.lineno}: {room} (floor {FLOOR[room]}) imports {name} (floor {FLOOR[other]})"


def wrong_modules(path: Path, tree: ast.Module) -> Iterator[str]:
    room, early = room_of(path), at_module_level(tree)
    inside = path.relative_to(PACKAGE).as_posix()
    for node, name in imports(tree):
        top, where = name.split(".")[0], f"line {node.lineno}: {name}"
        if top in BANNED:
            yield f"{where} is never used here"
        elif top in CUDA_ONLY and room != "kernels":
            yield f"{where} is for CUDA alone and belongs in kernels/"
        elif any(name == n or name.startswith(n + ".") for n in NETWORK) and not inside.startswith(NETWORK_PLACES):
            yield f"{where} opens connections: only {', '.join(NETWORK_PLACES)} may"
        elif top == "torch" and room in WITHOUT_TORCH and node in early:
            yield f"{where} at import time, in a room that must start without torch"
        elif top != "finback" and top not in sys.stdlib_module_names | CORE:
            if top not in LAZY | EXTRAS:
                yield f"{where} is no dependency of the package"
            elif node in early and room not in {"serve", "kernels"}:
                yield f"{where} is optional: import it where it is used"


def wrong_calls(path: Path, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, where = ast.unparse(node.func), f"line {node.lineno}"
        if name in {"eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec"}:
            yield f"{where}: {name}() runs text as code"
        if name in {"torch.load", "numpy.load", "np.load"}:
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name == "torch.load" and given.get("weights_only") != "True":
                yield f"{where}: torch.load without weights_only=True"
            if given.get("allow_pickle", "False") != "False":
                yield f"{where}: {name} with pickle"


def too_long(path: Path, tree: ast.Module) -> Iterator[str]:
    last = max((getattr(node, "end_lineno", 0) or 0 for node in ast.walk(tree)), default=0)
    if last > MAX_FILE:
        yield f"{last} lines; at most {MAX_FILE}: it holds two ideas"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > MAX_FUNCTION:
                yield f"line {node.lineno}: {node.name} has {length} lines; at most {MAX_FUNCTION}"


RULES = [wrong_floors, wrong_modules, wrong_calls, too_long]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_file_keeps_the_rule(rule):
    wrong = [
        f"{path.relative_to(ROOT)}: {message}"
        for path in python_files()
        for message in rule(path, ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not wrong, "\n".join(wrong)


BAD = [
    ("text/x.py", "from finback.model import Config", wrong_floors),
    ("tasks/x.py", "import finback.text", wrong_floors),
    ("evaluate/x.py", "def f():\n    from finback.train import loop", wrong_floors),
    ("weights/x.py", "from finback import engine", wrong_floors),
    ("model/x.py", "from finback import load", wrong_floors),
    ("engine/x.py", "from .cache import Cache", wrong_floors),
    ("attic/x.py", "", wrong_floors),
    ("text/x.py", "import torch.nn as nn", wrong_modules),
    ("cli.py", "try:\n    from torch import nn\nexcept ImportError:\n    pass", wrong_modules),
    ("tasks/x.py", "class A:\n    import torch", wrong_modules),
    ("model/x.py", "def f():\n    import triton", wrong_modules),
    ("train/x.py", "import multiprocessing.pool", wrong_modules),
    ("weights/x.py", "from transformers import AutoModel", wrong_modules),
    ("weights/fetch.py", "import httpx", wrong_modules),
    ("weights/x.py", "def f():\n    import httpx", wrong_modules),
    ("train/x.py", "from urllib import request", wrong_modules),
    ("evaluate/x.py", "import matplotlib.pyplot", wrong_modules),
    ("train/x.py", "import pandas", wrong_modules),
    ("tasks/x.py", "eval('1')", wrong_calls),
    ("weights/x.py", "torch.load(path)", wrong_calls),
    ("weights/x.py", "torch.load(path, weights_only=False)", wrong_calls),
    ("train/x.py", "np.load(path, allow_pickle=True)", wrong_calls),
    ("train/x.py", "x = 1\n" * 401, too_long),
    ("train/x.py", "def f():\n" + "    x = 1\n" * 60, too_long),
]
GOOD = [
    ("train/x.py", "from finback.evaluate import evaluate\nfrom finback.weights import load"),
    ("engine/x.py", "from finback.engine.cache import Cache\nfrom finback.text import Tokenizer"),
    ("paths.py", "from finback.errors import UserError"),
    ("weights/x.py", "from finback import __version__\ntorch.load(p, weights_only=True)"),
    ("cli.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\ndef f():\n    import torch"),
    ("kernels/x.py", "import triton\nmodel.eval()"),
    ("weights/fetch.py", "def f():\n    import httpx"),
    ("train/x.py", "x = 1\n" * 400 + "\n"),
    ("train/x.py", "def f():\n" + "    x = 1\n" * 59),
]


@pytest.mark.parametrize(("file", "code", "rule"), BAD)
def test_the_rules_catch_what_they_should(file, code, rule):
    assert len(list(rule(PACKAGE / file, ast.parse(code)))) == 1


@pytest.mark.parametrize(("file", "code"), GOOD)
def test_the_rules_let_good_code_pass(file, code):
    assert [message for rule in RULES for message in rule(PACKAGE / file, ast.parse(code))] == []


def test_what_must_start_fast_starts_without_torch():
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in python_files()
        if room_of(path) in WITHOUT_TORCH
    ]
    code = f"import sys, {', '.join(names)}; print([m for m in ('torch', 'transformers', 'httpx') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


def lines(*patterns: str, under: str = "", without: str = "/") -> int:
    """Lines of the files in the package that match, those of a folder alone or without one."""
    found = {path for pattern in patterns for path in (PACKAGE / under).rglob(pattern)}
    return sum(path.read_bytes().count(b"\n") for path in found if without not in path.relative_to(PACKAGE).parts)


def test_budgets():
    counted = {
        "Python without serve/": lines("*.py", without="serve"),
        "Python in serve/": lines("*.py", under="serve"),
        "C++": lines("*.cpp", "*.hpp", "*.h", "*.cc"),
        "web": lines("*.html", "*.css", "*.js", "*.svg"),
    }
    assert counted["Python without serve/"] > 0
    assert {name: n for name, n in counted.items() if n > BUDGETS[name]} == {}


def test_dependencies_are_those_of_the_rules():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[<>=!~\[ ]", requirement)[0] for requirement in project["dependencies"]}
    assert declared == CORE | LAZY


def test_nothing_is_left_to_do():
    mark = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    found = [str(path) for path in python_files() if mark.search(path.read_text(encoding="utf-8"))]
    assert found == []
