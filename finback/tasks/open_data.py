"""Templates, topics and whole sentences of the open questions, from open.toml."""

import tomllib
from pathlib import Path

from finback.tasks.words import NAMES, WORDS


def _lines(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.strip().replace("\n", "|").split("|"))


def _commas(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in " ".join(text.split()).split(","))


_DATA = tomllib.loads(Path(__file__).with_name("open.toml").read_text(encoding="utf-8"))
TOPICS = {group: _commas(text) for group, text in _DATA["topics"].items()}
TOPICS |= {"word": WORDS, "name": NAMES, "number": tuple(map(str, range(2, 1000)))}
TEMPLATES = tuple((group, line) for group, text in _DATA["templates"].items() for line in _lines(text))
SENTENCES = _lines(_DATA["sentences"])
