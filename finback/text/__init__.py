"""Tokenizer, chat format, and the split of a reply into thinking and answer. No torch."""

from finback.text.chat import Message, example_ids, prompt_ids
from finback.text.gguf import gguf_split, gguf_tokenizer, tokenizer_from_gguf
from finback.text.reasoning import ReasoningSplit
from finback.text.tokenizer import TextStream, Tokenizer

__all__ = [
    "Message",
    "ReasoningSplit",
    "TextStream",
    "Tokenizer",
    "example_ids",
    "gguf_split",
    "gguf_tokenizer",
    "prompt_ids",
    "tokenizer_from_gguf",
]
