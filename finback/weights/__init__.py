"""Models on disk: folders of config.json, safetensors and a tokenizer in their family's own layout, and GGUF files."""

from finback.weights.reader import load, load_tokenizer
from finback.weights.writer import save

__all__ = ["load", "load_tokenizer", "save"]
