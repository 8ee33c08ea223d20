"""Training examples, made as they are needed: example i of a stage follows from (seed, stage, i) alone."""

import random
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from finback.kernels.reference import IGNORED
from finback.tasks import TASKS, Problem, draw, is_held_out
from finback.text import Message, Tokenizer, example_ids
from finback.train.recipe import Stage

NOBODY = -1
"""The owner of a padding token."""


@dataclass(frozen=True)
class Batch:
    """Rows of W = T + 1 + D tokens, D the depth of MTP: T are read, the rest are only predicted.

    `owners_BW` says which example a token belongs to, `predicted_BW` whether it is learned. `positions_BT` restart at 0
    with each example where examples must not see each other; None where they may.
    """

    ids_BW: Tensor
    owners_BW: Tensor
    predicted_BW: Tensor
    positions_BT: Tensor | None
    sequence: int

    def targets(self, offset: int) -> Tensor:
        """[B, T]: the token `offset` places on, IGNORED where it is not learned or belongs to another example."""
        ahead = slice(offset, offset + self.sequence)
        learned = self.predicted_BW[:, ahead]
        if self.positions_BT is not None:
            learned = learned & (self.owners_BW[:, ahead] == self.owners_BW[:, : self.sequence])
        return self.ids_BW[:, ahead].masked_fill(~learned, IGNORED)

    def parts(self, n: int) -> list["Batch"]:
        """The batch in `n` equal runs of rows."""
        positions = [None] * n if self.positions_BT is None else self.positions_BT.chunk(n)
        columns = zip(self.ids_BW.chunk(n), self.owners_BW.chunk(n), self.predicted_BW.chunk(n), positions, strict=True)
        return [Batch(*parts, sequence=self.sequence) for parts in columns]

    def tokens(self) -> int:
        """How many tokens are read, padding not counted."""
        return int((self.owners_BW[:, : self.sequence] != NOBODY).sum())

    def examples(self) -> list[int]:
        """The indices of the examples in it."""
        return [i for i in self.owners_BW.unique().tolist() if i != NOBODY]


class Stream(Protocol):
    """An endless source of batches. Its `state` is all there is to continue it elsewhere."""

    def batch(self) -> Batch:
        """The next batch."""

    @property
    def state(self) -> dict[str, Any]:
        """Plain JSON."""


class Conversations:
    """The conversations of one stage, by index."""

    def __init__(self, stage: Stage, seed: int) -> None:
        self._stage, self._seed = stage, seed
        self._names = [name for name, weight in stage.tasks.items() if weight > 0]
        self._weights = [stage.tasks[name] for name in self._names]

    def __getitem__(self, i: int) -> tuple[list[Message], bool]:
        """The messages of conversation i, and whether its last reply thinks; earlier thinking is gone."""
        rng = random.Random(f"{self._seed}/{self._stage.name}/{i}")
        think = rng.random() >= self._stage.no_think
        turns = rng.choice((2, 3)) if rng.random() < self._stage.multi_turn else 1
        problems = [self._problem(rng) for _ in range(turns)]
        messages: list[Message] = []
        for problem in problems:
            messages.append({"role": "user", "content": problem.question})
            messages.append({"role": "assistant", "content": problem.answer})
        if think:
            messages[-1]["reasoning"] = problems[-1].reasoning
        return messages, think

    def _problem(self, rng: random.Random) -> Problem:
        [name] = rng.choices(self._names, self._weights)
        usual = TASKS[name].default
        easier = usual > 1 and rng.random() < self._stage.easier
        problem = draw(name, rng, "train", rng.randrange(1, usual) if easier else usual)
        assert not is_held_out(problem), f"a held-out problem of {name} in the training stream"
        return problem


class Examples:
    """The conversations of one stage as token ids, by index."""

    def __init__(self, conversations: Conversations, tokenizer: Tokenizer) -> None:
        self._conversations, self._tokenizer = conversations, tokenizer

    def __getitem__(self, i: int) -> tuple[list[int], list[int]]:
        """The ids of the prompt and of the reply, EOS included."""
        messages, think = self._conversations[i]
        return example_ids(self._tokenizer, messages, think)


def text_of(messages: list[Message]) -> str:
    """A conversation as the plain text a tokenizer is trained on."""
    return "\n".join(part for message in messages for part in (message.get("reasoning", ""), message["content"]))


def tensor(rows: list[list[int]]) -> Tensor:
    """Rows of equal length as one int64 matrix."""
    return torch.tensor(rows, dtype=torch.int64)
