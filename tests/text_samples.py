"""Tokenizers for the tests: one trained here, one laid out as DeepSeek-R1's file is, one made to be tricked."""

import functools
import json
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from finback.text import Tokenizer

# Written out from DeepSeek's tokenizer.json, not taken from the package.
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
MARKS = [
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
    "<｜fim▁hole｜>",
    "<｜fim▁begin｜>",
    "<｜fim▁end｜>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
]
SPECIAL = [BOS, EOS, PAD, *MARKS]
TEXTS = [
    "What is 347 + 82 * 15?\n82 * 15 = 1230, and 347 + 1230 = 1577.\n\nThe answer is 1577.",
    "How many times does the letter r occur in strawberry? s, t, r, a, w, b, e, r, r, y: three times.",
    "Which is larger, 9.9 or 9.11? 9.9 is larger: 9.90 > 9.11. Ça va? Größe, 鲸鱼, ναι, да, 🐋🐳",
] * 20


@functools.cache
def trained() -> Tokenizer:
    """A tokenizer trained by this project."""
    return Tokenizer.train(TEXTS, 600)


def deepseek_spec(without: tuple[str, ...] = ()) -> dict[str, Any]:
    """A small tokenizer.json as DeepSeek-R1 lays it out: three special ids in the vocabulary, the others above it."""
    bpe = tokenizers.Tokenizer(models.BPE())
    words = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|" + (
        r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    splits = [r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", words]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in splits]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=[BOS, EOS, PAD], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXTS, trainer)
    spec = json.loads(bpe.to_str())
    above = len(spec["model"]["vocab"])
    for n, content in enumerate([mark for mark in MARKS if mark not in without]):
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        special = "think" not in content and "tool" not in content
        spec["added_tokens"].append({"id": above + n, "content": content, **plain, "special": special})
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {BOS: {"id": BOS, "ids": [0], "tokens": [BOS]}},
    }
    return spec


@functools.cache
def deepseek() -> Tokenizer:
    """The tokenizer of `deepseek_spec`."""
    return Tokenizer(deepseek_spec(), {})


@functools.cache
def tricky() -> Tokenizer:
    """A tokenizer whose merges spell `<think>` out: ordinary text would arrive at the special id by merging."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["<think>", "</think>"] * 50, trainer)
    spec = json.loads(bpe.to_str())
    vocab = spec["model"]["vocab"]
    assert "<think>" in vocab and "</think>" in vocab
    for mark in ("<think>", "</think>"):
        spec["added_tokens"].append({**spec["added_tokens"][0], "id": vocab[mark], "content": mark, "special": False})
    return Tokenizer(spec, {})


ALL = [trained, deepseek, tricky]
