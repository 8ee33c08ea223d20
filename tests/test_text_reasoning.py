"""The split of a reply: its state comes from the prompt, and exactly the format's newlines go."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_text_tokenizer import TEXT
from text_samples import deepseek, deepseek_spec, trained

from finback.text import ReasoningSplit, Tokenizer, example_ids, prompt_ids

MAKERS = pytest.mark.parametrize("make", [trained, deepseek], ids=lambda make: make.__name__)
QUESTION = [{"role": "user", "content": "Say <think> and </think>."}]


def split(tokenizer, prompt, reply):
    """The whole (thinking, answer) of a reply, joined from the pieces."""
    stream = ReasoningSplit(tokenizer, prompt)
    pieces = [*map(stream.push, reply), stream.flush()]
    return "".join(piece[0] for piece in pieces), "".join(piece[1] for piece in pieces)


def reply_ids(tokenizer, text):
    """The ids of a reply written with its marks."""
    ids = []
    while text:
        found = [(text.find(mark), mark) for mark in ("<think>", "</think>") if mark in text]
        at, mark = min(found, default=(len(text), ""))
        ids += tokenizer.encode(text[:at])
        ids += {"<think>": [tokenizer.think_id], "</think>": [tokenizer.end_think_id], "": []}[mark]
        text = text[at + len(mark) :]
    return ids


@MAKERS
@given(reasoning=TEXT, answer=TEXT, think=st.booleans())
def test_the_split_gives_back_what_an_example_was_made_of(make, reasoning, answer, think):
    """Any texts: with newlines at both ends, with spelled-out marks, empty."""
    message = {"role": "assistant", "content": answer, "reasoning": reasoning}
    prompt, reply = example_ids(make(), [*QUESTION, message], think)
    assert split(make(), prompt, reply) == (reasoning if think else "", answer)


@MAKERS
@given(data=st.data())
def test_pieces_are_whole_characters_and_nothing_is_late(make, data):
    """After every token, what was given is the text so far but for one held newline and an incomplete character."""
    t = make()
    reasoning, answer = data.draw(TEXT.filter(lambda text: "\ufffd" not in text)), data.draw(st.text(max_size=9))
    message = {"role": "assistant", "content": answer.replace("\ufffd", ""), "reasoning": reasoning}
    prompt, reply = example_ids(t, [*QUESTION, message])
    stream, given_so_far = ReasoningSplit(t, prompt), ""
    for n, token_id in enumerate(reply[: reply.index(t.end_think_id)]):
        piece, other = stream.push(token_id)
        given_so_far += piece
        certain = t.decode(reply[: n + 1]).rstrip("\ufffd")
        assert other == "" and "\ufffd" not in piece
        assert given_so_far in (certain, certain.removesuffix("\n"))


@pytest.mark.parametrize(
    ("reply", "reasoning", "answer"),
    [
        ("a\n</think>\n\nb", "a", "b"),
        ("a</think>b", "a", "b"),
        ("a\n\n</think>\n\n\nb\n", "a\n", "\nb\n"),
        ("\n</think>\n\nb", "", "b"),
        ("</think>\n\nb", "", "b"),
        ("</think>", "", ""),
        ("a\n</think>\n", "a", ""),
        ("a\n\nb\n c\n</think>\n\nd", "a\n\nb\n c", "d"),
        ("cut off\n", "cut off\n", ""),  # no </think>: the newline is the text's own
        ("", "", ""),
        ("a\n</think>\n\nb</think>\nc", "a", "b\nc"),  # a second </think> marks nothing
        ("a<think>b\n</think>\n\nc", "ab", "c"),
        ("a\n</think>\n\nb<think>\nd\n</think>\n\ne", "ad", "be"),  # the model thinks again
    ],
)
def test_replies_after_think(reply, reasoning, answer):
    prompt = prompt_ids(trained(), QUESTION)
    assert split(trained(), prompt, reply_ids(trained(), reply)) == (reasoning, answer)


@pytest.mark.parametrize(
    ("reply", "reasoning", "answer"),
    [
        ("b", "", "b"),
        ("\n\nb\n", "", "\n\nb\n"),
        ("b</think>\n\nc", "", "b\n\nc"),
        ("<think>\na\n</think>\n\nb", "a", "b"),
    ],
)
def test_replies_without_thinking(reply, reasoning, answer):
    prompt = prompt_ids(trained(), QUESTION, think=False)
    assert split(trained(), prompt, reply_ids(trained(), reply)) == (reasoning, answer)


def test_a_model_that_opens_its_thinking_itself():
    """Prompts that end in `<｜Assistant｜>` (V3's template) or in `<think>` without the newline (V3.1's)."""
    t = trained()
    bare = [t.bos_id, t.user_id, *t.encode("q"), t.assistant_id]
    assert split(t, bare, reply_ids(t, "<think>\na\n</think>\n\nb")) == ("a", "b")
    assert split(t, bare, reply_ids(t, "\nb")) == ("", "\nb")
    assert split(t, [*bare, t.think_id], reply_ids(t, "\na\n</think>\n\nb")) == ("a", "b")
    assert split(t, [*bare, t.think_id], reply_ids(t, "a</think>b")) == ("a", "b")


def test_the_prompt_decides_by_its_last_turn_only():
    t = trained()
    earlier = [t.bos_id, t.user_id, t.assistant_id, t.think_id, *t.encode("old"), t.eos_id, t.user_id, t.assistant_id]
    assert split(t, earlier, t.encode("b")) == ("", "b")
    begun = [*prompt_ids(t, QUESTION), *t.encode("So far")]
    assert split(t, begun, reply_ids(t, "\nand on\n</think>\n\nb")) == ("\nand on", "b")


def test_text_that_spells_a_mark_is_text():
    t = trained()
    prompt = prompt_ids(t, QUESTION)
    assert split(t, prompt, t.encode("I write </think> here")) == ("I write </think> here", "")


def test_eos_and_unknown_ids_are_no_text():
    t = trained()
    prompt = prompt_ids(t, QUESTION)
    assert split(t, prompt, [*reply_ids(t, "a\n</think>\n\nb"), t.eos_id, t.vocab_size + 7]) == ("a", "b")


def test_a_model_without_think_tokens_only_answers():
    t = Tokenizer(deepseek_spec(without=("<think>", "</think>")), {})
    assert split(t, prompt_ids(t, QUESTION), t.encode("\n</think> b\n")) == ("", "\n</think> b\n")


def test_a_character_cut_off_by_a_mark_is_shown_as_such():
    t = trained()
    cut = t.encode("𝄞")[:2]
    prompt = prompt_ids(t, QUESTION)
    assert split(t, prompt, [*cut, t.end_think_id, *t.encode("\n\nb"), *cut]) == ("\ufffd", "b\ufffd")
