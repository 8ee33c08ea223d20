"""Supervised fine-tuning: whole examples packed into rows, each seeing itself alone, learned on the reply only.

V3 TR 5.1: packing with sample masking. Positions restart at 0 with each example; the model reads the mask off them.
"""

from typing import Any

from finback.errors import UserError
from finback.train.data import NOBODY, Batch, Examples, tensor

WAITING = 64
"""How many examples a row may choose from: enough that little of it stays empty."""
PATIENCE = 1000
"""So many examples in a row too long for a row mean that none will ever fit."""


class SftStream:
    """Batches of `rows` rows. An example longer than a row is left out, and counted in the state as `dropped`.

    A row has room for sequence + 1 tokens: the last one is predicted and not read. Padding is a document per token.
    """

    def __init__(
        self, examples: Examples, rows: int, sequence: int, ahead: int, pad_id: int, state: dict[str, Any]
    ) -> None:
        self._examples, self._rows, self._sequence, self._ahead = examples, rows, sequence, ahead
        self._pad_id = pad_id
        self._next: int = state.get("next", 0)
        self._dropped: int = state.get("dropped", 0)
        self._waiting = {i: examples[i] for i in state.get("waiting", [])}

    @property
    def state(self) -> dict[str, Any]:
        return {"next": self._next, "dropped": self._dropped, "waiting": list(self._waiting)}

    def batch(self) -> Batch:
        columns = [tensor(list(column)) for column in zip(*(self._row() for _ in range(self._rows)), strict=True)]
        ids_BW, owners_BW, predicted_BW, positions_BW = columns
        return Batch(ids_BW, owners_BW, predicted_BW.bool(), positions_BW[:, : self._sequence], self._sequence)

    def _row(self) -> tuple[list[int], list[int], list[int], list[int]]:
        ids: list[int] = []
        owners: list[int] = []
        predicted: list[int] = []
        positions: list[int] = []
        for i in self._choose():
            prompt, reply = self._waiting.pop(i)
            length = len(prompt) + len(reply)
            ids += prompt + reply
            owners += [i] * length
            predicted += [0] * len(prompt) + [1] * len(reply)
            positions += range(length)
        empty = self._sequence + self._ahead - len(ids)
        padding = [0] * empty
        return ids + [self._pad_id] * empty, owners + [NOBODY] * empty, predicted + padding, positions + padding

    def _choose(self) -> list[int]:
        """First fit: the example that waited longest, then every other that finds room."""
        self._fill()
        room, chosen = self._sequence + 1, []
        for i, (prompt, reply) in self._waiting.items():
            if len(prompt) + len(reply) <= room:
                room -= len(prompt) + len(reply)
                chosen.append(i)
        return chosen

    def _fill(self) -> None:
        too_long = 0
        while len(self._waiting) < WAITING:
            prompt, reply = self._examples[self._next]
            if len(prompt) + len(reply) <= self._sequence + 1:
                self._waiting[self._next] = prompt, reply
                too_long = 0
            else:
                self._dropped += 1
                too_long += 1
            self._next += 1
            if too_long == PATIENCE:
                raise UserError(
                    f"stage sequence = {self._sequence}: {PATIENCE} examples one after another are longer; raise it"
                )
