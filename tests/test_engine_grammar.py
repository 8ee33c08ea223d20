"""Grammars: what may come next against enumeration, whole answers against validators of the tests' own, and bombs."""

import json
import re
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finback.engine import Grammar, Sampling
from finback.engine.grammar import Grammars
from finback.engine.sampling import choose
from finback.errors import UserError
from finback.text import Tokenizer
from finback.weights import load_tokenizer

SPARE = 7  # ids of the model that the tokenizer does not have
NAMES = ["calf", "tiny"]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["cat", "dög", None, 3]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"anyOf": [{"type": "number"}, {"type": "null"}]},
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"const": "end"}]},
            },
            "required": ["value", "next"],
            "additionalProperties": False,
        }
    },
}
CODES = {"type": "array", "items": {"type": "string", "pattern": "^[A-C]{2}-[0-9]+$"}, "maxItems": 4}
TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "number": (int, float), "integer": int}


@cache
def tokenizer(name: str) -> Tokenizer:
    return load_tokenizer("calf") if name == "calf" else Tokenizer.train(['{"name": "ab", "é": [1, 2]} true'] * 3, 300)


@cache
def grammars(name: str) -> Grammars:
    return Grammars(tokenizer(name), tokenizer(name).vocab_size + SPARE, tokenizer(name).eos_ids)


def valid(value, schema: dict, root: dict) -> bool:
    """A validator of the keywords that the schemas here use."""
    if "$ref" in schema:
        return valid(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root)
    if "anyOf" in schema:
        return any(valid(value, option, root) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return value in schema.get("enum", [schema.get("const")])
    kind = schema["type"]
    if kind == "null" or value is None:
        return kind == "null" and value is None
    if not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
        return False
    if kind == "object" and "properties" in schema:
        known = schema["properties"]
        inside = all(key in known and valid(item, known[key], root) for key, item in value.items())
        return inside and set(schema["required"]) <= value.keys()
    if kind == "array":
        fits = schema.get("minItems", 0) <= len(value) <= schema["maxItems"]
        return fits and all(valid(item, schema["items"], root) for item in value)
    if kind == "integer":
        return schema["minimum"] <= value <= schema["maximum"]
    return "pattern" not in schema or re.search(schema["pattern"], value) is not None


def answer(name: str, grammar: Grammar, seed: int) -> tuple[list[int], str]:
    """An answer drawn from random logits under the grammar; after a while what closes things becomes likely."""
    words, generator = tokenizer(name), np.random.default_rng(seed)
    state, ids = grammars(name).start(grammar), []
    closing = {b'"': 20, b"}": 20, b"]": 20, b",": 17, b"0": 14}
    boost = np.array([closing.get(words.token_bytes(i), 0) for i in range(words.vocab_size + SPARE)], dtype=np.float32)
    for position in range(2000):
        logits = generator.normal(0, 2, words.vocab_size + SPARE).astype(np.float32)
        logits[words.eos_id] += 1
        logits += boost * (position > 30)
        token = choose(logits, Sampling(temperature=1), seed, 0, position, mask=state.mask()).token
        state.accept(token)
        if token in words.eos_ids:
            return ids, words.decode(ids)
        assert token not in words.marks.values() and token < words.vocab_size
        ids.append(token)
    raise AssertionError(f"no end: {words.decode(ids)!r}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schema", [PERSON, TREE, CODES], ids=["person", "tree", "codes"])
@given(seed=st.integers(0, 10**6))
@settings(max_examples=12)
def test_every_answer_under_a_schema_parses_and_validates(name, schema, seed):
    _, text = answer(name, Grammar("json_schema", json.dumps(schema)), seed)
    assert valid(json.loads(text), schema, schema), text


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 10**6))
@settings(max_examples=12)
def test_every_answer_under_json_object_is_an_object(name, seed):
    _, text = answer(name, Grammar("json_object"), seed)
    assert isinstance(json.loads(text), dict), text


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("regex", [r"[a-f]+@[0-9]{2,3}", r"(ja|nein|ö+) ?/[^\n]x", r"a|b/ | \"zz\"", "x\ny: /z/", "é?"])
@given(seed=st.integers(0, 10**6))
@settings(max_examples=8)
def test_every_answer_under_a_regex_matches_it_whole(name, regex, seed):
    _, text = answer(name, Grammar("regex", regex), seed)
    assert re.fullmatch(regex, text), text


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "regex, language",
    [
        ("(ab|abc|é|éa)x?", [a + b for a in ("ab", "abc", "é", "éa") for b in ("", "x")]),
        ("<think>|</think>|<t", ["<think>", "</think>", "<t"]),
        ('(true|"a": ){0,2}', ["", *(a + b for a in ("true", '"a": ') for b in ("", "true", '"a": '))]),
    ],
)
def test_what_may_come_next_is_what_some_text_goes_on_with(name, regex, language):
    """Every chunk of tokens, at every point that any of them reaches: byte by byte against all texts."""
    words, texts = tokenizer(name), [text.encode() for text in language]
    todo = [(b"", grammars(name).start(Grammar("regex", regex)))]
    seen = set()
    while todo:
        prefix, state = todo.pop()
        expected = [
            i
            for i in range(words.vocab_size)
            if words.token_bytes(i)
            and i not in words.marks.values()
            and any(text.startswith(prefix + words.token_bytes(i)) for text in texts)
        ]
        left = [text.removeprefix(prefix) for text in texts if text.startswith(prefix)]
        allowed = np.flatnonzero(state.mask()).tolist()
        # Where the next bytes are certain, llguidance wants them in the tokenizer's own tokens.
        if len({text[:1] for text in left}) == 1 and left != [b""]:
            assert allowed and set(allowed) <= set(expected), prefix
        else:
            assert allowed == sorted([*expected, *(words.eos_ids if prefix in texts else [])]), prefix
        assert state.done == (not expected)
        for token in set(allowed) - words.eos_ids:
            if (reached := prefix + words.token_bytes(token)) not in seen:
                seen.add(reached)
                todo.append((reached, state.copy()))
                todo[-1][1].accept(token)
    assert seen >= set(texts) - {b""}


def test_states_of_one_grammar_go_on_independently():
    words, grammar = tokenizer("calf"), Grammar("regex", "ab")
    first, second = grammars("calf").start(grammar), grammars("calf").start(grammar)
    before = second.mask().copy()
    first.accept(words.encode("a")[0])
    np.testing.assert_array_equal(second.mask(), before)
    assert not np.array_equal(first.mask(), before)
    with pytest.raises(UserError, match="cannot come here"):
        second.accept(words.encode("b")[0])
    with pytest.raises(UserError, match="cannot come here"):
        second.accept(words.eos_id)


def test_only_the_grammars_used_last_are_kept():
    own = Grammars(tokenizer("tiny"), 300, tokenizer("tiny").eos_ids)
    for n in range(50):
        own.start(Grammar("regex", f"a{{{n}}}b"))
        assert own.start(Grammar("regex", "first")).mask().any()
    assert len(own._compiled) == 32 and Grammar("regex", "first") in own._compiled


BOMBS = [
    ("regex", "((a{1000}){1000}){1000}"),
    ("regex", "a{1000000}"),
    ("regex", "a{80000}"),  # llguidance alone would take it
    ("regex", "(a?){500}a{500}"),
    ("regex", "(" * 2000),
    ("json_schema", '{"$ref": "#"}'),
    ("json_schema", json.dumps({"allOf": [{"anyOf": [{"minLength": i} for i in range(30)]} for _ in range(12)]})),
    ("json_schema", json.dumps({"type": "string", "pattern": "^((a{1000}){1000}){1000}$"})),
]


@pytest.mark.parametrize("kind, text", BOMBS)
def test_what_costs_too_much_is_refused_on_one_line(kind, text):
    words = tokenizer("calf")
    with pytest.raises(UserError, match=r"^grammar: llguidance refuses it: [^\n]*$"):
        state = grammars("calf").start(Grammar(kind, text))
        for token in words.encode('"aaaa'):  # inside a schema, a few tokens on
            state.accept(token)
            state.mask()


@pytest.mark.parametrize(
    "kind, text, reason",
    [
        ("regex", "[a", "unclosed character class"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", r"(a)\1", "backreferences"),
        ("json_schema", '{"type": "foo"}', "Invalid type: foo"),
        ("json_schema", '{"not": {}}', "Unimplemented keys"),
        ("json_schema", '{"$ref": "http://example.com/x"}', "does not fetch"),
    ],
)
def test_what_does_not_compile_is_refused_with_the_reason(kind, text, reason):
    with pytest.raises(UserError, match=f"^grammar: llguidance refuses it: .*{reason}.*; mend or simplify it$"):
        grammars("tiny").start(Grammar(kind, text))


@pytest.mark.parametrize(
    "kind, text, message",
    [
        ("lark", "start: x", "grammar.kind is 'lark'; it must be 'json_schema', 'json_object', 'regex'"),
        ("regex", 3, "grammar.text is int"),
        ("regex", "a" * 4097, "grammar.text has 4097 bytes; a regex has at most 4096"),
        ("json_object", "{}", "grammar.text has 2 bytes; a json_object has at most 0"),
        ("json_schema", '{"enum": ["' + "x" * 65536 + '"]}', "a json_schema has at most 65536"),
        ("json_schema", "{", "grammar.text is no JSON"),
        ("json_schema", "[]", "grammar.text is a JSON list"),
        ("json_schema", "[" * 30000, "nested too deeply"),
        ("json_schema", '{"not":' * 33 + "{}" + "}" * 33, "grammar.text is nested 34 deep; .* at most 32 deep"),
    ],
)
def test_texts_that_are_not_allowed_are_named(kind, text, message):
    with pytest.raises(UserError, match=message):
        Grammar(kind, text)


def test_without_llguidance_the_fix_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"pip install finback\[grammar\]"):
        Grammars(tokenizer("tiny"), 300, {1})


def test_llguidance_is_imported_on_first_use():
    code = "import sys, finback.engine; finback.engine.Grammar('json_object'); print('llguidance' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
