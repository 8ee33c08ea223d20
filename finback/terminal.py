"""How replies, conversations and tables look: answers on stdout, everything else on stderr."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import IO, TYPE_CHECKING

from finback.errors import UserError

if TYPE_CHECKING:
    from finback.engine import Completion, Delta
    from finback.text import Message
    from finback.weights.disk import HotExperts

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
# What a model writes must not move the cursor or change the terminal: control characters but newline and tab.
_CONTROLS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}

HELP = """\
/think   turn thinking on or off
/clear   forget the conversation
/help    this list
/exit    leave (so does Ctrl-D); Ctrl-C stops an answer"""


def note(text: str) -> None:
    """A remark of the program, dimmed on a terminal, on stderr."""
    print(_dimmed(text, sys.stderr), file=sys.stderr, flush=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Rows on stdout: aligned on a terminal, separated by tabs in a pipe."""
    if not sys.stdout.isatty():
        for row in (columns, *rows):
            print("\t".join(" ".join(str(cell).split()) for cell in row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    view = Table(*columns, box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for row in rows:
        view.add_row(*(Text(str(cell).translate(_CONTROLS)) for cell in row))
    Console().print(view)


def print_json(value: object) -> None:
    """A value as JSON on stdout."""
    print(json.dumps(value, ensure_ascii=False, indent=2))


def plain(value: object) -> str:
    """A fact as a person reads it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def size(value: int | None) -> str:
    """Bytes as a person reads them."""
    if value is None:
        return "–"
    return f"{value / 2**30:,.1f} GiB" if value >= 2**30 else f"{value / 2**20:,.1f} MiB"


def note_experts(hot: "HotExperts | None") -> None:
    """How often experts on disk were found in memory; nothing for a model that is in memory whole."""
    if hot is not None:
        read = f"{size(hot.bytes_read)} read in {hot.seconds_reading:.1f} s"
        note(f"(experts in memory: {size(hot.resident_bytes)}, {hot.hit_rate:.0%} of {hot.uses:,} uses; {read})")


def speak(stream: "Iterator[Delta]") -> "Completion":
    """Print a streamed reply as it comes, the thinking dimmed on stderr and the answer on stdout; returns it whole.

    KeyboardInterrupt cancels the request and passes on.
    """
    written: dict[IO[str], bool] = {sys.stderr: False, sys.stdout: False}
    with closing(stream), _lines_ended(written):  # type: ignore[type-var]
        for delta in stream:
            if delta.reasoning:
                _write(sys.stderr, _dimmed(delta.reasoning, sys.stderr), written)
            if delta.text:
                if written[sys.stderr] and not written[sys.stdout]:
                    print("\n", file=sys.stderr, flush=True)
                    written[sys.stderr] = False
                _write(sys.stdout, delta.text, written)
            if delta.completion is not None:
                return delta.completion
    raise AssertionError("a stream ended without its completion")


def converse(
    reply: "Callable[[list[Message], bool], Iterator[Delta]]", lines: Iterator[str], think: bool, context: int
) -> None:
    """Hold a conversation: each of `lines` is a turn or a /command; `reply(messages, think)` streams an answer."""
    messages: list[Message] = []
    for line in lines:
        text = line.strip()
        if text == "/exit":
            return
        if text == "/help":
            note(HELP)
        elif text == "/clear":
            messages.clear()
            note("The conversation is forgotten.")
        elif text == "/think":
            think = not think
            note(f"Thinking is {'on' if think else 'off'}.")
        elif text.startswith("/"):
            note(f"{text.split()[0]} is no command; /help lists them.")
        elif text:
            _turn(reply, messages, text, think, context)


def typed_lines() -> Iterator[str]:
    """The lines a person types (with line editing and history), or those of a pipe, to their end."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with suppress(ImportError):
        import readline  # noqa: F401  importing it gives input() history and editing; a Python built without it has none
    while True:
        try:
            yield input("› " if sys.stdout.isatty() else "")
        except KeyboardInterrupt:
            note("\nCtrl-D or /exit leaves.")
        except EOFError:
            print(file=sys.stderr)
            return


def _turn(
    reply: "Callable[[list[Message], bool], Iterator[Delta]]",
    messages: "list[Message]",
    text: str,
    think: bool,
    context: int,
) -> None:
    """One question and its answer, both kept in `messages` unless there was no answer."""
    messages.append({"role": "user", "content": text})
    said: list[str] = []
    try:
        completion = speak(_heard(reply(messages, think), said))
        if completion.finish_reason == "length":
            used = completion.prompt_tokens + len(completion.token_ids)
            full = f"the model's context of {context} tokens is full; /clear starts anew"
            note(f"The answer was cut off: {full if used >= context else '--max-tokens is reached'}.")
    except KeyboardInterrupt:
        note("Stopped.")
    except UserError as error:
        note(f"error: {error}")
    answer = "".join(said)
    if answer:
        messages.append({"role": "assistant", "content": answer})
    else:
        messages.pop()
        note("Without an answer the question is not kept; /clear starts a new conversation.")


def _heard(stream: "Iterator[Delta]", said: list[str]) -> "Iterator[Delta]":
    """Pass a stream on, keeping the answer's text even if it is interrupted."""
    with closing(stream):  # type: ignore[type-var]
        for delta in stream:
            said.append(delta.text)
            yield delta


@contextmanager
def _lines_ended(written: dict[IO[str], bool]) -> Iterator[None]:
    """Whatever happens, what was begun on a stream ends with a newline."""
    try:
        yield
    finally:
        for stream in written:
            if written[stream]:
                print(file=stream, flush=True)


def _write(stream: IO[str], text: str, written: dict[IO[str], bool]) -> None:
    stream.write(text.translate(_CONTROLS) if stream is sys.stdout and stream.isatty() else text)
    stream.flush()
    written[stream] = True


def _dimmed(text: str, stream: IO[str]) -> str:
    if not stream.isatty():
        return text
    text = text.translate(_CONTROLS)
    return text if os.environ.get("NO_COLOR") else f"{_DIM}{text}{_PLAIN}"
