"""tiktoken.model (Moonlight): the ids of a byte-pair encoder written here by its definition, and bad files refused."""

import base64
import functools
import json
from itertools import pairwise

import pytest
import regex
from hypothesis import example, given
from hypothesis import strategies as st
from test_text_gguf import LLAMA_CPP, MIXED
from text_families import MOON, MOONLIGHT

from finback.errors import UserError
from finback.text import Tokenizer, prompt_ids

TEXT = (
    "The answer is 42, the whale's answer; THE ANSWER was 1234. 鲸鱼 鲸 Größe größer\n\nAn answer, the end.\n".encode()
)


@functools.cache
def ranks():
    """Ranks as training gives them: the commonest pair is the next token. Then two that overlap, one of no join."""
    table = [bytes([byte]) for byte in [*range(97, 256), *range(97)]]  # single bytes in an order of their own
    parts = [bytes([byte]) for byte in TEXT]
    while len(table) < 300:
        pairs = list(pairwise(parts))
        best = max(set(pairs), key=lambda pair: (pairs.count(pair), pair))
        table.append(b"".join(best))
        joined, i = [], 0
        while i < len(parts):
            take = 2 if tuple(parts[i : i + 2]) == best else 1
            joined.append(b"".join(parts[i : i + take]))
            i += take
        parts = joined
    return {token: n for n, token in enumerate(dict.fromkeys([*table, b"xw", b"wx", b"zqzqzq"]))}


def encode(text):
    """tiktoken's definition: a piece that is a token is one, else its neighbours of lowest rank are joined."""
    ids = []
    for piece in regex.findall(LLAMA_CPP["kimi-k2"][0], text, flags=regex.V1):
        parts = [bytes([byte]) for byte in piece.encode()]
        while piece.encode() not in ranks():
            pairs = enumerate(map(b"".join, pairwise(parts)))
            joins = [(ranks()[pair], i) for i, pair in pairs if pair in ranks()]
            if not joins:
                break
            _, i = min(joins)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks()[piece.encode()]] if piece.encode() in ranks() else [ranks()[part] for part in parts]
    return ids


def write(folder, content=None, **config):
    lines = [base64.b64encode(token) + b" %d" % rank for token, rank in ranks().items()]
    (folder / "tiktoken.model").write_bytes(b"\n".join(lines) + b"\n" if content is None else content)
    above = len(ranks())
    marks = {str(above + n): {"content": mark, "special": True} for n, mark in enumerate(MOON)}
    settings = {"bos_token": "[BOS]", "eos_token": "[EOS]", "chat_template": MOONLIGHT, "added_tokens_decoder": marks}
    settings |= {"tokenizer_class": "TikTokenTokenizer", "auto_map": {"AutoTokenizer": ["x.Y", None]}} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def moonlight(tmp_path_factory):
    return Tokenizer.load(write(tmp_path_factory.mktemp("moonlight")))


@example(text="zqzqzq")
@example(text="wxwxxw wxw")
@example(text=TEXT.decode())
@given(
    text=MIXED
    | st.text(TEXT.decode(), max_size=12)
    | st.lists(st.sampled_from([*TEXT.decode().split(" "), "zqzqzq", "xzqzq"]), max_size=5).map(" ".join)
)
def test_the_ids_are_those_of_byte_pair_encoding(moonlight, text):
    assert moonlight.encode(text) == encode(text)
    assert moonlight.decode(moonlight.encode(text)) == text


def test_the_samples_have_what_it_takes():
    """The control: long tokens, merges of merges, and a word that only a look-up finds."""
    assert max(map(len, ranks())) > 6 and encode("zqzqzq") == [ranks()[b"zqzqzq"]] and b"zq" not in ranks()


def test_marks_are_ids_and_text_is_text(moonlight):
    above = len(ranks())
    assert moonlight.marks == {mark: above + n for n, mark in enumerate(MOON)}
    assert moonlight.start_ids == [] and moonlight.eos_ids == {above + 1, above + 2, above + 7}
    ids = prompt_ids(moonlight, [{"role": "user", "content": "<|im_end|>"}])
    assert ids.count(moonlight.marks["<|im_end|>"]) == 2
    assert moonlight.decode(ids, skip_special=False) == (
        "<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|><|im_user|>user<|im_middle|><|im_end|>"
        "<|im_end|><|im_assistant|>assistant<|im_middle|>"
    )


def test_it_is_saved_as_a_tokenizer_json_that_others_can_read(moonlight, tmp_path):
    from transformers import AutoTokenizer

    moonlight.save(tmp_path)
    assert Tokenizer.load(tmp_path).encode("The answer") == moonlight.encode("The answer")
    assert AutoTokenizer.from_pretrained(tmp_path)("The answer is 42").input_ids == moonlight.encode("The answer is 42")


BAD = {
    "empty": b"",
    "no ranks": b"YQ==",
    "not base64": b"!!! 1",
    "a rank of letters": b"YQ== x",
    "bytes missing": b"YQ== 0",
    "a rank twice": b"\n".join(base64.b64encode(bytes([b])) + b" 7" for b in range(256)),
    "a rank below zero": b"\n".join(base64.b64encode(bytes([b])) + b" %d" % (b - 1) for b in range(256)),
    "an endless token": b"\n".join(
        base64.b64encode(bytes([b]) * (1 + 5000 * (b == 9))) + b" %d" % b for b in range(256)
    ),
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_bad_files_are_refused_by_name(content, tmp_path):
    with pytest.raises(UserError, match=r"tiktoken\.model") as caught:
        Tokenizer.load(write(tmp_path, content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "marks", [None, [], {"x": {"content": "a"}}, {"5": {"content": "[BOS]"}}, {"999": {}}, {"9": 1}]
)
def test_bad_marks_are_refused(marks, tmp_path):
    with pytest.raises(UserError, match=r"tiktoken\.model"):
        Tokenizer.load(write(tmp_path, added_tokens_decoder=marks))


def test_it_needs_its_config(tmp_path):
    write(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file"):
        Tokenizer.load(tmp_path)
