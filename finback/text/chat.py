"""The chat format of DeepSeek-R1, built as token ids.

    <BOS>{system}<｜User｜>{question}<｜Assistant｜>{answer}<EOS><｜User｜>{question}<｜Assistant｜><think>\\n

Between the parts there is nothing: no newline, no space. Each `{...}` is encoded by itself, so that no token spans a
mark and no text becomes one. Several system messages are joined by an empty line and all stand after BOS, as in V3.1.

Whitespace. With thinking, the prompt ends in `<think>` and one newline, and the reply is

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
from finback.text.tokenizer import END_THINK, Tokenizer

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    """One turn. `reasoning` is the assistant's thinking; it is used in training and never shown to the model again."""

    role: Role
    content: str
    reasoning: NotRequired[str]


def prompt_ids(tokenizer: Tokenizer, messages: Sequence[Message], think: bool = True) -> list[int]:
    """The ids to continue: BOS, the turns, and the opening of the assistant's reply.

    Raises UserError when there is no message, the last is not the user's, a role is unknown or a content not text.
    """
    _check(messages, last="user")
    user, assistant = tokenizer.user_id, tokenizer.assistant_id
    if user is None or assistant is None:
        raise UserError(
            "messages: the tokenizer has no <｜User｜> and <｜Assistant｜>; give the model plain text instead"
        )
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    ids = [tokenizer.bos_id, *tokenizer.encode(system)]
    for message in messages:
        if message["role"] == "user":
            ids += [user, *tokenizer.encode(message["content"])]
        elif message["role"] == "assistant":
            ids += [assistant, *tokenizer.encode(_without_thinking(message["content"])), tokenizer.eos_id]
    return [*ids, assistant, *_opening(tokenizer, think)]


def example_ids(tokenizer: Tokenizer, messages: Sequence[Message], think: bool = True) -> tuple[list[int], list[int]]:
    """A training example: the ids of the prompt, and those of the reply (the last message, the assistant's) with EOS.

    Raises UserError as `prompt_ids` does, and when there is thinking to train on but no token to mark it.
    """
    _check(messages, last="assistant")
    prompt = prompt_ids(tokenizer, messages[:-1], think)
    reasoning, answer = messages[-1].get("reasoning", ""), messages[-1]["content"]
    if not think:
        return prompt, [*tokenizer.encode(answer), tokenizer.eos_id]
    if tokenizer.end_think_id is None:
        raise UserError("think=True: this model's tokenizer has no <think> and </think>; train with think=False")
    thought, text = tokenizer.encode_batch([f"{reasoning}\n", f"\n\n{answer}"])
    return prompt, [*thought, tokenizer.end_think_id, *text, tokenizer.eos_id]


def _opening(tokenizer: Tokenizer, think: bool) -> list[int]:
    """What follows `<｜Assistant｜>` in a prompt."""
    if tokenizer.think_id is None or tokenizer.end_think_id is None:
        return []
    return [tokenizer.think_id, *tokenizer.encode("\n")] if think else [tokenizer.end_think_id]


def _without_thinking(content: str) -> str:
    """The answer alone, of an assistant's earlier turn."""
    _, mark, answer = content.rpartition(END_THINK)
    return answer.removeprefix("\n").removeprefix("\n") if mark else content


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
