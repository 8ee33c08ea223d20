"""The cache: per token and layer [normed latent | roped shared key], or [keys | values] of plain attention, in blocks.

Source: DeepSeek-V2 technical report, 2.1. A sequence's tokens lie in blocks of 16 anywhere in one pool (blocks.py says
whose they are); its table of blocks says where. A block holds all layers of its tokens.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from finback.engine.blocks import BLOCK
from finback.kernels.cache_format import CacheFormat, cache_format
from finback.model import Config
from finback.model.attention import Pages, Part

_FEW = 32  # new tokens a row: more are cheaper together, with keys and values in panels


class PagedCache:
    """`blocks` blocks of entries of `layers` layers, in a format of kernels/cache_format.py (None: as computed).

    In the model's own dtype an entry takes exactly C = config.cache_width numbers in each layer. Memory is only
    touched when it is first written.
    """

    def __init__(
        self,
        config: Config,
        layers: int,
        blocks: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        form: str | None = None,
    ) -> None:
        self.layers, self.blocks, self.dtype = layers, blocks, dtype
        self.few = _FEW if config.kv_lora_rank is None else config.absorbed_below
        self.format = _format(config, form)
        width = config.cache_width if self.format is None else self.format.width_bytes
        kind = dtype if self.format is None else torch.uint8
        shape = (layers, blocks + 1, BLOCK * width)
        on_cpu = torch.device(device).type == "cpu"
        self.storage = _untouched(shape, kind) if on_cpu else torch.zeros(shape, dtype=kind, device=device)
        self._blocks = list(self.storage)
        self._slots = [layer.view(-1, width) for layer in self._blocks]

    @property
    def bytes_per_token(self) -> int:
        return self.block_bytes // BLOCK

    @property
    def block_bytes(self) -> int:
        return self.layers * self.storage.shape[-1] * self.storage.element_size()

    def write(self, layer: int, slots_N: Tensor, entry_NC: Tensor) -> None:
        """Store entries in slots (block x 16 + place in the block)."""
        packed = entry_NC.to(self.dtype) if self.format is None else self.format.pack(entry_NC)
        self._slots[layer].index_copy_(0, slots_N, packed)

    def read(self, layer: int, tables_BM: Tensor) -> Tensor:
        """The entries of rows of M blocks each, [B, 16 M, C]."""
        rows, blocks = tables_BM.shape
        held = self._blocks[layer].index_select(0, tables_BM.view(-1)).view(rows, blocks * BLOCK, -1)
        return held if self.format is None else self.format.unpack(held, self.dtype)

    def entries(self, layer: int) -> Tensor:
        """All slots of a layer, a view."""
        return self._slots[layer]

    def copy(self, source: int, target: int) -> None:
        """Make block `target` equal to block `source`."""
        self.storage[:, target] = self.storage[:, source]

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero blocks: what is not finite would reach their next user, as 0 x NaN of a masked slot."""
        self.storage[:, list(blocks)] = 0

    def payload(self, block: int) -> Tensor:
        """A block's bytes, copied: uint8 [block_bytes]."""
        return self.storage[:, block].contiguous().flatten().view(torch.uint8).cpu()

    def load(self, block: int, payload: Tensor) -> None:
        """Fill a block with the bytes of `payload`."""
        self.storage[:, block] = payload.view(self.storage.dtype).view(self.layers, -1).to(self.storage.device)


class View:
    """The `Cache` that attention sees in one pass: where its tokens go, and what each part reads."""

    def __init__(
        self,
        cache: PagedCache,
        slots_N: Tensor,
        positions_1N: Tensor,
        parts: Sequence[Part],
        tables: Sequence[Tensor],
    ) -> None:
        self.parts = parts
        self._cache, self._slots_N, self._positions_1N = cache, slots_N, positions_1N
        self._tables = {id(part): table_BM for part, table_BM in zip(parts, tables, strict=True)}
        self._where: tuple[Tensor, ...] | None = None

    def write(self, layer: int, entry_1NC: Tensor) -> None:
        """Store the entries of this pass's tokens of `layer`."""
        self._cache.write(layer, self._slots_N, entry_1NC[0])

    def read(self, layer: int, part: Part) -> Tensor:
        """The first slots of the part's sequences, [B, S, C]."""
        return self._cache.read(layer, self._tables[id(part)])[:, : part.slots]

    def pages(self, layer: int) -> Pages | None:
        """Where each token's sequence lies, unless entries are packed."""
        if self._cache.format is not None or self._cache.storage.dtype != torch.bfloat16:
            return None
        if self._where is None:
            self._where = self._places()
        return Pages(self._cache.entries(layer), *self._where)

    def _places(self) -> tuple[Tensor, ...]:
        """What all layers' pages share."""
        length_N = self._positions_1N[0] + 1
        tables, starts, spans, single = [], [], [], []
        begin = first = 0
        for part in self.parts:
            table_BM = self._tables[id(part)]
            table_B = begin + torch.arange(part.rows) * table_BM.shape[1]
            first_B = first + torch.arange(part.rows) * part.width
            if part.width > self._cache.few:
                before_B = length_N[first_B] - 1
                spans.append(torch.stack((first_B, torch.full_like(first_B, part.width), table_B, before_B), dim=1))
            else:
                single.append(torch.arange(first, first + part.rows * part.width))
            tables.append(table_BM.flatten())
            starts.append(table_B.repeat_interleave(part.width))
            begin += table_BM.numel()
            first += part.rows * part.width
        none = torch.empty(0, dtype=torch.int64)
        singles, stretches = torch.cat([none, *single]), torch.cat([none.view(0, 4), *spans])
        return self._slots_N, torch.cat(tables), torch.cat(starts), length_N, singles, stretches


def _format(config: Config, form: str | None) -> CacheFormat | None:
    if form is None:
        return None
    if config.kv_lora_rank is None:
        return cache_format(form, config.cache_width, 0, min(config.query_dim, 128))
    return cache_format(form, config.kv_lora_rank, config.cache_width - config.kv_lora_rank)


def _untouched(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until they are written: numpy asks the system for them, torch would write them."""
    return torch.from_numpy(np.zeros(int(np.prod(shape)) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(*shape)
