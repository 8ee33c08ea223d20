"""The streaming split of a reply into its thinking and its answer."""

from collections.abc import Sequence

from finback.text.tokenizer import Tokenizer

Delta = tuple[str, str]


class ReasoningSplit:
    """Takes the ids of a reply one by one and gives (thinking, answer) pieces.

    Where the reply starts is read off the prompt, never guessed from text: inside thinking if the last think mark
    after the prompt's last `<｜Assistant｜>` is `<think>`. From there only the marks' ids count; text that spells a
    mark stays text. Of the whitespace exactly the format's newlines are taken away (chat.py): one after `<think>`,
    one before `</think>`, two after it, where they are there. Thinking that is cut off keeps its last newline.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._marks = {i for i in (tokenizer.think_id, tokenizer.end_think_id) if i is not None}
        self._think_id = tokenizer.think_id
        self._stream = tokenizer.stream()
        self.thinking = False
        self._skip = 0  # newlines that may still be taken away at the start of the current part
        self._held = ""  # a newline of the thinking that is the format's if `</think>` is next
        for position in range(len(prompt_ids) - 1, -1, -1):
            if prompt_ids[position] in self._marks:
                self.thinking = prompt_ids[position] == self._think_id
                self._skip = int(self.thinking and position == len(prompt_ids) - 1)
                break
            if prompt_ids[position] == tokenizer.assistant_id:
                break

    def push(self, token_id: int) -> Delta:
        """The pieces of text that became certain with this token; either may be empty."""
        if token_id not in self._marks:
            return self._delta(self._clean(self._stream.push(token_id)))
        opens = token_id == self._think_id
        if opens == self.thinking:
            return "", ""
        rest = self._clean(self._stream.flush())
        delta = self._delta(rest)
        self.thinking, self._held = opens, ""
        self._skip = 1 if opens else 2
        return delta

    def flush(self) -> Delta:
        """The last pieces, at the end of the reply."""
        rest = self._clean(self._stream.flush()) + self._held
        self._held = ""
        return self._delta(rest)

    def _delta(self, text: str) -> Delta:
        return (text, "") if self.thinking else ("", text)

    def _clean(self, text: str) -> str:
        """`text` without the format's newlines, a last newline of the thinking held back."""
        while self._skip and text:
            self._skip = self._skip - 1 if text[0] == "\n" else 0
            text = text.removeprefix("\n") if text[0] == "\n" else text
        if self.thinking and text:
            text = self._held + text
            self._held = "\n" if text.endswith("\n") else ""
            text = text.removesuffix("\n")
        return text
