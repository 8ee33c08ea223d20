"""The cache: per token and layer [normed latent | roped shared key], or [keys | values] of plain attention.

Source: DeepSeek-V2 technical report, 2.1. Contiguous: one row a sequence, the slot in a row is the token's position.
"""

import torch
from torch import Tensor

from finback.model.config import Config


class LatentCache:
    """Entries of many sequences, [layer, row B, slot S, C] with C = config.cache_width.

    Exactly C x num_hidden_layers numbers a token. Rows (at most `max_rows`) and slots (at most the context) grow by
    doubling as they are needed.
    """

    def __init__(
        self, config: Config, max_rows: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        self.max_rows = max_rows
        self.layers = config.num_hidden_layers
        self.width = config.cache_width
        self.context = config.max_position_embeddings
        self.storage = torch.zeros(self.layers, 0, 0, self.width, dtype=dtype, device=device)

    @property
    def bytes_per_token(self) -> int:
        return self.layers * self.width * self.storage.element_size()

    def reserve(self, rows: int, slots: int) -> None:
        """Make room for `rows` rows of `slots` slots; what is written stays."""
        assert rows <= self.max_rows and slots <= self.context, f"{rows} x {slots} of {self.max_rows} x {self.context}"
        _, have_rows, have_slots, _ = self.storage.shape
        if rows <= have_rows and slots <= have_slots:
            return
        rows = have_rows if rows <= have_rows else min(self.max_rows, max(rows, 2 * have_rows))
        slots = have_slots if slots <= have_slots else min(self.context, max(slots, 2 * have_slots, 64))
        # Zeros, not empty: a masked slot still meets a weight of 0, and 0 x NaN is NaN.
        storage = self.storage.new_zeros(self.layers, rows, slots, self.width)
        storage[:, :have_rows, :have_slots] = self.storage
        self.storage = storage

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` slots of row `source` over row `target`."""
        self.storage[:, target, :length] = self.storage[:, source, :length]

    def window(self, first: int, positions_BT: Tensor, slots: int) -> "Window":
        """What one forward pass over rows first .. first + B - 1 writes at `positions_BT` and reads, `slots` wide."""
        self.reserve(first + positions_BT.shape[0], slots)
        return Window(self.storage[:, first : first + positions_BT.shape[0], :slots], positions_BT)


class Window:
    """The `Cache` that attention sees: neighbouring rows, with the positions of this pass."""

    def __init__(self, storage_LBSC: Tensor, positions_BT: Tensor) -> None:
        self._storage = storage_LBSC
        self._positions = positions_BT
        self._rows = torch.arange(positions_BT.shape[0], device=positions_BT.device)[:, None]

    def write(self, layer: int, entry_BTC: Tensor) -> None:
        """Store the entries of this pass's tokens of `layer` in their slots."""
        self._storage[layer][self._rows, self._positions] = entry_BTC.to(self._storage.dtype)

    def read(self, layer: int) -> Tensor:
        """All slots of these rows [B, S, C]; the reader masks those after a token's own position."""
        return self._storage[layer]
