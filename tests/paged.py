"""Sequences on a paged cache without an engine: what batch.py asks of a request, and one pass over several."""

from dataclasses import dataclass, field

import torch

from finback.engine.batch import flat
from finback.engine.blocks import BLOCK, BlockPool
from finback.engine.cache import PagedCache
from finback.engine.scheduler import Work
from finback.model import Config, Model


@dataclass(eq=False)
class Sequence:
    """Token ids and the blocks that their entries lie in."""

    ids: list[int]
    blocks: list[int] = field(default_factory=list)
    cached: int = 0
    routing: None = None

    def sequence(self, start: int, count: int) -> list[int]:
        return self.ids[start : start + count]


def paged(config: Config, blocks: int = 40, **options) -> tuple[PagedCache, BlockPool]:
    return PagedCache(config, config.num_hidden_layers, blocks, **options), BlockPool(blocks)


def advance(
    model: Model, cache: PagedCache, pool: BlockPool, counts: dict[Sequence, int]
) -> dict[Sequence, torch.Tensor]:
    """The next tokens of each sequence in one pass; their final hidden states."""
    works = []
    for row, count in counts.items():
        while len(row.blocks) * BLOCK < row.cached + count:
            row.blocks.append(pool.take())
        works.append(Work(row, row.cached, count))
        row.cached += count
    batch = flat(cache, works)
    hidden = model.decoder(batch.ids_1N, positions=batch.positions_1N, cache=batch.view)[0]
    return {work.request: hidden[span] for work, span in zip(batch.works, batch.spans, strict=True)}
