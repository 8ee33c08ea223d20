"""Generation: the latent cache, keyed sampling, and the engine that runs many requests at once."""

from finback.engine.engine import Engine, Prompt
from finback.engine.request import Completion, Delta, Request
from finback.engine.sampling import Sampling

__all__ = ["Completion", "Delta", "Engine", "Prompt", "Request", "Sampling"]
