"""The tokenizer: any text survives, no text becomes a special token, files of the family load, bad ones are refused."""

import json
import subprocess
import sys

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from text_samples import ALL, MARKS, SPECIAL, TEXTS, deepseek, deepseek_spec, trained, tricky

from finback.errors import UserError
from finback.text import Tokenizer

# Any Unicode text, with special strings, their halves, and whitespace thrown in.
PIECES = st.one_of(
    st.text(), st.sampled_from([*SPECIAL, "<th", "ink>", "</", "<｜", "｜>", "\n", "\n\n", " ", "\r\n", "\0"])
)
TEXT = st.lists(PIECES, max_size=8).map("".join)
FAMILIES = pytest.mark.parametrize("make", ALL, ids=lambda make: make.__name__)


def special_ids(tokenizer):
    spec = tokenizer._spec
    return {token["id"] for token in spec["added_tokens"]}


@FAMILIES
@given(text=TEXT)
def test_any_text_survives_and_is_only_text(make, text):
    tokenizer = make()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert special_ids(tokenizer).isdisjoint(ids)


@FAMILIES
@pytest.mark.parametrize("mark", SPECIAL)
def test_a_special_string_in_text_stays_text(make, mark):
    tokenizer = make()
    text = f"a{mark}b {mark}\n{mark}{mark}"
    assert special_ids(tokenizer).isdisjoint(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_tricky_tokenizer_would_be_fooled_by_its_own_file():
    """The control of the two tests above: the file as it is does turn the text into the special id."""
    plain = tokenizers.Tokenizer.from_str(json.dumps({**tricky()._spec, "added_tokens": []}))
    assert plain.encode("<think>").ids == [tricky().think_id]


def test_whole_words_in_the_vocabulary_are_no_way_in():
    """Files with `ignore_merges` (Llama's) look a whole word up before any merge."""
    spec = {**tricky()._spec, "model": {**tricky()._spec["model"], "ignore_merges": True}}
    tokenizer = Tokenizer(spec, {})
    assert tokenizer.think_id not in tokenizer.encode("<think>")
    assert tokenizer.decode(tokenizer.encode("<think>")) == "<think>"


def test_special_ids_are_those_of_deepseek():
    tokenizer = trained()
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    for content, token_id in [
        ("<｜User｜>", tokenizer.user_id),
        ("<｜Assistant｜>", tokenizer.assistant_id),
        ("<think>", tokenizer.think_id),
        ("</think>", tokenizer.end_think_id),
    ]:
        assert tokenizer.decode([token_id], skip_special=False) == content
    contents = {token["content"] for token in tokenizer._spec["added_tokens"]}
    assert contents == set(SPECIAL)


def test_ids_are_looked_up_by_name_and_may_be_missing():
    spec = deepseek_spec(without=("<think>", "</think>"))
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != "<｜▁pad▁｜>"]
    tokenizer = Tokenizer(spec, {})
    named = {token["content"]: token["id"] for token in spec["added_tokens"]}
    assert tokenizer.user_id == named["<｜User｜>"] > 256
    assert (tokenizer.think_id, tokenizer.end_think_id) == (None, None)
    assert tokenizer.pad_id == tokenizer.eos_id == 1


@given(st.text(alphabet="0123456789", min_size=1, max_size=20))
def test_every_digit_is_a_token(digits):
    ids = trained().encode(f"x{digits} + {digits}")
    pieces = [trained().decode([i]) for i in ids]
    assert [piece for piece in pieces if any(char.isdigit() for char in piece)] == list(digits * 2)


def test_encode_adds_no_bos_even_if_the_file_would():
    text = TEXTS[0]
    whole = tokenizers.Tokenizer.from_str(json.dumps(deepseek()._spec))
    assert whole.encode(text).ids == [0, *deepseek().encode(text)]


@FAMILIES
@given(texts=st.lists(TEXT, max_size=4))
def test_a_batch_is_its_texts(make, texts):
    assert make().encode_batch(texts) == [make().encode(text) for text in texts]


@pytest.mark.parametrize("text", ["\ud800", "whale \udc33", "\udc00\ud800"])
def test_lone_surrogates_are_refused(text):
    with pytest.raises(UserError, match="lone surrogate"):
        trained().encode(text)
    with pytest.raises(UserError, match="lone surrogate"):
        trained().encode_batch(["fine", text])


@FAMILIES
@given(data=st.data())
def test_decode_equals_the_library(make, data):
    """Any ids, so bytes that are no UTF-8 too."""
    tokenizer = make()
    library = tokenizers.Tokenizer.from_str(json.dumps(tokenizer._spec))
    plain = [i for i in library.get_vocab().values() if i not in special_ids(tokenizer)]
    ids = data.draw(st.lists(st.sampled_from(sorted(plain)), max_size=12))
    assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=False)


@FAMILIES
@given(data=st.data())
def test_the_stream_is_decode_in_pieces(make, data):
    tokenizer = make()
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 5), max_size=20))
    for skip in (True, False):
        stream = tokenizer.stream(skip)
        assert "".join([*map(stream.push, ids), stream.flush()]) == tokenizer.decode(ids, skip)


@given(TEXT)
def test_the_stream_never_shows_a_half_character(text):
    text = text.replace("\ufffd", "")
    stream = trained().stream()
    assert "\ufffd" not in "".join(map(stream.push, trained().encode(text)))
    assert stream.flush() == ""


def test_a_cut_off_character_shows_at_the_end_only():
    stream = trained().stream()
    ids = trained().encode("𝄞")  # never seen in training: four single bytes
    assert [stream.push(i) for i in ids[:3]] == ["", "", ""]
    assert stream.flush() == "\ufffd"
    assert "".join(map(stream.push, ids)) == "𝄞"  # the stream starts anew


def test_decode_leaves_special_tokens_out_unless_asked():
    tokenizer = deepseek()
    ids = [tokenizer.bos_id, tokenizer.user_id, *tokenizer.encode("hi"), tokenizer.think_id, tokenizer.eos_id]
    assert tokenizer.decode(ids) == "hi"
    assert (
        tokenizer.decode(ids, skip_special=False) == "<｜begin▁of▁sentence｜><｜User｜>hi<think><｜end▁of▁sentence｜>"
    )


def test_the_vocabulary_size_is_an_upper_bound():
    assert Tokenizer.train(["ab"], 2048).vocab_size <= 280
    assert Tokenizer.train(TEXTS, 300).vocab_size == 300
    with pytest.raises(UserError, match="vocab_size 200"):
        Tokenizer.train(TEXTS, 200)


def test_training_is_reproducible():
    code = (
        "import sys; sys.path.insert(0, 'tests'); from text_samples import trained; import hashlib, json;"
        "print(hashlib.sha256(json.dumps(trained()._spec).encode()).hexdigest())"
    )
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(2)}
    assert len(runs) == 1


@FAMILIES
def test_save_and_load(make, tmp_path):
    make().save(tmp_path)
    again = Tokenizer.load(str(tmp_path))
    assert [again.encode(text) for text in TEXTS[:3]] == [make().encode(text) for text in TEXTS[:3]]
    assert vars(again).keys() == vars(make()).keys()
    assert again._spec == make()._spec and again._config == make()._config
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_a_folder_without_a_config_loads(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(deepseek_spec()), encoding="utf-8")
    assert Tokenizer.load(tmp_path).encode("whale") == deepseek().encode("whale")


def test_other_programs_read_our_files_as_we_do(tmp_path):
    from transformers import AutoTokenizer

    trained().save(tmp_path)
    other = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS[:3]:
        assert other(text).input_ids == [trained().bos_id, *trained().encode(text)]
    assert (other.bos_token_id, other.eos_token_id, other.pad_token_id) == (0, 1, 2)
    visible = other.decode([0, trained().think_id, trained().end_think_id, 1], skip_special_tokens=True)
    assert visible.replace(" ", "") == "<think></think>"


BAD = {
    "empty": "",
    "not JSON": "{",
    "a list": "[]",
    "no model": "{}",
    "not UTF-8": b"\xff\xfe",
    "a word-piece model": json.dumps({**deepseek_spec(), "model": {"type": "WordPiece", "vocab": {}}}),
    "not byte-level": json.dumps({**deepseek_spec(), "decoder": {"type": "Metaspace"}}),
    "no decoder": json.dumps({**deepseek_spec(), "decoder": None}),
    "no BOS": json.dumps({**deepseek_spec(), "added_tokens": []}),
    "broken merges": json.dumps({**deepseek_spec(), "model": {**deepseek_spec()["model"], "merges": ["a b c"]}}),
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_bad_files_are_refused_by_name(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"tokenizer\.json") as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_folder_and_a_bad_config_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        Tokenizer.load(tmp_path / "nowhere")
    trained().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("nonsense")
    with pytest.raises(UserError, match=r"tokenizer_config\.json"):
        Tokenizer.load(tmp_path)


def test_older_files_with_merges_as_strings_load():
    spec = deepseek_spec()
    spec["model"]["merges"] = [" ".join(merge) for merge in spec["model"]["merges"]]
    assert Tokenizer(spec, {}).encode(TEXTS[0]) == deepseek().encode(TEXTS[0])


def test_truncation_and_padding_in_the_file_do_not_cut_text():
    spec = deepseek_spec()
    spec["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    spec["padding"] = {
        "strategy": {"Fixed": 99},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 2,
        "pad_type_id": 0,
        "pad_token": MARKS[0],
    }
    assert Tokenizer(spec, {}).encode(TEXTS[0]) == deepseek().encode(TEXTS[0])
