"""Generation: the paged cache, continuous batching, keyed sampling, speculation; one engine for all who generate."""

from finback.engine.engine import Engine, Prompt, QueueFull
from finback.engine.grammar import Grammar
from finback.engine.options import Options
from finback.engine.params import Sampling
from finback.engine.request import Completion, Delta, Request
from finback.engine.stats import Stats, Watchdog

__all__ = [
    "Completion",
    "Delta",
    "Engine",
    "Grammar",
    "Options",
    "Prompt",
    "QueueFull",
    "Request",
    "Sampling",
    "Stats",
    "Watchdog",
]
