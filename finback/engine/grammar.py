"""Grammars: a JSON schema or a regular expression that an answer must match, as masks over the vocabulary."""

import json
from dataclasses import dataclass
from typing import Any, Literal

from finback.errors import UserError

_MOST_BYTES = {"json_schema": 64 * 1024, "json_object": 0, "regex": 4 * 1024}
_MOST_DEPTH = 32


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
