"""GGUF metadata: the same ids after a round trip, the splits of llama.cpp, and hostile files refused in one line."""

import json

import numpy
import pytest
import regex
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from test_text_families import TEXT, tokenizer_of
from text_families import BOS, EOS, FAMILIES, LLAMA, THINK, TURNS, words
from text_samples import TEXTS, deepseek, trained, tricky

from finback.errors import UserError
from finback.text import Tokenizer, gguf_split, gguf_tokenizer, prompt_ids, tokenizer_from_gguf
from finback.text.bpe import SPLITS, added_token, bpe_spec

# As llama.cpp writes them in src/llama-vocab.cpp; it has Kimi's in C++, so that one is from tokenization_kimi.py.
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASE = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_HAN = "一-龥ࠀ-一가-\ud7ff"
LLAMA_CPP = {
    "deepseek-v3": [
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ],
    # The letters that have case stand there one by one; of those of the test below these are all.
    "deepseek-llm": [
        r"[\r\n]",
        r"\s?[A-Za-zÀ-ÖØ-öø-ƺͰ-ͳΑ-ΡΣ-Ωα-ωА-я]+",
        r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
        r"\s+$",
        f"[{_HAN}]+",
        r"\p{N}+",
    ],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", f"[{_HAN}]+", r"\p{N}"],
    "qwen2": [_CASE + r"|\p{N}" + _TAIL],
    "deepseek-r1-qwen": [_CASE + r"|\p{N}" + _TAIL],
    "llama-bpe": [_CASE + r"|\p{N}{1,3}" + _TAIL],
    "llama3": [_CASE + r"|\p{N}{1,3}" + _TAIL],
    "llama-v3": [_CASE + r"|\p{N}{1,3}" + _TAIL],
    "kimi-k2": [
        r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}" + _TAIL
    ],
    "gpt-2": [_GPT2],
    "smollm": [r"\p{N}", _GPT2],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
}
EACH = pytest.mark.parametrize("pre", SPLITS)
CHARACTERS = st.sampled_from(
    [*" \n\r\tabzAZ0123456789.,!?'\"$+<=>^~|-_/éÖßΩωДя鲸鱼は가。，", "'ll", "'S", "don't", " \n\n ", "   "]
)
MIXED = st.lists(CHARACTERS, max_size=14).map("".join)


def bare(metadata):
    """As a file that has no whole tokenizer.json in it, and types that a reader of files may give."""
    return {key: value for key, value in metadata.items() if key != "tokenizer.huggingface.json"}


def file(pre):
    """Metadata as llama.cpp writes it for a checkpoint of this kind, made by hand: marks above the words."""
    vocab, merges = words(pre)
    tokens = [*vocab, BOS, EOS, *TURNS, *THINK, "[PAD9]"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(vocab) + [3, 3, 3, 3, 4, 4, 5],
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in merges],
        "tokenizer.ggml.bos_token_id": len(vocab),
        "tokenizer.ggml.eos_token_id": len(vocab) + 1,
        "tokenizer.ggml.add_bos_token": True,
    }


@EACH
@given(text=MIXED)
def test_text_is_split_as_llama_cpp_splits_it(pre, text):
    """Expression after expression cuts its matches out of what the last one left, by another engine."""
    pieces = [text] if text else []
    for expression in LLAMA_CPP[pre]:
        cut = []
        for piece in pieces:
            end = 0
            for match in regex.finditer(expression, piece, flags=regex.V1):
                cut += [piece[end : match.start()], match.group()]
                end = match.end()
            cut.append(piece[end:])
        pieces = [piece for piece in cut if piece]
    library = tokenizers.Tokenizer.from_str(json.dumps(bpe_spec({}, [], [], pre)))
    found = [text[start:end] for _, (start, end) in library.pre_tokenizer.pre_tokenize_str(text)]
    assert found == pieces


@EACH
@given(text=TEXT)
def test_a_file_gives_the_ids_of_the_checkpoint(pre, text):
    library = tokenizers.Tokenizer.from_str(json.dumps({**bpe_spec(*whole(pre), [], pre)}))
    tokenizer = loaded(pre)
    assert tokenizer.encode(text) == library.encode(text).ids
    assert tokenizer.start_ids == [tokenizer.marks[BOS]] and tokenizer.eos_ids == {tokenizer.marks[EOS]}
    chat = prompt_ids(tokenizer, [{"role": "user", "content": "x"}])
    assert tokenizer.decode(chat, skip_special=False) == f"{BOS}<｜User｜>x<｜Assistant｜><think>\n"


FILES = {}


def loaded(pre):
    return FILES.setdefault(pre, tokenizer_from_gguf(file(pre)) if pre not in FILES else None)


def whole(pre):
    vocab, merges = words(pre)
    return dict(vocab), [list(pair) for pair in merges]


@pytest.mark.parametrize("name", FAMILIES)
@given(text=TEXT)
def test_a_round_trip_keeps_the_ids(name, text):
    """With the whole tokenizer.json in the file and, where llama.cpp knows how we split, without it."""
    tokenizer = tokenizer_of(name)
    chat = [{"role": "user", "content": text}]
    for again in TRIPS.setdefault(name, round_trips(tokenizer) if name not in TRIPS else []):
        assert again.encode(text) == tokenizer.encode(text)
        assert prompt_ids(again, chat) == prompt_ids(tokenizer, chat)
        assert (again.marks, again.start_ids, again.eos_ids) == (
            tokenizer.marks,
            tokenizer.start_ids,
            tokenizer.eos_ids,
        )
        assert (again.bos_id, again.pad_id) == (tokenizer.bos_id, tokenizer.pad_id)


TRIPS = {}


def round_trips(tokenizer):
    metadata = gguf_tokenizer(tokenizer, tokenizer.vocab_size + 3)
    return [tokenizer_from_gguf(metadata), tokenizer_from_gguf(bare(metadata))]


@given(text=TEXT)
def test_our_own_tokenizer_has_a_name_there_too(text):
    """Digits one by one, then GPT-2: llama.cpp's smollm."""
    for tokenizer in (trained(), deepseek()):
        for again in TRIPS.setdefault(id(tokenizer), round_trips(tokenizer) if id(tokenizer) not in TRIPS else []):
            assert again.encode(text) == tokenizer.encode(text)
    assert (gguf_split(trained()), gguf_split(deepseek())) == ("smollm", "deepseek-v3")


def test_what_has_no_name_is_told_and_kept_whole():
    """A tokenizer that does not split at all: llama.cpp has none such, so the name says nothing, but the file does."""
    metadata = gguf_tokenizer(tricky(), tricky().vocab_size)
    assert gguf_split(tricky()) is None and metadata["tokenizer.ggml.pre"] == "default"
    assert tokenizer_from_gguf(metadata).encode(TEXTS[0]) == tricky().encode(TEXTS[0])


def test_rows_without_a_token_are_unused():
    t = trained()
    metadata = gguf_tokenizer(t, t.vocab_size + 2)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == t.vocab_size + 2 == len(set(tokens))
    assert tokens[-1] == f"[PAD{t.vocab_size + 1}]" and types[-2:] == [5, 5]
    kinds = {tokens[i]: types[i] for i in range(t.vocab_size)}
    assert (kinds[BOS], kinds["<｜User｜>"], kinds["<think>"], kinds["a"]) == (3, 3, 4, 1)
    json.dumps(metadata)  # plain values
    with pytest.raises(UserError, match=f"vocab_size 10: the tokenizer has {t.vocab_size}"):
        gguf_tokenizer(t, 10)


def test_qwen_files_name_a_bos_that_is_not_used():
    metadata = {**bare(gguf_tokenizer(tokenizer_of("Qwen2.5"), 500)), "tokenizer.ggml.bos_token_id": 386}
    metadata.pop("tokenizer.ggml.add_bos_token")
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.start_ids == [] and tokenizer.bos_id == 386
    assert tokenizer.bos_id not in prompt_ids(tokenizer, [{"role": "user", "content": "x"}])


def test_a_normal_token_that_is_named_eos_is_a_mark():
    """Some files forget the types."""
    metadata = {key: value for key, value in file("llama-bpe").items() if key != "tokenizer.ggml.token_type"}
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.marks.keys() == {BOS, EOS} and tokenizer.eos_id not in tokenizer.encode(EOS)
    assert LLAMA[0] not in tokenizer.marks


BAD = {
    "another model": {"model": "llama"},
    "no model": {"model": None},
    "an unknown split": {"pre": "tekken"},
    "a split of another type": {"pre": ["qwen2"]},
    "no tokens": {"tokens": None},
    "tokens as text": {"tokens": "abc"},
    "tokens of another type": {"tokens": [1, 2]},
    "a token twice": {"tokens": ["a", "a"], "token_type": [1, 1]},
    "an empty token": {"tokens": ["a", ""], "token_type": [1, 1]},
    "too few types": {"token_type": [1]},
    "a type there is not": {"tokens": ["a"], "token_type": [7]},
    "types of another type": {"token_type": ["1"]},
    "BOS out of range": {"bos_token_id": 10**6},
    "EOS below range": {"eos_token_id": -1},
    "EOS a truth": {"eos_token_id": True},
    "EOS as text": {"eos_token_id": "1"},
    "no EOS": {"eos_token_id": None},
    "merges of three": {"merges": ["a b c"]},
    "merges of one": {"merges": ["ab"]},
    "merges of nothing": {"merges": ["xyz qrs"]},
    "merges of another type": {"merges": [["a", "b"]]},
    "no merges": {"merges": None},
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_hostile_metadata_is_refused(change):
    metadata = file("qwen2") | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises(UserError) as caught:
        tokenizer_from_gguf(metadata)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 and "GGUF" in str(caught.value)


def test_a_token_that_is_there_twice_is_refused():
    """But for the unused ones, whose names mean nothing."""
    metadata = file("qwen2")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    tokens += [tokens[-1], tokens[-1]]
    types += [5, 5]
    assert tokenizer_from_gguf(metadata).encode("Hi") == loaded("qwen2").encode("Hi")
    tokens[0] = tokens[-3]
    assert tokenizer_from_gguf(metadata).vocab_size == loaded("qwen2").vocab_size
    types[-3] = 3
    with pytest.raises(UserError, match="a token twice"):
        tokenizer_from_gguf(metadata)


def test_an_unknown_split_names_the_known_ones():
    with pytest.raises(UserError, match=r"'tekken'; known are deepseek-v3, deepseek-llm, .*default"):
        tokenizer_from_gguf(file("qwen2") | {"tokenizer.ggml.pre": "tekken"})


@pytest.mark.parametrize("content", ["{", "[]", "{}", 7, '{"model": {"type": "BPE"}}', "[" * 100_000])
def test_a_hostile_tokenizer_json_is_refused(content):
    with pytest.raises(UserError, match="GGUF") as caught:
        tokenizer_from_gguf(file("qwen2") | {"tokenizer.huggingface.json": content})
    assert "\n" not in str(caught.value)


def test_values_as_a_reader_of_files_gives_them():
    """Tuples are lists; numbers must be plain, so that nothing of a file's own types gets through unseen."""
    metadata = file("qwen2")
    metadata["tokenizer.ggml.tokens"] = tuple(metadata["tokenizer.ggml.tokens"])
    assert tokenizer_from_gguf(metadata).encode("Hi") == loaded("qwen2").encode("Hi")
    with pytest.raises(UserError, match="token_type must be a list of int"):
        tokenizer_from_gguf({**metadata, "tokenizer.ggml.token_type": numpy.ones(3, dtype=numpy.int32)})


def test_a_mark_inside_a_merge_does_not_stop_a_file():
    """A merge that arrives at a mark, as in files whose marks are words too; text still does not become it."""
    metadata = bare(gguf_tokenizer(tricky(), tricky().vocab_size))
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.think_id not in tokenizer.encode("<think>")
    assert Tokenizer(tokenizer._spec, tokenizer._config).marks[THINK[0]] == tricky().think_id
    assert added_token(1, "x", True)["special"]
