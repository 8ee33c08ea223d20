"""A tokenizer from the metadata of a GGUF file, and the metadata for a tokenizer.

A GGUF file names how text is split (`tokenizer.ggml.pre`) where a tokenizer.json spells it out. What we write holds the
whole tokenizer.json too (`tokenizer.huggingface.json`), preferred where it is; a program that reads the name alone
splits as we do if `gguf_split` finds one for the tokenizer. Source: llama.cpp (gguf-py, src/llama-vocab.cpp).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from finback.errors import UserError
from finback.text.bpe import SPLITS, added_token, bpe_spec, split_name
from finback.text.tokenizer import Tokenizer

GGML = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_NAMED = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id"}


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that a GGUF file describes, its metadata given as plain Python values.

    Raises UserError for metadata that is incomplete, contradicts itself, or names a way to split text we do not know.
    """
    tokens, types = _tokens(metadata)
    config = _config(metadata, tokens)
    try:
        whole = metadata.get("tokenizer.huggingface.json")
        spec = _spec(metadata, tokens, types, config) if whole is None else json.loads(whole)
        return Tokenizer(spec, config)
    except UserError as error:
        raise UserError(f"GGUF: {error}") from error
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UserError(f"GGUF: not a usable tokenizer ({error!r}); use the file its model came with") from error


def gguf_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """The metadata of a GGUF file for a model with `vocab_size` rows; ids without a token are unused [PAD...] tokens.

    `tokenizer.ggml.pre` is "default" where `gguf_split` gives None: tell the user that other programs may then split
    text differently. Raises UserError if the model has fewer rows than the tokenizer tokens.
    """
    if vocab_size < tokenizer.vocab_size:
        raise UserError(f"vocab_size {vocab_size}: the tokenizer has {tokenizer.vocab_size} tokens; give at least that")
    spec = tokenizer._spec
    tokens, types = [f"[PAD{i}]" for i in range(vocab_size)], [UNUSED] * vocab_size
    for token, i in spec["model"]["vocab"].items():
        tokens[i], types[i] = token, NORMAL
    for added in spec["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]]
    metadata = {
        GGML + "model": "gpt2",
        GGML + "pre": gguf_split(tokenizer) or "default",
        GGML + "tokens": tokens,
        GGML + "token_type": types,
        GGML + "merges": merges,
        GGML + "bos_token_id": tokenizer.bos_id,
        GGML + "eos_token_id": tokenizer.eos_id,
        GGML + "padding_token_id": tokenizer.pad_id,
        GGML + "add_bos_token": bool(tokenizer.start_ids),
        "tokenizer.chat_template": tokenizer.chat_template,
        "tokenizer.huggingface.json": json.dumps(spec, ensure_ascii=False),
    }
    return {key: value for key, value in metadata.items() if value is not None}


def gguf_split(tokenizer: Tokenizer) -> str | None:
    """llama.cpp's name for how this tokenizer splits text; None if it has none."""
    return split_name(tokenizer._spec.get("pre_tokenizer"))


def _tokens(metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """The tokens by id and their types."""
    if (model := metadata.get(GGML + "model")) != "gpt2":
        raise UserError(f"GGUF: {GGML}model is {model!r}; only byte-level BPE, 'gpt2', can be read")
    tokens = _list(metadata, "tokens", str)
    types = _list(metadata, "token_type", int) if GGML + "token_type" in metadata else [NORMAL] * len(tokens)
    if len(types) != len(tokens) or not set(types) <= set(range(1, 7)):
        raise UserError(f"GGUF: {GGML}token_type must be one of 1 to 6 for each of the {len(tokens)} tokens")
    used = [token for token, kind in zip(tokens, types, strict=True) if kind != UNUSED]
    if len(set(used)) != len(used) or "" in used:
        raise UserError(f"GGUF: {GGML}tokens holds a token twice, or an empty one; the file is damaged")
    return tokens, types


def _list(metadata: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    values = metadata.get(GGML + key)
    if not isinstance(values, Sequence) or isinstance(values, str) or not all(type(value) is kind for value in values):
        raise UserError(f"GGUF: {GGML}{key} must be a list of {kind.__name__}; the file is damaged")
    return list(values)


def _config(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """What a tokenizer_config.json would say."""
    config: dict[str, Any] = {"chat_template": metadata.get("tokenizer.chat_template")}
    for name, key in _NAMED.items():
        token_id = metadata.get(GGML + key)
        if token_id is not None and (type(token_id) is not int or not 0 <= token_id < len(tokens)):
            raise UserError(f"GGUF: {GGML}{key} is {token_id!r}; it must be an id of the {len(tokens)} tokens")
        config[name] = None if token_id is None else tokens[token_id]
    # Qwen's files name a BOS that is never used.
    config["add_bos_token"] = bool(metadata.get(GGML + "add_bos_token", metadata.get(GGML + "pre") != "qwen2"))
    return config


def _spec(metadata: Mapping[str, Any], tokens: list[str], types: list[int], config: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer.json that the lists amount to."""
    pre = metadata.get(GGML + "pre", "default")
    if pre not in SPLITS:
        raise UserError(f"{GGML}pre is {pre!r}; known are {', '.join(SPLITS)}; convert from the original checkpoint")
    marks = {config["bos_token"], config["eos_token"]}
    named = [(i, token, kind) for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED]
    vocab = {token: i for i, token, _ in named}
    added = [
        added_token(i, token, kind != USER_DEFINED)
        for i, token, kind in named
        if kind in (UNKNOWN, CONTROL, USER_DEFINED) or token in marks
    ]
    merges = [merge.split(" ") for merge in _list(metadata, "merges", str)]
    if wrong := next(
        (merge for merge in merges if len(merge) != 2 or not {*merge, "".join(merge)} <= vocab.keys()), None
    ):
        raise UserError(f"{GGML}merges has {' '.join(wrong)[:80]!r}: no two tokens that make one; the file is damaged")
    return bpe_spec(vocab, merges, added, pre)
