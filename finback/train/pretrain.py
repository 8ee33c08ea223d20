"""Pre-training: examples joined end to end and cut into rows; every token is learned, attention crosses examples.

V3 TR 4.1: documents are packed without a cross-sample mask. Neighbouring rows share their 1 + D last tokens, which the
first row only predicts, so that every token is predicted exactly once.
"""

from typing import Any

import torch

from finback.train.data import Batch, Examples, tensor


class PretrainStream:
    """Batches of `rows` rows of `sequence` tokens and `ahead` more to predict."""

    def __init__(self, examples: Examples, rows: int, sequence: int, ahead: int, state: dict[str, Any]) -> None:
        self._examples, self._rows, self._sequence, self._ahead = examples, rows, sequence, ahead
        self._first: int = state.get("first", 0)  # the example in which the next row begins
        self._offset: int = state.get("offset", 0)  # and how many of its tokens lie behind
        self._documents: dict[int, list[int]] = {}

    @property
    def state(self) -> dict[str, Any]:
        return {"first": self._first, "offset": self._offset}

    def batch(self) -> Batch:
        ids, owners = zip(*(self._row() for _ in range(self._rows)), strict=True)
        ids_BW = tensor(list(ids))
        return Batch(ids_BW, tensor(list(owners)), torch.ones_like(ids_BW, dtype=torch.bool), None, self._sequence)

    def _row(self) -> tuple[list[int], list[int]]:
        end = self._offset + self._sequence + self._ahead
        ids: list[int] = []
        owners: list[int] = []
        i = self._first
        while len(ids) < end:
            document = self._document(i)
            ids += document
            owners += [i] * len(document)
            i += 1
        row = ids[self._offset : end], owners[self._offset : end]
        self._offset += self._sequence
        while self._offset >= len(self._document(self._first)):
            self._offset -= len(self._documents.pop(self._first))
            self._first += 1
        return row

    def _document(self, i: int) -> list[int]:
        if i not in self._documents:
            prompt, reply = self._examples[i]
            self._documents[i] = prompt + reply
        return self._documents[i]
