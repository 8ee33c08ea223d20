"""From the work of a step to one pass of the model over a flat row of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from finback.engine.blocks import BLOCK
from finback.engine.cache import PagedCache, View
from finback.engine.scheduler import Work
from finback.model.attention import Part

_SPREAD = 2  # the longest row of a part has at most so many times the slots of its shortest


@dataclass(frozen=True)
class Batch:
    """Tokens of several requests in one row. `spans`: where each work's tokens stand, in the order of `works`."""

    works: list[Work]
    spans: list[slice]
    ids_1N: Tensor
    positions_1N: Tensor
    view: View


def flat(cache: PagedCache, works: Sequence[Work]) -> Batch:
    """All works in one pass; those that attend alike share a part."""
    ordered = sorted(works, key=lambda work: (work.count, work.start == 0, -work.start))
    parts, tables, start = [], [], 0
    groups = _alike(ordered)
    for together in groups:
        rows, width = len(together), together[0].count
        part, table = _part(cache, together, slice(start, start + rows * width) if len(groups) > 1 else None)
        parts.append(part)
        tables.append(table)
        start += rows * width
    ends = list(accumulate(work.count for work in ordered))
    spans = [slice(end - work.count, end) for work, end in zip(ordered, ends, strict=True)]
    ids = [token for work in ordered for token in work.request.sequence(work.start, work.count)]
    positions = [place for work in ordered for place in range(work.start, work.start + work.count)]
    slots = [_slot(work, place) for work in ordered for place in range(work.start, work.start + work.count)]
    device = cache.storage.device
    positions_1N = _row(positions, device)
    view = View(cache, torch.tensor(slots, device=device), positions_1N, parts, tables)
    return Batch(ordered, spans, _row(ids, device), positions_1N, view)


def tile(cache: PagedCache, work: Work) -> Batch:
    """A pass of exactly one aligned block of one request, whatever part of it is new: always the same shapes.

    A token's result then depends on nothing but its own sequence. Places that are not new repeat its first token;
    what they compute goes into block 0, which is nobody's.
    """
    first = work.start // BLOCK * BLOCK
    assert work.start + work.count <= first + BLOCK, "a tile ends where its block does"
    new = range(work.start - first, work.start - first + work.count)
    tokens = work.request.sequence(work.start, work.count)
    ids = [tokens[place - new.start] if place in new else tokens[0] for place in range(BLOCK)]
    slots = [_slot(work, first + place) if place in new else place for place in range(BLOCK)]
    device = cache.storage.device
    slots_S = torch.arange(first + BLOCK, device=device)
    mask_BTS = (slots_S <= torch.arange(first, first + BLOCK, device=device).unsqueeze(-1)).unsqueeze(0)
    part = Part(None, 1, BLOCK, first + BLOCK, mask_BTS)
    table = torch.tensor([work.request.blocks[: first // BLOCK + 1]], device=device)
    positions_1N = _row(range(first, first + BLOCK), device)
    view = View(cache, torch.tensor(slots, device=device), positions_1N, [part], [table])
    return Batch([work], [slice(new.start, new.stop)], _row(ids, device), positions_1N, view)


def tiles(work: Work) -> list[Work]:
    """A work cut where blocks end."""
    ends = [*range((work.start // BLOCK + 1) * BLOCK, work.start + work.count, BLOCK), work.start + work.count]
    starts = [work.start, *ends[:-1]]
    return [Work(work.request, start, end - start) for start, end in zip(starts, ends, strict=True)]


def _alike(ordered: Sequence[Work]) -> list[list[Work]]:
    """Neighbours with as many new tokens, all or none of them at the start, of about the same length."""
    together: list[list[Work]] = []
    for work in ordered:
        longest = together[-1][0] if together else None
        if (
            longest is not None
            and (longest.count, longest.start == 0) == (work.count, work.start == 0)
            and longest.start < _SPREAD * (work.start + BLOCK)
        ):
            together[-1].append(work)
        else:
            together.append([work])
    return together


def _part(cache: PagedCache, works: Sequence[Work], tokens: slice | None) -> tuple[Part, Tensor]:
    width, longest = works[0].count, works[0].start
    count = -(-(longest + width) // BLOCK)
    # What an 8-bit format rounds must be read back rounded, or results would depend on how a prompt is cut.
    fresh = longest == 0 and cache.format is None
    # Whole blocks: oneDNN prepares a product anew for every size it has not met.
    slots = width if fresh else count * BLOCK
    device = cache.storage.device
    table_BM = np.zeros((len(works), count), dtype=np.int64)
    for row, work in zip(table_BM, works, strict=True):
        held = work.request.blocks[:count]
        row[: len(held)] = held
    mask_BTS = None
    if not fresh and (width > 1 or any(work.start + 1 != slots for work in works)):
        starts_B = torch.tensor([work.start for work in works], device=device)
        positions_BT = starts_B[:, None] + torch.arange(width, device=device)
        mask_BTS = torch.arange(slots, device=device) <= positions_BT.unsqueeze(-1)
    return Part(tokens, len(works), width, slots, mask_BTS), torch.from_numpy(table_BM).to(device)


def _slot(work: Work, place: int) -> int:
    return work.request.blocks[place // BLOCK] * BLOCK + place % BLOCK


def _row(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([values], device=device)
