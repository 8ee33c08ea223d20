"""What a terminal shows: streams apart, thinking dimmed, a conversation that survives Ctrl-C and a full context."""

import io
import sys

import pytest

from finback import terminal
from finback.engine import Completion, Delta
from finback.errors import UserError

CONTEXT = 100


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def screen(monkeypatch):
    """Call it to make standard output and error terminals; it returns both."""

    def switch() -> tuple[Screen, Screen]:
        monkeypatch.delenv("NO_COLOR", raising=False)
        out, err = Screen(), Screen()
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        return out, err

    return switch


def completion(text: str = "", reason: str = "stop", prompt_tokens: int = 10) -> Completion:
    return Completion(0, text, "", [1, 2, 3], [0.0] * 3, reason, prompt_tokens)


def stream(*pieces: tuple[str, str], reason: str = "stop", prompt_tokens: int = 10):
    for reasoning, text in pieces:
        yield Delta(reasoning, text)
    yield Delta("", "", completion("".join(text for _, text in pieces), reason, prompt_tokens))


def test_in_a_pipe_each_stream_gets_its_own_text_and_nothing_else(capsys):
    terminal.speak(stream(("One ", ""), ("two.", ""), ("", "An"), ("", "swer\x1b.")))
    captured = capsys.readouterr()
    assert captured.out == "Answer\x1b.\n"
    assert captured.err == "One two.\n\n"


def test_on_a_terminal_the_thinking_is_dimmed_and_the_answer_is_not(screen):
    out, err = screen()
    terminal.speak(stream(("Hm.", ""), ("", "Yes.")))
    assert err.getvalue() == "\x1b[2mHm.\x1b[0m\n\n"
    assert out.getvalue() == "Yes.\n"


def test_no_color_is_respected(screen, monkeypatch):
    _, err = screen()
    monkeypatch.setenv("NO_COLOR", "1")
    terminal.speak(stream(("Hm.", ""), ("", "Yes.")))
    assert err.getvalue() == "Hm.\n\n"


def test_a_model_cannot_send_commands_to_the_terminal(screen):
    """ESC, BEL, CR, and the one-byte CSI: a title or a cleared screen must not come out of a model."""
    out, err = screen()
    attack = "a\x1b]0;owned\x07b\x1b[2J\x9b31mc\rd\te\n"
    terminal.speak(stream((attack, ""), ("", attack)))
    assert out.getvalue() == "a]0;ownedb[2J31mcd\te\n\n"
    assert err.getvalue().removeprefix("\x1b[2m").split("\x1b[0m")[0] == "a]0;ownedb[2J31mcd\te\n"


def test_an_interrupt_ends_the_line_and_closes_the_stream(capsys):
    closed = []

    def interrupted():
        try:
            yield Delta("", "half an ans")
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    with pytest.raises(KeyboardInterrupt):
        terminal.speak(interrupted())
    assert capsys.readouterr().out == "half an ans\n"
    assert closed


def talk(lines: list[str], replies: list, think: bool = True) -> list[tuple[list, bool]]:
    """Hold a conversation; returns what the model was asked each time. A reply is a stream or an exception."""
    asked = []

    def reply(messages, thinking):
        asked.append(([dict(message) for message in messages], thinking))
        if isinstance(replies[len(asked) - 1], UserError):
            raise replies[len(asked) - 1]
        return replies[len(asked) - 1]

    terminal.converse(reply, iter(lines), think, CONTEXT)
    return asked


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def test_a_conversation_remembers_answers_and_not_thinking():
    asked = talk(["one\n", "  \n", "two"], [stream(("thought", ""), ("", "1")), stream(("", "2"))])
    assert asked == [([user("one")], True), ([user("one"), assistant("1"), user("two")], True)]


def test_the_commands_of_a_conversation(capsys):
    lines = ["/help", "/think", "one", "/clear", "/think", "two", "/what is this", "/exit", "three"]
    asked = talk(lines, [stream(("", "1")), stream(("", "2"))])
    assert asked == [([user("one")], False), ([user("two")], True)]
    captured = capsys.readouterr()
    assert captured.out == "1\n2\n"
    for words in ("/clear", "Thinking is off.", "Thinking is on.", "forgotten", "/what is no command"):
        assert words in captured.err


def test_ctrl_c_stops_the_answer_and_not_the_program(capsys):
    def interrupted():
        yield Delta("", "half")
        raise KeyboardInterrupt

    asked = talk(["one", "two"], [interrupted(), stream(("", "2"))])
    assert asked[1][0] == [user("one"), assistant("half"), user("two")]
    assert "Stopped." in capsys.readouterr().err


def test_a_full_context_is_said_and_the_conversation_stays_whole(capsys):
    full = UserError("the prompt has 120 tokens and max_tokens is 1, together more than the model's context of 100")
    asked = talk(["one", "long", "/clear", "two"], [stream(("", "1")), full, stream(("", "2"))])
    captured = capsys.readouterr()
    assert "120 tokens" in captured.err and "/clear" in captured.err
    assert "question is not kept" in captured.err
    assert asked[2][0] == [user("two")]


def test_an_answer_that_is_cut_off_says_why(capsys):
    talk(["one"], [stream(("", "1"), reason="length", prompt_tokens=CONTEXT - 3)])
    assert f"context of {CONTEXT} tokens is full; /clear" in capsys.readouterr().err
    talk(["one"], [stream(("", "1"), reason="length", prompt_tokens=5)])
    assert "--max-tokens is reached" in capsys.readouterr().err


def test_a_turn_without_an_answer_is_not_kept():
    asked = talk(["one", "two"], [stream(("only thoughts", ""), reason="length"), stream(("", "2"))])
    assert asked[1][0] == [user("two")]


def test_typed_lines_go_on_after_ctrl_c_and_end_at_ctrl_d(screen, monkeypatch):
    keys = iter(["one", KeyboardInterrupt(), "two", EOFError()])

    def press(prompt):
        key = next(keys)
        if isinstance(key, BaseException):
            raise key
        return key

    monkeypatch.setattr(sys, "stdin", Screen())
    monkeypatch.setattr("builtins.input", press)
    _, err = screen()
    assert list(terminal.typed_lines()) == ["one", "two"]
    assert "Ctrl-D" in err.getvalue()


def test_a_table_is_tabs_in_a_pipe_and_columns_on_a_terminal(capsys, monkeypatch):
    terminal.table(("a", "b"), [(1, "x\ny"), (2, "[z]")])
    assert capsys.readouterr().out == "a\tb\n1\tx y\n2\t[z]\n"
    out = Screen()
    monkeypatch.setattr(sys, "stdout", out)
    terminal.table(("a", "b"), [(1, "x"), (2, "[z]")])
    assert "\t" not in out.getvalue() and "[z]" in out.getvalue()
