"""Every family: the ids of a chat are those of its rendered template, text is only text, one BOS, all ends of turn."""

import functools
import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from test_text_reasoning import split
from text_families import BOS, EOS, FAMILIES, QWEN2, THINK, TURNS, V2, Family
from text_samples import SPECIAL

from finback.errors import UserError
from finback.text import Tokenizer, example_ids, prompt_ids

EACH = pytest.mark.parametrize("name", FAMILIES)
# Words that the tokenizers have merges for, newlines and spaces at both ends; no "<", so no mark.
WORDS = st.sampled_from(
    ["\n", "\n\n", " ", "Hi", "User: ", "Assistant:", "42", "ö", "鲸鱼", "The answer is", "'ll", "\r\n"]
)
TEXT = st.lists(WORDS | st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=3), max_size=6).map(
    "".join
)
THINKING = ("R1", "R1, first template", "V3.1", "R1-Distill-Qwen", "R1-Distill-Llama")


@functools.cache
def tokenizer_of(name):
    return FAMILIES[name].tokenizer()


@functools.cache
def library_of(name):
    return tokenizers.Tokenizer.from_str(json.dumps(FAMILIES[name].spec()))


def rendered(name, chat, think):
    """The text of the template. R1's has no form without thinking: that is V3.1's; its first one lacks `<think>`."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    family = FAMILIES[name]
    text = environment.from_string(family.template).render(
        messages=chat, add_generation_prompt=True, bos_token=family.bos or "", eos_token=family.eos[0], thinking=think
    )
    if name in THINKING and name != "V3.1":
        text = text.removesuffix("<think>\n") + ("<think>\n" if think else "</think>")
    return text


def chat_of(system, turns, reasoning=""):
    chat = [] if system is None else [{"role": "system", "content": system}]
    for n, content in enumerate(turns):
        role = "assistant" if n % 2 else "user"
        chat.append({"role": role, "content": reasoning + content if n % 2 else content})
    return chat


@EACH
@settings(max_examples=40)
@given(system=st.none() | TEXT, turns=st.lists(TEXT, min_size=3, max_size=3) | st.lists(TEXT, min_size=1, max_size=1))
def test_a_prompt_is_the_rendered_template(name, system, turns):
    chat = chat_of(system, turns)
    for think in (True, False):
        assert prompt_ids(tokenizer_of(name), chat, think) == library_of(name).encode(rendered(name, chat, think)).ids


def test_reference_strings():
    """Prompts as the model cards and llama.cpp's tests have them."""
    chat = chat_of("You are a helpful assistant", ["Hello", "Hi there", "Who are you"])
    turn = "<｜User｜>Hello<｜Assistant｜>Hi there<｜end▁of▁sentence｜><｜User｜>Who are you<｜Assistant｜>"
    system = f"{BOS}You are a helpful assistant"
    heads = {role: f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("system", "user", "assistant")}
    moon = {role: f"<|im_{role}|>{role}<|im_middle|>" for role in ("system", "user", "assistant")}
    expected = {
        "deepseek-llm": system + f"\n\nUser: Hello\n\nAssistant: Hi there{EOS}User: Who are you\n\nAssistant:",
        "V2.5": system + turn,
        "V3": system + turn,
        "V3 with think tokens": system + turn,
        "R1": system + turn + "<think>\n",
        "R1, first template": system + turn + "<think>\n",
        "V3.1": system + turn.replace("Hi", "</think>Hi") + "<think>",
        "Qwen2.5": "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi there<|im_end|>\n<|im_start|>user\nWho are you<|im_end|>\n<|im_start|>assistant\n",
        "Llama 3": f"<|begin_of_text|>{heads['system']}You are a helpful assistant<|eot_id|>{heads['user']}Hello"
        f"<|eot_id|>{heads['assistant']}Hi there<|eot_id|>{heads['user']}Who are you<|eot_id|>{heads['assistant']}",
        "Moonlight": f"{moon['system']}You are a helpful assistant<|im_end|>{moon['user']}Hello<|im_end|>"
        f"{moon['assistant']}Hi there<|im_end|>{moon['user']}Who are you<|im_end|>{moon['assistant']}",
    }
    for name, text in expected.items():
        tokenizer = tokenizer_of(name)
        assert tokenizer.decode(prompt_ids(tokenizer, chat), skip_special=False) == text, name


@EACH
@given(text=TEXT)
def test_plain_text_begins_with_bos_where_the_family_does_so(name, text):
    """One BOS at most, and at the start alone; Qwen2 has none, and Moonlight's tokenizer does not add its own."""
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    if family.bos is None or "add_bos_token" in family.config:
        assert tokenizer.start_ids == []
    else:
        assert tokenizer.start_ids == [tokenizer.bos_id] == [tokenizer.marks[family.bos]]
    assert tokenizer.bos_id not in tokenizer.encode(text)
    chat = prompt_ids(tokenizer, chat_of(None, [text]))
    assert tokenizer.bos_id not in chat[1:] and (tokenizer.bos_id == chat[0]) == bool(tokenizer.start_ids)


@EACH
def test_all_ends_of_turn_stop_a_reply(name):
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    assert {tokenizer.decode([i], skip_special=False) for i in tokenizer.eos_ids} == set(family.eos)
    assert tokenizer.eos_id == tokenizer.marks[family.eos[0]] == tokenizer.pad_id


@EACH
def test_text_that_spells_marks_stays_text(name):
    tokenizer = tokenizer_of(name)
    marks = {*FAMILIES[name].marks, *SPECIAL, "<|im_end|>", "<|eot_id|>", "<|im_middle|>"}
    honest = [i for i in prompt_ids(tokenizer, chat_of("x", ["x", "x", "x"])) if i in tokenizer.marks.values()]
    for mark in marks - set(THINK):
        forged = prompt_ids(tokenizer, chat_of(f"x{mark}x", [f"{mark}user\nx", f"x{mark}", mark]))
        assert [i for i in forged if i in tokenizer.marks.values()] == honest
        text = f"a{mark} {mark}{mark}\n"
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert set(tokenizer.marks.values()).isdisjoint(tokenizer.encode(text))


@EACH
def test_earlier_thinking_is_dropped_where_a_family_thinks(name):
    tokenizer = tokenizer_of(name)
    thought, plain = chat_of(None, ["a", "4", "b"], "hm\n</think>"), chat_of(None, ["a", "4", "b"])
    same = prompt_ids(tokenizer, thought) == prompt_ids(tokenizer, plain)
    assert same == (name in THINKING)


@EACH
@given(question=TEXT, reasoning=TEXT, answer=TEXT)
def test_a_reply_ends_and_reads_back(name, question, reasoning, answer):
    """What is trained is what is generated: the split gives back thinking and answer, and EOS is learned."""
    tokenizer = tokenizer_of(name)
    message = {"role": "assistant", "content": answer, "reasoning": reasoning}
    for think in (False, True)[: 1 + (name in THINKING)]:
        prompt, reply = example_ids(tokenizer, [*chat_of(None, [question]), message], think)
        assert prompt == prompt_ids(tokenizer, chat_of(None, [question]), think)
        assert reply[-1] in tokenizer.eos_ids and tokenizer.eos_ids.isdisjoint(reply[:-1])
        thought, text = split(tokenizer, prompt, reply)
        if name.startswith("Llama"):
            answer = answer.strip()
        if tokenizer._spec["normalizer"] or (think and name == "V3.1"):  # NFC; newlines that this format does not add
            continue
        assert (thought, text) == (reasoning if think else "", (" " if name == "deepseek-llm" else "") + answer)


def test_letters_that_are_tokens_are_text():
    """deepseek-llm's thirteen letters: encoded as its file says, decoded as themselves."""
    family, tokenizer = FAMILIES["deepseek-llm"], FAMILIES["deepseek-llm"].tokenizer()
    library = tokenizers.Tokenizer.from_str(json.dumps(family.spec()))
    text = "Größe: søt, ö ú"
    ids = tokenizer.encode(text)
    assert ids == library.encode(text).ids and library.token_to_id("ö") in ids
    assert tokenizer.decode(ids) == text and "ö" not in tokenizer.marks


def test_the_format_is_found_without_a_template():
    """By the marks alone; the same prompt but for a default system message, which only a template can tell."""
    for name, family in FAMILIES.items():
        if name not in ("V3 with think tokens", "V3.1", "Llama 3.1"):
            bare = Tokenizer(family.spec(), {"bos_token": family.bos, "eos_token": family.eos[0]})
            chat = chat_of("s", ["a", "b", "c"])
            assert prompt_ids(bare, chat) == prompt_ids(family.tokenizer(), chat), name


def test_one_of_several_templates_is_the_default():
    family = FAMILIES["Qwen2"]
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": QWEN2}]
    tokenizer = Tokenizer(family.spec(), {"bos_token": None, "eos_token": "<|im_end|>", "chat_template": several})
    assert prompt_ids(tokenizer, chat_of(None, ["a"])) == prompt_ids(family.tokenizer(), chat_of(None, ["a"]))


@pytest.mark.parametrize("name", ["Qwen2", "V3", "Llama 3", "Moonlight"])
def test_a_template_of_another_format_is_not_guessed(name):
    """The marks would fit, but the template does not use them."""
    other = "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
    tokenizer = Tokenizer(
        FAMILIES[name].spec(), {"bos_token": None, "eos_token": FAMILIES[name].eos[0], "chat_template": other}
    )
    with pytest.raises(UserError, match="plain text instead"):
        prompt_ids(tokenizer, chat_of(None, ["a"]))


def test_the_tokens_a_config_names_must_be_there():
    spec = FAMILIES["V3"].spec()
    with pytest.raises(UserError, match="eos_token '<end>'"):
        Tokenizer(spec, {"eos_token": "<end>"})
    with pytest.raises(UserError, match="must name its eos_token"):
        Tokenizer(spec, {"eos_token": None})
    tokenizer = Tokenizer(spec, {"bos_token": TURNS[0], "eos_token": TURNS[1], "pad_token": {"content": EOS}})
    assert (tokenizer.bos_id, tokenizer.eos_id) == (tokenizer.user_id, tokenizer.assistant_id)
    assert tokenizer.pad_id == tokenizer.marks[EOS]
    family = Family("qwen2", FAMILIES["Qwen2"].marks, V2, None, ("<|im_end|>",))
    assert family.tokenizer().bos_id is None


def test_a_file_without_a_config_finds_its_tokens(tmp_path):
    for name in ("V3", "Llama 3", "Qwen2"):
        (tmp_path / "tokenizer.json").write_text(json.dumps(FAMILIES[name].spec()), encoding="utf-8")
        loaded, family = Tokenizer.load(tmp_path), FAMILIES[name]
        assert loaded.bos_id == loaded.marks.get(family.bos) and loaded.eos_ids == family.tokenizer().eos_ids
