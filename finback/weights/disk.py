"""Routed experts that stay on disk: the hot ones in memory, bounded in bytes, the least recently used leaving first.

Reading is `preadv` into the buffers of the expert that leaves: a file cut off is an error, where a mapped one would end
the process; pages of files stay the system's to drop; and memory is not given back only to be touched for the first
time again, which can cost more than the reading (`results/experts`).
"""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from finback.errors import UserError
from finback.model.linear import Experts
from finback.model.weight import DenseWeight, Index, PackedWeight, Weight
from finback.weights import layout, store

Entry = dict[str, Weight]
"""One expert of one layer, in the form a resident model holds: "gate_up" [1, 2F, D] and "down" [1, D, F]."""


class DiskWeight(Weight):
    """The stack of a layer's routed experts on disk, read-only; `hot`, which all layers share, holds a part of it."""

    def __init__(self, layer: str, stack: str, like: Weight, hot: "HotExperts") -> None:
        super().__init__()
        self.shape, self.parts, self.form, self.dtype = like.shape, like.parts, like.form, hot.dtype
        self.layer, self.stack, self.hot = layer, stack, hot

    def linear(self, x: Tensor, expert: int | None = None) -> Tensor:
        """As of any stack. Raises UserError where gradients are asked for, or where reading fails."""
        assert expert is not None, "a stack is multiplied an expert at a time"
        if x.requires_grad and torch.is_grad_enabled():
            raise UserError("experts on disk cannot be trained, nor gradients pass them: load without expert_memory")
        with self.hot.entry(self.layer, expert, counted=self.stack == "gate_up") as entry:
            return entry[self.stack].linear(x, 0)

    def dense(self) -> Tensor:
        """The whole stack, read anew."""
        return torch.cat([self.hot.read(self.layer, e, self.stack).dense() for e in range(self.shape[0])])

    def piece(self, index: Index) -> dict[str, Tensor]:
        """As of any stack, read anew."""
        return self.hot.read(self.layer, index[0], self.stack, index[1]).piece((0, index[1]))

    def fill(self, index: Index, start: int, values_RC: Tensor) -> None:
        raise UserError("experts on disk cannot be written: load without expert_memory")


class HotExperts:
    """The routed experts of all layers that are in memory: at most `budget` bytes of them.

    An expert comes and goes whole, its three matrices together. `hits` and `misses` count uses of an expert by a layer
    in one forward pass, however many tokens chose it; `bytes_read` are counted as held, `seconds_reading` by the clock.
    """

    def __init__(self, model: nn.Module, budget: int, dtype: torch.dtype, device: torch.device) -> None:
        """Give `model`, still on the meta device, weights on disk for its routed experts.

        Raises UserError for a model without routed experts, and for a budget below one expert.
        """
        self.budget, self.dtype, self.device = budget, dtype, device
        self.source: store.Source | None = None
        self.templates: dict[str, Entry] = {}
        for path, module in model.named_modules():
            if isinstance(module, Experts):
                self.templates[path] = {"gate_up": module.gate_up, "down": module.down}
        for path, stacks in self.templates.items():
            for name, weight in stacks.items():
                setattr(model.get_submodule(path), name, DiskWeight(path, name, weight, self))
        if not self.templates:
            raise UserError("this model has no routed experts to leave on disk: load it without expert_memory")
        meta = torch.device("meta")
        self._sizes = {
            path: sum(_bytes(_one(weight, dtype, meta)) for weight in stacks.values())
            for path, stacks in self.templates.items()
        }
        if budget < (needed := max(self._sizes.values())):
            at_least = f"--expert-memory {-(-needed // 2**20)}MiB"
            raise UserError(f"expert_memory={budget}: one expert takes {needed:,} bytes; give at least {at_least}")
        self._entries: OrderedDict[tuple[str, int], Entry] = OrderedDict()
        self._lock = threading.RLock()  # held until a product is done: the next reading may go into the same buffers
        self.hits = self.misses = self.bytes_read = self.resident_bytes = 0
        self.seconds_reading = 0.0

    @property
    def hit_rate(self) -> float:
        """Of the uses so far, those that found their expert in memory; 0 before the first."""
        return self.hits / max(self.uses, 1)

    @property
    def uses(self) -> int:
        """Hits and misses."""
        return self.hits + self.misses

    def stats(self) -> dict[str, int | float]:
        """All counters, for reports."""
        names = ("budget", "resident_bytes", "hits", "misses", "hit_rate", "bytes_read", "seconds_reading")
        return {name: getattr(self, name) for name in names}

    def connect(self, source: store.Source) -> None:
        """Read from `source` from now on."""
        self.source, self._names = source, source.names()
        self._root = source.where if source.where.is_dir() else source.where.parent
        names = (p.name for path in self.templates for p in self._places(path, 0, self.templates[path]))
        self._stamps = {file: _stamp(self._root / file) for file in {source.position(name)[0] for name in names}}

    @contextmanager
    def entry(self, layer: str, expert: int, *, counted: bool = True) -> Iterator[Entry]:
        """One expert, read if it is not in memory; after the block its buffers may become another's."""
        with self._lock:
            entry = self._entries.get((layer, expert))
            if counted:
                self.hits += entry is not None
                self.misses += entry is None
            if entry is None:
                entry = self._fetch(layer, expert)
            self._entries[layer, expert] = entry
            self._entries.move_to_end((layer, expert))
            yield entry

    def read(self, layer: str, expert: int, stack: str, part: int | None = None) -> Weight:
        """One of an expert's stacks, or one part of it, in memory of its own, past the hot ones and uncounted."""
        one = _one(self.templates[layer][stack], self.dtype, self.device)
        self._fill([place for place in self._places(layer, expert, {stack: one}) if part in (None, place.index[1])])
        return one

    def _fetch(self, layer: str, expert: int) -> Entry:
        """Make room and read. Fresh pages cost more than the reading: who leaves gives its buffers to who comes."""
        spare: Entry | None = None
        while self.resident_bytes + self._sizes[layer] > self.budget:
            (old_layer, _), spare = self._entries.popitem(last=False)
            self.resident_bytes -= self._sizes[old_layer]
        like = self.templates[layer]
        if spare is None or any(spare[name].form is not like[name].form for name in like):
            del spare
            spare = {name: _one(weight, self.dtype, self.device) for name, weight in like.items()}
        start = time.perf_counter()
        self._fill(self._places(layer, expert, spare))
        self.seconds_reading += time.perf_counter() - start
        self.bytes_read += self._sizes[layer]
        self.resident_bytes += self._sizes[layer]
        return spare

    def _places(self, layer: str, expert: int, stacks: Entry) -> list[layout.Place]:
        return [p for name, one in stacks.items() for p in layout.matrices(f"{layer}.{name}", one, expert)]

    @torch.no_grad()
    def _fill(self, places: list[layout.Place]) -> None:
        source = self.source
        assert source is not None, "connected once the model is loaded"
        files = {source.position(place.name)[0] for place in places}
        try:
            # Not by threads: those that run torch's operators make OpenMP's own wait longer, 1.4x a token's time.
            source.ahead([place.name for place in places])
            for place in places:
                place.read(source, self._names)
        except (OSError, ValueError) as error:  # a file gone, or cut off within a tensor
            raise UserError(f"{source.where}: experts can no longer be read ({error}); load the model again") from None
        for file in files:
            if _stamp(self._root / file) != self._stamps[file]:
                raise UserError(f"{self._root / file}: has changed since the model was loaded; load it again")


@torch.inference_mode(False)  # what is made in inference mode cannot be written outside of it
def _one(like: Weight, dtype: torch.dtype, device: torch.device) -> Weight:
    """A stack of one expert in the form of `like`, uninitialised."""
    with torch.device("meta"):
        one: Weight = DenseWeight(1, *like.shape[1:], parts=like.parts).to(dtype)
        if like.form is not None:
            one = PackedWeight(like.form, one, dtype)
    return one.to_empty(device=device).requires_grad_(False)


def _bytes(weight: Weight) -> int:
    return sum(tensor.nbytes for tensor in weight.state_dict().values())


def _stamp(file: Path) -> tuple[int, int, int]:
    """What tells a changed file."""
    try:
        found = os.stat(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error}); load the model again") from None
    return found.st_size, found.st_mtime_ns, found.st_ino
