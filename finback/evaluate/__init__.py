"""What a model can do, measured on problems it has not seen."""

from finback.evaluate.accuracy import evaluate, wilson

__all__ = ["evaluate", "wilson"]
