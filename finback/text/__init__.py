"""Tokenizer, chat format, and the split of a reply into thinking and answer. No torch."""

from finback.text.chat import Message, example_ids, prompt_ids
from finback.text.reasoning import ReasoningSplit
from finback.text.tokenizer import TextStream, Tokenizer

__all__ = ["Message", "ReasoningSplit", "TextStream", "Tokenizer", "example_ids", "prompt_ids"]
