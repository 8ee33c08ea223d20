"""Grammars: a JSON schema or a regular expression that an answer must match, as masks over the vocabulary.

llguidance (an extra, imported on first use) compiles them and says which tokens may come next.
"""

import json
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from finback.errors import UserError
from finback.text import Tokenizer

_MOST_BYTES = {"json_schema": 64 * 1024, "json_object": 0, "regex": 4 * 1024}
_MOST_DEPTH = 32
_KEPT = 32  # compiled grammars that an engine keeps
# A fraction of llguidance's own bounds: what costs more would hold up the tokens of everybody else.
_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 100_000,
    "max_lexer_states": 25_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
# Between the parts of a JSON value; unbounded, a model can write spaces until its tokens are used up.
_SPACE = r"[ \t\n\r]{0,40}"


@dataclass(frozen=True)
class Grammar:
    """What an answer must be. Raises UserError for a text that is too long, too deep or no JSON.

    kind: "json_schema" (text is the schema), "json_object" (any object; no text) or "regex" (the whole answer matches;
    Rust's syntax, neither look-around nor backreferences). Whether it compiles, `Grammars.start` finds out.
    """

    kind: Literal["json_schema", "json_object", "regex"]
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in _MOST_BYTES:
            raise UserError(f"grammar.kind is {self.kind!r}; it must be {', '.join(map(repr, _MOST_BYTES))}")
        if not isinstance(self.text, str):
            raise UserError(f"grammar.text is {type(self.text).__name__}; it must be text, a schema as JSON")
        size, most = len(self.text.encode("utf-8", errors="surrogatepass")), _MOST_BYTES[self.kind]
        if size > most:
            raise UserError(f"grammar.text has {size} bytes; a {self.kind} has at most {most}")
        if self.kind == "json_schema":
            _check_schema(self.text)


def _check_schema(text: str) -> None:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"grammar.text is no JSON: {reason}; a json_schema is a JSON object") from error
    if not isinstance(schema, dict):
        raise UserError(f"grammar.text is a JSON {type(schema).__name__}; a json_schema is a JSON object")
    if (depth := _depth(schema)) > _MOST_DEPTH:
        raise UserError(f"grammar.text is nested {depth} deep; a json_schema is at most {_MOST_DEPTH} deep")


def _depth(value: Any) -> int:
    """How many objects and lists lie inside each other, level by level."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


class Grammars:
    """What one engine needs to constrain answers: its tokenizer as llguidance's, and the grammars compiled last."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Collection[int]) -> None:
        """vocab_size: of the model's logits; ids that the tokenizer lacks never come.

        Raises UserError without llguidance.
        """
        try:
            import llguidance
        except ImportError as error:
            raise UserError("grammar: llguidance is not installed; pip install finback[grammar]") from error
        self._llguidance = llguidance
        self._eos_ids = np.array(sorted(eos_ids), dtype=np.int64)
        self._special = np.array(sorted({*tokenizer.marks.values(), *eos_ids}), dtype=np.int64)
        self._vocab_size = vocab_size
        wrapper = llguidance.TokenizerWrapper(_Vocabulary(tokenizer, vocab_size, self._special.tolist()))
        self._tokenizer = llguidance.LLTokenizer(wrapper, eos_token=self._eos_ids.tolist())
        self._compiled: OrderedDict[Grammar, Any] = OrderedDict()

    def start(self, grammar: Grammar) -> "GrammarState":
        """A fresh answer under `grammar`. Raises UserError with llguidance's reason if it does not compile."""
        if grammar not in self._compiled:
            state = GrammarState(self._compile(grammar), self._vocab_size, self._eos_ids, self._special)
            state.probe()
            self._compiled[grammar] = state
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return self._compiled[grammar].copy()

    def _compile(self, grammar: Grammar) -> Any:
        matcher = self._llguidance.LLMatcher
        if grammar.kind == "regex":
            text = matcher.grammar_from_regex(grammar.text)
        else:
            schema = grammar.text or '{"type": "object"}'
            text = matcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": _SPACE})
        limits = self._llguidance.LLParserLimits(**_LIMITS)
        return matcher(self._tokenizer, text, log_level=0, limits=limits)


class GrammarState:
    """How far one answer has come in its grammar."""

    def __init__(self, matcher: Any, vocab_size: int, eos_ids: np.ndarray, special: np.ndarray) -> None:
        self._matcher, self._vocab_size, self._eos_ids, self._special = matcher, vocab_size, eos_ids, special
        self._mask: np.ndarray | None = None
        _check_matcher(matcher)

    def mask(self) -> np.ndarray:
        """The tokens [V] (bool, not to be written to) that may come next: EOS where the answer may end.

        Raises UserError when the grammar costs too much here or has no way to go on.
        """
        if self._mask is None:
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            mask = np.unpackbits(bits, count=self._vocab_size, bitorder="little").astype(bool)
            ends = self._matcher.is_accepting()
            mask[self._special] = False
            mask[self._eos_ids] = ends
            if not mask.any():
                _check_matcher(self._matcher)
                raise UserError("grammar: no text matches it from here; a schema may refer to itself without an end")
            mask.flags.writeable = False
            self._mask = mask
        return self._mask

    def accept(self, token: int) -> None:
        """Go on by one token that `mask` allows. Raises UserError for one that it does not."""
        if not self.mask()[token]:
            raise UserError(f"grammar: token {token} cannot come here; choose one that the mask allows")
        if token not in self._eos_ids:
            self._matcher.consume_token(token)
            _check_matcher(self._matcher)
            self._mask = None

    @property
    def done(self) -> bool:
        """Whether nothing but the end may follow."""
        return int(np.count_nonzero(self.mask())) == int(np.count_nonzero(self.mask()[self._eos_ids]))

    def copy(self) -> "GrammarState":
        """The same state, to go on from independently."""
        return GrammarState(self._matcher.deep_copy(), self._vocab_size, self._eos_ids, self._special)

    def probe(self) -> None:
        """Take one step aside: a grammar that costs too much is refused before anything is generated."""
        aside = self.copy()
        if not aside.done:
            aside.accept(int(np.flatnonzero(aside.mask())[-1]))
            aside.mask()


class _Vocabulary:
    """The tokenizer as llguidance asks for one."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, special_ids: list[int]) -> None:
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(vocab_size)]
        self.special_token_ids = special_ids
        self._encode = tokenizer.encode

    def __call__(self, text: bytes) -> list[int]:
        return self._encode(text.decode("utf-8"))


def _check_matcher(matcher: Any) -> None:
    if matcher.is_error():
        lines = matcher.get_error().splitlines()
        # Of a regex that does not parse, this line names the fault; the first repeats the regex.
        reason = next((line for line in lines if line.startswith("error: ")), lines[0])
        raise UserError(f"grammar: llguidance refuses it: {reason[:300]}; mend or simplify it")
