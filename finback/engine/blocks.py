"""Which blocks of the cache are free, used by whom, and remembered for prompts that begin alike. No tensors here."""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

BLOCK = 16
"""Tokens in a block."""


def root_key(tenant: str) -> bytes:
    """Where a tenant's keys begin: nobody can find out by timing what another one asked."""
    return hashlib.sha256(tenant.encode()).digest()


def child_key(key: bytes, ids: Sequence[int]) -> bytes:
    """The key of a full block: SHA-256 of the one before it and of its ids; it stands for all tokens up to its end."""
    return hashlib.sha256(key + array("q", ids).tobytes()).digest()


class BlockPool:
    """Reference-counted blocks 1 .. count; block 0 is never given out (padding reads it).

    A block is free, or used by `references(block)` sequences, or kept: used by nobody, but published under a key
    until its room is needed. Kept ones go in the order in which they were last used.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count, 0, -1))  # low ones first: memory that was never touched stays untouched
        self._references = [0] * (count + 1)
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._by_key: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Blocks that `take` can still give."""
        return len(self._free) + len(self._kept)

    @property
    def used(self) -> int:
        """Blocks that sequences hold."""
        return self.count - self.available

    @property
    def kept(self) -> int:
        """Blocks that only wait to be found again."""
        return len(self._kept)

    def references(self, block: int) -> int:
        return self._references[block]

    def take(self) -> int | None:
        """A block for one sequence: a free one, else the kept one unused for longest; None if all are used."""
        if self._free:
            block = self._free.pop()
        elif self._kept:
            block, _ = self._kept.popitem(last=False)
            self._withdraw(block)
        else:
            return None
        self._references[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more sequence uses a block."""
        self._kept.pop(block, None)
        self._references[block] += 1

    def release(self, block: int) -> None:
        """One sequence less uses a block; a published one that nobody uses any more is kept."""
        assert self._references[block] > 0, f"block {block} is released once too often"
        self._references[block] -= 1
        if self._references[block] == 0:
            if block in self._keys:
                self._kept[block] = None
            else:
                self._free.append(block)

    def publish(self, block: int, key: bytes) -> bool:
        """Let others find a full block under its key; False where an equal one is published already."""
        assert self._references[block] > 0, f"block {block} is published and nobody's"
        if key in self._by_key or block in self._keys:
            return False
        self._by_key[key], self._keys[block] = block, key
        return True

    def find(self, key: bytes) -> int | None:
        """The block published under a key."""
        return self._by_key.get(key)

    def published(self, block: int) -> bool:
        """Whether others may find this block, so that it must not change."""
        return block in self._keys

    def withdraw(self, block: int) -> None:
        """A block is not found any more; its users keep it."""
        if block in self._keys:
            self._withdraw(block)

    def forget(self) -> None:
        """No published block is found again: what is kept becomes free, what is used stays with its users."""
        for block in [*self._keys]:
            self._withdraw(block)
        self._free += self._kept
        self._kept.clear()

    def _withdraw(self, block: int) -> None:
        del self._by_key[self._keys.pop(block)]
