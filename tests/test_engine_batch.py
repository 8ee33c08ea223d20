"""One flat pass over every kind of work at once, against whole uncached passes; and what no pass may read."""

import pytest
import torch
from paged import Sequence, advance, paged
from tiny_model import tiny, tiny_model, tokens

from finback.engine.blocks import BLOCK

CONFIG = tiny()
# First pass, second pass: prompts of equal and other lengths, chunks, several new tokens (drafts), decoding at depths
# that share a part and at one that does not.
MIXTURE = [(9, 1), (9, 1), (20, 1), (33, 1), (90, 1), (17, 5), (40, 5), (16, 16), (30, 16), (1, 1), (0, 12), (0, 12)]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def whole(model, row: Sequence) -> torch.Tensor:
    return model.decoder(torch.tensor([row.ids[: row.cached]]))[0]


def test_one_pass_over_every_kind_of_work_equals_whole_ones():
    model = tiny_model(CONFIG)
    cache, pool = paged(CONFIG, blocks=60)
    rows = {Sequence(tokens(100, seed=i).tolist()): counts for i, counts in enumerate(MIXTURE)}
    first = advance(model, cache, pool, {row: before for row, (before, _) in rows.items() if before})
    second = advance(model, cache, pool, {row: new for row, (_, new) in rows.items()})
    for row in rows:
        said = torch.cat([first[row], second[row]]) if row in first else second[row]
        torch.testing.assert_close(said, whole(model, row), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("before", [(15, 15), (31, 31), (15,), (31,)])
def test_rows_that_fill_their_blocks_see_all_of_them(before):
    """One new token each, at the end of a block: no mask is needed, and the earlier tokens are seen all the same."""
    model = tiny_model(CONFIG)
    cache, pool = paged(CONFIG)
    rows = [Sequence(tokens(40, seed=i).tolist()) for i in range(len(before))]
    advance(model, cache, pool, dict(zip(rows, before, strict=True)))
    said = advance(model, cache, pool, dict.fromkeys(rows, 1))
    for row in rows:
        torch.testing.assert_close(said[row][-1], whole(model, row)[-1], rtol=1e-4, atol=1e-4)


def test_no_pass_reads_what_is_nobodys_or_anothers():
    """A short row beside a longer one: what fills its table up must not be a block that may hold anything."""
    model = tiny_model(CONFIG)
    cache, pool = paged(CONFIG)
    other = [pool.take() for _ in range(3)]
    rows = [Sequence(tokens(60, seed=i).tolist()) for i in (1, 2)]
    advance(model, cache, pool, {rows[0]: 40, rows[1]: 25})
    mine = {0, *rows[0].blocks, *rows[1].blocks}
    assert not mine & {*other}
    cache.storage[:, [block for block in range(cache.blocks + 1) if block not in mine]] = float("nan")
    said = advance(model, cache, pool, {rows[0]: 1, rows[1]: 1})
    for row in rows:
        torch.testing.assert_close(said[row][-1], whole(model, row)[-1], rtol=1e-4, atol=1e-4)
    assert cache.storage[:, 0].count_nonzero() == 0 and BLOCK * len(rows[0].blocks) > 40
