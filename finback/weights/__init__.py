"""Models on disk: folders of config.json, safetensors and a tokenizer, in the original DeepSeek-V3 layout."""

from finback.weights.reader import load, load_tokenizer
from finback.weights.writer import save

__all__ = ["load", "load_tokenizer", "save"]
