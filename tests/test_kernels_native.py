"""Native kernels against plain torch in float32, on every path that this processor can take."""

import copy
import os
from typing import Any

import pytest
import torch
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from native_paths import laid, native_paths, near, rows_of, stored
from paged import Sequence, paged
from tiny_model import tiny, tiny_model, tokens

from finback.engine.batch import flat
from finback.engine.scheduler import Work
from finback.errors import UserError
from finback.kernels import native, panels
from finback.kernels.order import fixed_order
from finback.kernels.quantise import FORMATS
from finback.model import Config
from finback.model.attention import Context
from finback.model.fused import lay_out
from finback.model.weight import DenseWeight, PackedWeight

PATHS = pytest.mark.parametrize("path", native_paths())
FORMS = pytest.mark.parametrize("form", panels.FORMS)
# bfloat16 rounds the result; integer weights meet rows of 8 bits: half a step of 127 of each group's largest number.
BOUND = {None: 2**-8, "fp8": 2**-8, "int8": 0.012, "int4": 0.012}


@pytest.fixture(autouse=True)
def _best_path_again():
    with torch.no_grad():
        yield
    native.use(None)


@FORMS
@given(rows=st.integers(1, 300), cols=st.integers(1, 300))
def test_panels_keep_every_number(form, rows, cols):
    codes, scale, _ = stored(form, rows, cols)
    again, scale_again = panels.unlay(form, laid(form, codes, scale, cols), rows, cols)
    assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))
    assert scale is None or torch.equal(scale_again, scale)


@PATHS
@FORMS
def test_panels_are_filled_in_parts(path, form):
    """By the native way too, and every other panel of a matrix that shares its memory with another one."""
    native.use(path)
    codes, scale, _ = stored(form, 300, 50)
    out = torch.full((38, panels.panel_bytes(form, 50)), 7, dtype=torch.uint8)[::2]
    for lay in (panels.lay, native.lay):
        for start in (128, 0, 256):
            rows = slice(start, min(start + 128, 300))
            part = None if scale is None else scale[FORMATS[form].scale_rows(rows)]
            lay(form, codes[rows], part, 50, out, start)
        assert torch.equal(out, laid(form, codes, scale, 50))
        out.fill_(9)


@PATHS
@FORMS
@given(rows=st.integers(1, 300), cols=st.integers(1, 300))
def test_the_native_way_into_panels(path, form, rows, cols):
    native.use(path)
    codes, scale, _ = stored(form, rows, cols)
    out = torch.full((-(-rows // panels.PANEL), panels.panel_bytes(form, cols)), 5, dtype=torch.uint8)
    native.lay(form, codes, scale, cols, out)
    assert torch.equal(out, laid(form, codes, scale, cols))


@PATHS
@FORMS
@pytest.mark.parametrize(("rows", "cols"), [(16, 32), (1, 1), (17, 31), (100, 72), (300, 514), (256, 1024), (33, 260)])
def test_linear_of_few_and_many_rows(path, form, rows, cols):
    native.use(path)
    codes, scale, numbers = stored(form, rows, cols)
    held = laid(form, codes, scale, cols)
    matrix = native.matrix(form, rows, cols, held)
    for count in (1, 2, 3, 4, 5, 8, 9, 16, 17, 41):
        x = rows_of(count, cols)
        near(native.linear(x, matrix, rows), x.float() @ numbers.T, BOUND[form])


@PATHS
@FORMS
@pytest.mark.parametrize("fixed", [False, True])
def test_a_rows_bits_do_not_depend_on_the_others(path, form, fixed):
    """By tiles only in fixed order: tests/test_kernels_amx.py has more."""
    native.use(path)
    least = 16 if path.startswith("amx") and not fixed else 1
    codes, scale, _ = stored(form, 144, 200)
    held = laid(form, codes, scale, 200)
    x = rows_of(40, 200)
    matrix = native.matrix(form, 144, 200, held)
    with fixed_order(fixed):
        whole = native.linear(x, matrix, 144)
        for count in (count for count in (1, 2, 3, 4, 5, 6, 7, 9, 17, 29) if count >= least):
            for first in (0, 11):
                part = x[first : first + count].clone()
                assert torch.equal(native.linear(part, matrix, 144), whole[first : first + count])


@PATHS
def test_every_fp8_code(path):
    """All 254 finite codes, subnormal ones too, exactly."""
    native.use(path)
    codes = torch.tensor([c for c in range(256) if c & 127 != 127], dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = torch.cat((codes, codes[:2])).view(2, 128)
    held = laid("fp8", codes, torch.ones(1, 1), 128)
    out = native.linear(torch.eye(128).bfloat16(), native.matrix("fp8", 2, 128, held), 2)
    assert torch.equal(out.float(), codes.float().T)


def packed(model: Any, form: str) -> None:
    """Put every matrix of a model's blocks into packed form."""
    owners = [(owner, name) for owner in model.decoder.layers.modules() for name, _ in owner.named_children()]
    for owner, name in owners:
        weight = getattr(owner, name)
        if not isinstance(weight, DenseWeight):
            continue
        ours = PackedWeight(FORMATS[form], weight, torch.bfloat16)
        for index, tensors in weight.pieces():
            ours.fill(index, 0, tensors[""])
        setattr(owner, name, ours)


def blocks(path: str, form: str | None = None, family: str | None = None, **settings):
    """A tiny model in bfloat16 or packed numbers computed in float32, and the same in panels."""
    native.use(path)
    config = tiny(**settings) if family is None else Config.from_dict(FAMILIES[family] | settings)
    plain = tiny_model(config).eval().bfloat16()
    for _, router in plain.routers():
        router.weight.data = router.weight.data.float()
    fused = copy.deepcopy(plain)
    if form is not None:
        packed(fused, form)
        for name, weight in fused.named_modules():
            if isinstance(weight, PackedWeight):
                exact = weight.form.dequantise(weight.codes, weight.scale, weight.cols, torch.float32)
                plain.get_submodule(name).value.data = exact.view(weight.shape)
    assert lay_out(fused)
    return config, plain.float(), fused


def _in_forms(settings: list[dict]) -> list[tuple[str | None, dict]]:
    """All settings in bfloat16, and the first two in every form: what a form changes is the same for all of them."""
    return [(None, each) for each in settings] + [(form, each) for form in panels.FORMS[1:] for each in settings[:2]]


ROUTERS = [
    {},
    {"hidden_size": 72, "moe_intermediate_size": 20, "intermediate_size": 52},
    {"q_lora_rank": None},
    {"n_group": 1, "topk_group": 1},
    {"n_routed_experts": 16, "n_group": 4, "topk_group": 2},
    {"scoring_func": "softmax", "topk_method": "group_limited_greedy", "norm_topk_prob": False},
    {"scoring_func": "softmax", "topk_method": "group_limited_greedy", "n_routed_experts": 16, "n_group": 4},
    {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False},
    {"moe_intermediate_size": 20, "intermediate_size": 52},
    {"n_shared_experts": 0},
]


# Of what a block adds, after two products (the feed-forward) or more: x takes some of bfloat16's 8 bits as well.
ADDED = {None: 2**-6, "fp8": 2**-6, "int8": 0.03, "int4": 0.03}


@PATHS
@pytest.mark.parametrize(("form", "settings"), _in_forms(ROUTERS), ids=str)
@pytest.mark.parametrize("count", [1, 3, 40])
def test_the_feed_forward_of_a_block(path, form, settings, count):
    """Dense and mixed, experts without rows and with many; the choice is the router's own, recorded and replayed."""
    config, plain, fused = blocks(path, form, **settings)
    x = rows_of(count, config.hidden_size).unsqueeze(0)
    for name, block in plain.decoder.layers.items():
        layer, ours = int(name), fused.decoder.layers[name].fused
        chosen, recorded = {}, {}
        normed = block.post_attention_layernorm(x.float()).bfloat16().float()
        added = block.mlp(normed, chosen) if config.is_moe(layer) else block.mlp(normed)
        for other in (2, 7, count):  # what a call leaves in memory must not reach the next one
            ours.feed_forward(torch.full((1, other, config.hidden_size), torch.nan).bfloat16(), layer, None)
        got = x.clone()
        ours.feed_forward(got, layer, recorded)
        near(got.float() - x.float(), added, ADDED[form])
        if config.is_moe(layer):
            assert torch.equal(recorded[layer].sort(-1).values, chosen[layer].sort(-1).values)
            other = {layer: (chosen[layer] + 1) % config.n_routed_experts}
            replayed = x.clone()
            wanted = block.mlp(normed, dict(other))
            ours.feed_forward(replayed, layer, other)
            near(replayed.float() - x.float(), wanted, ADDED[form])


# Depth and new tokens: decoding, guesses, chunks; at the ends of blocks, past a chunk of 256 slots.
MIXTURE = [(0, 1), (15, 1), (16, 3), (257, 1), (512, 4), (100, 16), (0, 33), (0, 33), (31, 64), (240, 90), (530, 45)]


ATTENTIONS: list[dict] = [
    {},
    {"kv_lora_rank": 24, "num_attention_heads": 17, "v_head_dim": 20},
    {"q_lora_rank": None},
    {"num_attention_heads": 17},
    {"v_head_dim": 20},
    *({"family": family} for family in FAMILIES),
    {"family": "R1-Distill-Qwen", "num_attention_heads": 34, "hidden_size": 136},  # 17 heads share a key: two panels
]


@PATHS
@pytest.mark.parametrize(("form", "settings"), _in_forms(ATTENTIONS), ids=str)
def test_attention_of_a_block(path, form, settings):
    """Single tokens and spans in one pass; the cache gets the entries, what nobody wrote is not looked at."""
    config, plain, fused = blocks(path, form, **{"max_position_embeddings": 1024} | settings)
    (cache, pool), (twin, _) = paged(config, blocks=200, dtype=torch.bfloat16), paged(config, blocks=200)
    cache.few = 32  # so that there are both kinds, whatever is cheaper
    cache.storage.normal_(generator=torch.Generator().manual_seed(1))
    twin.storage.copy_(cache.storage)
    works = []
    for depth, count in MIXTURE:
        row = Sequence(tokens(600, seed=depth).tolist())
        row.blocks = [pool.take() for _ in range((depth + count - 1) // 16 + 1)]
        works.append(Work(row, depth, count))
    ours, theirs = flat(cache, works), flat(twin, works)
    x = rows_of(ours.ids_1N.shape[1], config.hidden_size).unsqueeze(0)
    context = Context.build(config, theirs.positions_1N, x.shape[:2], "cpu", theirs.view)
    block = plain.decoder.layers["1"]
    added = block.self_attn(block.input_layernorm(x.float()), context)
    got, before = x.clone(), cache.storage.clone()
    pages = ours.view.pages(1)
    assert pages is not None
    fused.decoder.layers["1"].fused.attention(torch.full_like(x, torch.nan), context.turn, pages)
    cache.storage.copy_(before)  # but the kernels' own memory is full of NaN now
    fused.decoder.layers["1"].fused.attention(got, context.turn, pages)
    near(got.float() - x.float(), added, 2 * ADDED[form])
    near(cache.storage[1], twin.storage[1], BOUND[form])
    assert torch.equal(cache.storage[0].float(), twin.storage[0])


@PATHS
@pytest.mark.parametrize("settings", [{}, {"family": "deepseek-moe-16b"}, {"family": "R1-Distill-Qwen"}], ids=str)
def test_all_layers_in_one_call_are_the_blocks_one_by_one(path, settings):
    """Bit for bit: what they return, the cache they leave, and the experts they chose; these are replayed by blocks."""
    config, _, fused = blocks(path, None, **settings)
    work = Work(Sequence(tokens(60, seed=2).tolist()), 0, 40)
    work.request.blocks = [3, 1, 2, 0]
    results = []
    for whole in (fused.decoder.fused, None):
        fused.decoder.fused = whole
        cache, _ = paged(config, blocks=8, dtype=torch.bfloat16)
        routing: dict = {}
        for step in (work, Work(work.request, 40, 1), Work(work.request, 41, 3)):
            batch = flat(cache, [step])
            out = fused.decoder(batch.ids_1N, positions=batch.positions_1N, cache=batch.view, routing=(chosen := {}))
            routing |= {(layer, step.start): experts for layer, experts in chosen.items()}
        results.append((out, cache.storage, routing))
    (ours, cache, chosen), (theirs, twin, wanted) = results
    assert torch.equal(ours, theirs) and torch.equal(cache, twin) and chosen.keys() == wanted.keys()
    assert all(torch.equal(chosen[key], experts) for key, experts in wanted.items())
    assert len(chosen) == 3 * sum(config.is_moe(layer) for layer in range(config.num_hidden_layers))


@PATHS
@pytest.mark.parametrize("settings", [{"qk_nope_head_dim": 7}, {}], ids=str)
def test_a_whole_model_without_a_cache(path, settings):
    """Also with heads of an odd size, whose blocks are not fused: their matrices are in panels all the same."""
    _, plain, fused = blocks(path, **settings)
    assert all((block.fused is None) == bool(settings) for block in fused.decoder.layers.values())
    ids = tokens(2, 12)
    chosen: dict = {}
    expected = plain(ids, routing=chosen)
    near(fused(ids, routing=dict(chosen)), expected, 2**-4)


def test_paths_are_named(monkeypatch):
    assert native.supported()[-1] == "torch"
    for wrong in ("sse", "AVX2"):
        with pytest.raises(UserError, match=f"{native.VARIABLE}={wrong}.*allowed here: .*torch"):
            native.find(wrong)
    assert native.find("torch") == ("torch", None)
    monkeypatch.setattr(native.machine, "cpu_flags", set)
    assert native.supported() == ["torch"] and native.find() == ("torch", None)
    with pytest.raises(UserError, match="not a path of this processor"):
        native.find("avx2")


def test_without_kernels_nothing_is_laid_out():
    native.use("torch")
    model = tiny_model(tiny()).eval().bfloat16()
    before = model.state_dict().keys()
    assert not lay_out(model) and model.state_dict().keys() == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_where_kernels_must_be_they_are():
    """CI sets FINBACK_REQUIRE_NATIVE: a build that fails silently would leave everything else untested."""
    if os.environ.get("FINBACK_REQUIRE_NATIVE") and "avx2" in native.supported():
        assert native.kernels() is not None
