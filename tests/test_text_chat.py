"""The chat format: the exact text of DeepSeek-R1's template, made of ids, one BOS, no mark that a user wrote."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_text_tokenizer import TEXT
from text_samples import SPECIAL, deepseek, deepseek_spec, trained

from finback.errors import UserError
from finback.text import Tokenizer, example_ids, prompt_ids

MAKERS = pytest.mark.parametrize("make", [trained, deepseek], ids=lambda make: make.__name__)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4", "reasoning": "Two and two."},
    {"role": "user", "content": "And 3 + 3?"},
]


def shown(tokenizer, ids):
    return tokenizer.decode(ids, skip_special=False)


def user(text):
    return [{"role": "user", "content": text}]


@MAKERS
def test_the_format_is_that_of_r1(make):
    """System glued to BOS, nothing between turns, EOS after assistant turns only, `<think>\\n` at the end."""
    head = (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>2 + 2?<｜Assistant｜>4<｜end▁of▁sentence｜>"
        "<｜User｜>And 3 + 3?<｜Assistant｜>"
    )
    assert shown(make(), prompt_ids(make(), CHAT)) == head + "<think>\n"
    assert shown(make(), prompt_ids(make(), CHAT, think=False)) == head + "</think>"


@MAKERS
def test_an_example_is_the_prompt_and_the_reply(make):
    reply = {"role": "assistant", "content": "6", "reasoning": "3 + 3 = 6."}
    prompt, ids = example_ids(make(), [*CHAT, reply])
    assert prompt == prompt_ids(make(), CHAT)
    assert shown(make(), ids) == "3 + 3 = 6.\n</think>\n\n6<｜end▁of▁sentence｜>"
    assert ids[-1] == make().eos_id and ids.count(make().end_think_id) == 1
    prompt, ids = example_ids(make(), [*CHAT, reply], think=False)
    assert prompt == prompt_ids(make(), CHAT, think=False)
    assert shown(make(), ids) == "6<｜end▁of▁sentence｜>"


@MAKERS
@given(question=TEXT, reasoning=TEXT, answer=TEXT)
def test_segments_are_encoded_alone(make, question, reasoning, answer):
    """Prompt and reply together are the pieces, encoded one by one: no token spans a mark."""
    t = make()
    reply = {"role": "assistant", "content": answer, "reasoning": reasoning}
    prompt, ids = example_ids(t, [*user(question), reply])
    pieces = [t.bos_id, t.user_id, *t.encode(question), t.assistant_id, t.think_id, *t.encode("\n")]
    pieces += [*t.encode(reasoning + "\n"), t.end_think_id, *t.encode("\n\n" + answer), t.eos_id]
    assert prompt + ids == pieces


@MAKERS
@given(contents=st.lists(TEXT, min_size=1, max_size=4), system=TEXT, think=st.booleans())
def test_no_text_becomes_a_mark(make, contents, system, think):
    """The marks of a prompt are those of its turns, whatever the texts say: one BOS, the right number of the others."""
    t = make()
    chat = [{"role": "system", "content": system}]
    for n, content in enumerate(contents):
        chat += [{"role": "assistant", "content": content}] * (n > 0) + user(content)
    ids = prompt_ids(t, chat, think)
    special = {token["id"] for token in t._spec["added_tokens"]}
    turns = [t.user_id, *[t.assistant_id, t.eos_id, t.user_id] * (len(contents) - 1)]
    assert [i for i in ids if i in special] == [
        t.bos_id,
        *turns,
        t.assistant_id,
        t.think_id if think else t.end_think_id,
    ]


@pytest.mark.parametrize("mark", SPECIAL)
def test_a_user_cannot_forge_a_turn(mark):
    ids = prompt_ids(trained(), user(f"hi{mark}"))
    honest = prompt_ids(trained(), user("hi"))
    special = {token["id"] for token in trained()._spec["added_tokens"]}
    assert [i for i in ids if i in special] == [i for i in honest if i in special]
    assert f"hi{mark}" in shown(trained(), ids)


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        ("<think>\nlong\n</think>\n\n4", "4"),
        ("long\n</think>\n\n4", "4"),
        ("</think>4", "4"),
        ("a</think>b</think>\nc", "c"),
        ("x</think>\n\n\n  4\n", "\n  4\n"),
        ("no marks\n", "no marks\n"),
        ("\n\n<think> only opened", "\n\n<think> only opened"),
    ],
)
def test_earlier_turns_lose_their_thinking(content, kept):
    chat = [*user("a"), {"role": "assistant", "content": content, "reasoning": "never shown"}, *user("b")]
    plain = [*user("a"), {"role": "assistant", "content": kept}, *user("b")]
    text = shown(trained(), prompt_ids(trained(), chat))
    assert f"<｜Assistant｜>{kept}<｜end▁of▁sentence｜>" in text and "never shown" not in text
    if "</think>" not in kept:
        assert prompt_ids(trained(), chat) == prompt_ids(trained(), plain)


def test_system_texts_stand_together_after_bos():
    chat = [{"role": "system", "content": "A"}, *user("q"), {"role": "system", "content": "B"}, *user("r")]
    expected = "<｜begin▁of▁sentence｜>A\n\nB<｜User｜>q<｜User｜>r<｜Assistant｜></think>"
    assert shown(trained(), prompt_ids(trained(), chat, think=False)) == expected


def test_a_model_without_think_tokens_just_answers():
    tokenizer = Tokenizer(deepseek_spec(without=("<think>", "</think>")), {})
    for think in (True, False):
        assert prompt_ids(tokenizer, user("hi"), think)[-1] == tokenizer.assistant_id
    reply = {"role": "assistant", "content": "yo"}
    _, ids = example_ids(tokenizer, [*user("hi"), reply], think=False)
    assert ids == [*tokenizer.encode("yo"), tokenizer.eos_id]
    with pytest.raises(UserError, match="think=True"):
        example_ids(tokenizer, [*user("hi"), reply])


def test_a_model_without_chat_tokens_is_refused():
    with pytest.raises(UserError, match="User"):
        prompt_ids(Tokenizer(deepseek_spec(without=("<｜User｜>", "<｜Assistant｜>")), {}), user("hi"))


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([], "empty"),
        ([{"role": "robot", "content": "x"}], "'robot'"),
        ([{"content": "x"}], "messages\\[0\\].role None"),
        ([*user("x"), {"role": "assistant", "content": "y"}], "the last must be"),
        ([{"role": "system", "content": "x"}], "the last must be"),
        ([{"role": "user"}], "content"),
        (user(None), "NoneType"),
        (user(["x"]), "list"),
        (user("\udfff"), "lone surrogate"),
    ],
)
def test_bad_chats_are_refused(chat, message):
    with pytest.raises(UserError, match=message):
        prompt_ids(trained(), chat)


def test_an_example_ends_with_the_assistant():
    with pytest.raises(UserError, match="the last must be 'assistant'"):
        example_ids(trained(), CHAT)
    with pytest.raises(UserError, match="the last must be 'user'"):
        example_ids(trained(), [{"role": "assistant", "content": "x"}] * 2)


def test_the_template_in_our_files_says_the_same(tmp_path):
    """transformers renders our chat_template; its text must be ours. (Marks inside texts are where templates fail.)"""
    from transformers import AutoTokenizer

    trained().save(tmp_path)
    other = AutoTokenizer.from_pretrained(tmp_path)
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}
    chats = [
        CHAT,
        user("hi"),
        [*user("a"), thought, *user("b")],
        [{"role": "system", "content": "A"}, *user("q"), {"role": "system", "content": "B"}, *user("\n r ")],
        [*user("a"), {"role": "assistant", "content": "x</think>\ny"}, *user("b")],
    ]
    for chat in chats:
        for think in (True, False):
            text = other.apply_chat_template(chat, add_generation_prompt=True, tokenize=False, thinking=think)
            assert text == shown(trained(), prompt_ids(trained(), chat, think))
        ids = other.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert ids == prompt_ids(trained(), chat)
