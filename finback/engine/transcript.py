"""The text of a completion while its tokens arrive: thinking, answer, stop strings."""

from collections.abc import Sequence

from finback.text import ReasoningSplit, Tokenizer


class Transcript:
    """The text of a completion as its tokens arrive: thinking and answer, the answer ended by a stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        self._split = ReasoningSplit(tokenizer, prompt_ids)
        self._stop = stop
        self._held = ""  # the end of the answer that may be the start of a stop string
        self.reasoning: list[str] = []
        self.text: list[str] = []
        self.thought = 0  # tokens of thinking, marks included

    @property
    def thinking(self) -> bool:
        """Whether the next token belongs to the thinking."""
        return self._split.thinking

    def push(self, token: int) -> bool:
        """Add a token; True when the answer has reached a stop string, which is not part of it."""
        self.thought += self._split.thinking
        return self._add(*self._split.push(token))

    def close(self) -> None:
        """No token comes any more: what was held back is text."""
        if not self._add(*self._split.flush()):
            self.text.append(self._held)

    def _add(self, reasoning: str, answer: str) -> bool:
        self.reasoning.append(reasoning)
        answer = self._held + answer
        found = [at for at in map(answer.find, self._stop) if at >= 0]
        keep = min(found) if found else len(answer) - self._open(answer)
        self.text.append(answer[:keep])
        self._held = answer[keep:]
        return bool(found)

    def _open(self, answer: str) -> int:
        """The length of the longest end of `answer` that begins a stop string."""
        longest = min(len(answer), max(map(len, self._stop), default=1) - 1)
        sizes = range(longest, 0, -1)
        return next((n for n in sizes if any(s.startswith(answer[-n:]) for s in self._stop)), 0)
