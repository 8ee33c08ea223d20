"""Finback: train, run and serve your own DeepSeek.

Everything public is imported on first use, so that `import finback` and `finback --help` stay instant.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finback.engine import Completion, Engine, Sampling
    from finback.errors import UserError
    from finback.weights import load, load_tokenizer, save

__version__ = "0.1.0"
__all__ = ["Completion", "Engine", "Sampling", "UserError", "__version__", "load", "load_tokenizer", "save"]

_HOMES = {
    "load": "finback.weights",
    "load_tokenizer": "finback.weights",
    "save": "finback.weights",
    "Engine": "finback.engine",
    "Sampling": "finback.engine",
    "Completion": "finback.engine",
    "UserError": "finback.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'finback' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
