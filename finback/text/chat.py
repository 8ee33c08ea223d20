"""Chats as token ids, in the format of the tokenizer's family (formats.py).

    <BOS>{system}<｜User｜>{question}<｜Assistant｜>{answer}<EOS><｜User｜>{question}<｜Assistant｜><think>\\n

Only the format's own marks become special ids. The text between two of them is encoded as one, as in the rendered
template: in this format each `{...}` by itself, so that no token spans a mark and no text becomes one; where a family
has plain text for its format (`User: `, newlines) together with that. (There, in V2 above all, a user can write what
looks like a turn; no format of plain text prevents it.) Several system messages are joined by an empty line and all
stand after BOS, as in V3.1.

Whitespace. With thinking, R1's prompt ends in `<think>` and one newline, and the reply is

    {reasoning}\\n</think>\\n\\n{answer}<EOS>

Without thinking, the prompt ends in `</think>` (V3.1) and the reply is `{answer}<EOS>`. Exactly these newlines belong
to the format; `ReasoningSplit` takes them away again. Of earlier assistant turns only the answer is kept: what a
client sends with its thinking loses everything through the last `</think>` and the format's newlines after it.
A model without think tokens (V3) has neither form: its prompt ends in `<｜Assistant｜>`.

Source: DeepSeek-R1 README and tokenizer_config.json (chat_template); DeepSeek-V3.1 for the form without thinking.
"""

from collections.abc import Sequence
from typing import Literal, NotRequired, TypedDict

from finback.errors import UserError
from finback.text.formats import MARK, ChatFormat, find_format
from finback.text.tokenizer import END_THINK, Tokenizer

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    """One turn. `reasoning` is the assistant's thinking; it is used in training and never shown to the model again."""

    role: Role
    content: str
    reasoning: NotRequired[str]


def prompt_ids(tokenizer: Tokenizer, messages: Sequence[Message], think: bool = True) -> list[int]:
    """The ids to continue: BOS, the turns, and the opening of the assistant's reply.

    Raises UserError when there is no message, the last is not the user's, a role is unknown, a content is not text, or
    the tokenizer's chat format is not known.
    """
    _check(messages, last="user")
    form = _format(tokenizer)
    turns: list[tuple[str, str]] = [(message["role"], message["content"]) for message in messages]
    if form.gathered:
        system = "\n\n".join(text for role, text in turns if role == "system")
        turns = [("system", system), *((role, text) for role, text in turns if role != "system")]
    elif form.default_system is not None and turns[0][0] != "system":
        turns.insert(0, ("system", form.default_system))
    ids = _Ids(tokenizer, [tokenizer.bos_id] if form.bos and tokenizer.bos_id is not None else [])
    for n, (role, text) in enumerate(turns):
        opening, closing = {"system": form.system, "user": form.user, "assistant": form.assistant}[role]
        if role == "assistant" and form.think is not None:
            text = _without_thinking(text, form.between[1])
        ids.form(opening + (form.preamble if n == 0 and role == "system" else ""))
        ids.text(text.strip() if form.trim else text)
        ids.form(closing)
    ids.form(form.think if think and form.think is not None else form.prompt)
    return ids.done()


def example_ids(tokenizer: Tokenizer, messages: Sequence[Message], think: bool = True) -> tuple[list[int], list[int]]:
    """A training example: the ids of the prompt, and those of the reply (the last message, the assistant's) with EOS.

    Raises UserError as `prompt_ids` does, and when there is thinking to train on but no token to mark it.
    """
    _check(messages, last="assistant")
    prompt = prompt_ids(tokenizer, messages[:-1], think)
    form = _format(tokenizer)
    reasoning, answer = messages[-1].get("reasoning", ""), messages[-1]["content"]
    if think and form.think is None:
        raise UserError("think=True: this model's tokenizer has no <think> and </think>; train with think=False")
    ids = _Ids(tokenizer, [])
    if think:
        ids.text(reasoning + form.between[0])
        ids.form(END_THINK)
    ids.text((form.between[1] if think else form.lead) + (answer.strip() if form.trim else answer))
    ids.form(form.assistant[1].rstrip("\n"))
    return prompt, ids.done()


class _Ids:
    """Ids in the making: marks of the format, and the text between them, which waits until it is complete."""

    def __init__(self, tokenizer: Tokenizer, ids: list[int]) -> None:
        self._tokenizer, self._ids, self._text = tokenizer, ids, ""

    def form(self, part: str) -> None:
        """Add a part of the format, in which marks are marks."""
        for n, piece in enumerate(MARK.split(part)):
            if n % 2:
                self._ids = [*self.done(), self._tokenizer.marks[piece]]
            else:
                self._text += piece

    def text(self, text: str) -> None:
        """Add what somebody wrote."""
        self._text += text

    def done(self) -> list[int]:
        """The ids of all that was added."""
        self._ids += self._tokenizer.encode(self._text)
        self._text = ""
        return self._ids


def _format(tokenizer: Tokenizer) -> ChatFormat:
    form = find_format(tokenizer.marks, tokenizer.chat_template)
    if form is None:
        raise UserError(
            "messages: this model's chat format is unknown: its tokenizer has neither <｜User｜> and <｜Assistant｜> "
            "nor the marks of DeepSeek-V2, Moonlight, Qwen2 or Llama 3; give the model plain text instead"
        )
    return form


def _without_thinking(content: str, newlines: str) -> str:
    """The answer alone, of an assistant's earlier turn; `newlines` are those the format puts before it."""
    _, mark, answer = content.rpartition(END_THINK)
    for newline in newlines if mark else "":
        answer = answer.removeprefix(newline)
    return answer


def _check(messages: Sequence[Message], last: Role) -> None:
    if not messages:
        raise UserError(f"messages: the list is empty; it needs at least one message of the {last}")
    for n, message in enumerate(messages):
        if message.get("role") not in ("system", "user", "assistant"):
            raise UserError(f"messages[{n}].role {message.get('role')!r}: use 'system', 'user' or 'assistant'")
        for field in ("content", "reasoning"):
            value = message.get(field, "" if field == "reasoning" else None)
            if not isinstance(value, str):
                raise UserError(f"messages[{n}].{field}: expected text, found {type(value).__name__}; send a string")
    if messages[-1]["role"] != last:
        raise UserError(f"messages[{len(messages) - 1}].role {messages[-1]['role']!r}: the last must be {last!r}'s")
