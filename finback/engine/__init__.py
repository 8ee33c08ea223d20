"""Generation: the latent cache, keyed sampling, and the engine that runs many requests at once."""

from finback.engine.engine import Engine, Prompt
from finback.engine.grammar import Grammar
from finback.engine.params import Sampling
from finback.engine.request import Completion, Delta, Request

__all__ = ["Completion", "Delta", "Engine", "Grammar", "Prompt", "Request", "Sampling"]
