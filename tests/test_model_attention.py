"""Latent attention: naive, absorbed and cached are one function; documents in a row never mix."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import tiny, tiny_model, tokens
from torch import Tensor

from finback.model import Config, RopeScaling
from finback.model.attention import Part

LENGTH = 14
CONFIG = tiny(num_nextn_predict_layers=1)


class DictCache:
    """The protocol by the letter: entries by (layer, row, position); unwritten slots hold what must never be seen."""

    def __init__(self) -> None:
        self.slots: dict[tuple[int, int, int], Tensor] = {}

    def hidden(self, model, ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """One pass over the tokens of all rows in one flat row, [B, T, D]."""
        rows, width = ids_BT.shape
        self.places = [(row, place) for row, places in enumerate(positions_BT.tolist()) for place in places]
        held = int(positions_BT.max()) + 1
        fresh = held == width
        # A row's last token sees all its slots: of those that may go without a mask every other one does.
        bare = fresh or (width == 1 and held % 2 == 0 and bool((positions_BT == held - 1).all()))
        mask_BTS = None if bare else torch.arange(held) <= positions_BT.unsqueeze(-1)
        self.parts = [Part(slice(0, rows * width), rows, width, held, mask_BTS)]
        flat = model.decoder(ids_BT.reshape(1, -1), positions=positions_BT.reshape(1, -1), cache=self)
        return flat.view(rows, width, -1)

    def write(self, layer: int, entry_1NC: Tensor) -> None:
        for (row, place), entry_C in zip(self.places, entry_1NC[0], strict=True):
            self.slots[layer, row, place] = entry_C

    def read(self, layer: int, part: Part) -> Tensor:
        junk = torch.full_like(self.slots[layer, 0, 0], 1e4)
        slots = range(part.slots)
        return torch.stack(
            [torch.stack([self.slots.get((layer, r, s), junk) for s in slots]) for r in range(part.rows)]
        )


def in_chunks(model, ids: Tensor, sizes: list[int]) -> Tensor:
    """Logits of rows fed in pieces through a cache."""
    every = torch.arange(ids.shape[1]).expand(len(ids), -1)
    cache = DictCache()
    pieces = zip(ids.split(sizes, 1), every.split(sizes, 1), strict=True)
    return torch.cat([model.decoder.logits(cache.hidden(model, *piece)) for piece in pieces], dim=1)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@settings(max_examples=25)
@given(st.sets(st.integers(1, LENGTH - 1)))
def test_any_chunks_through_a_cache_equal_the_whole(cuts):
    """One by one, all at once, and everything between: prefill, chunked prefill and decoding."""
    edges = sorted({0, LENGTH} | cuts)
    sizes = [b - a for a, b in pairwise(edges)]
    model, ids = tiny_model(CONFIG), tokens(2, LENGTH)
    torch.testing.assert_close(in_chunks(model, ids, sizes), model(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"q_lora_rank": None},
        {"v_head_dim": 9},
        {"qk_nope_head_dim": 7, "kv_lora_rank": 15},
        {"kv_lora_rank": 4},  # narrower than the heads: the absorbed form is always the cheaper one
        {"rope_scaling": RopeScaling(40, 8, mscale=1.0, mscale_all_dim=1.0), "max_position_embeddings": 320},
    ],
)
@pytest.mark.parametrize("sizes", [[1] * LENGTH, [5, 1, 8]])
def test_cached_equals_whole_for_every_shape(changes, sizes):
    model, ids = tiny_model(tiny(**changes)), tokens(1, LENGTH)  # one row: slices of one token count as contiguous
    torch.testing.assert_close(in_chunks(model, ids, sizes), model(ids), rtol=1e-4, atol=1e-4)


def test_naive_and_absorbed_forms_agree(monkeypatch):
    """The same step forced through either form, and each form really ran."""
    from finback.model.attention import LatentAttention

    model, ids, ran = tiny_model(CONFIG), tokens(2, LENGTH), []
    for form in ("_naive", "_absorbed"):
        plain = getattr(LatentAttention, form)
        monkeypatch.setattr(LatentAttention, form, lambda *a, plain=plain, form=form: ran.append(form) or plain(*a))
    results = {}
    for form, break_even in (("_naive", 0.0), ("_absorbed", float("inf"))):
        monkeypatch.setattr(Config, "absorbed_below", break_even)
        ran.clear()
        results[form] = in_chunks(model, ids, [4, 10])[:, 4:]
        assert ran[-CONFIG.num_hidden_layers :] == [form] * CONFIG.num_hidden_layers
    torch.testing.assert_close(results["_naive"], results["_absorbed"], rtol=1e-4, atol=1e-4)


def test_the_cache_holds_576_of_v3s_numbers_per_token_and_layer():
    """C = kv_lora_rank + qk_rope_head_dim, whatever the heads; the latent part is the normed one."""
    model = tiny_model(CONFIG)
    cache = DictCache()
    cache.hidden(model, tokens(1, 4), torch.arange(4)[None])
    assert {len(entry) for entry in cache.slots.values()} == {CONFIG.kv_lora_rank + CONFIG.qk_rope_head_dim}
    assert len(cache.slots) == 4 * CONFIG.num_hidden_layers
    norm = model.decoder.layers["1"].self_attn.kv_a_layernorm.weight
    latent = cache.slots[1, 0, 2][: CONFIG.kv_lora_rank] / norm
    assert latent.square().mean().item() == pytest.approx(1.0, rel=1e-3)


def test_rows_of_different_lengths_share_a_batch():
    """Row 0 holds 9 tokens and row 1 holds 4 (padded on the right); both go on by one token at their own position."""
    model = tiny_model(CONFIG)
    long, short = tokens(1, 10, seed=1), tokens(1, 5, seed=2)
    padded = torch.cat((short[:, :4], torch.zeros(1, 5, dtype=torch.long)), dim=1)
    cache = DictCache()
    cache.hidden(model, torch.cat((long[:, :9], padded)), torch.arange(9).expand(2, -1))
    hidden = cache.hidden(model, torch.stack((long[0, 9:], short[0, 4:])), torch.tensor([[9], [4]]))
    expected = torch.cat((model.decoder(long)[:, -1:], model.decoder(short)[:, -1:]))
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=20)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_documents_in_one_row_equal_separate_rows(lengths):
    """Positions that restart at 0 separate documents."""
    model = tiny_model(CONFIG)
    documents = [tokens(1, n, seed=i) for i, n in enumerate(lengths)]
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    packed = model(torch.cat(documents, dim=1), positions=positions)
    separate = torch.cat([model(document) for document in documents], dim=1)
    torch.testing.assert_close(packed, separate, rtol=1e-4, atol=1e-4)


def test_documents_do_not_mix_in_the_mtp_module_either():
    model, lengths = tiny_model(CONFIG), [5, 3]
    hidden, embeds = torch.randn(2, 1, 8, CONFIG.hidden_size, generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    (mtp,) = model.mtp.values()
    packed = mtp(hidden, embeds, positions=positions)
    parts = zip(hidden.split(lengths, 1), embeds.split(lengths, 1), strict=True)
    separate = torch.cat([mtp(h, e) for h, e in parts], dim=1)
    torch.testing.assert_close(packed, separate, rtol=1e-4, atol=1e-4)


def test_no_token_sees_a_later_one():
    model, ids = tiny_model(CONFIG), tokens(2, LENGTH)
    changed = ids.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % CONFIG.vocab_size
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=1e-5, atol=1e-5)
    assert (before[:, 9:] - after[:, 9:]).abs().amax(-1).min() > 1e-3


def test_embeddings_in_place_of_ids():
    model, ids = tiny_model(CONFIG), tokens(2, 6)
    embeds = model.decoder.embed_tokens(ids)
    torch.testing.assert_close(model.decoder(embeds=embeds), model.decoder(ids), rtol=0, atol=0)
