"""The kernels' ways without gradients, which generation takes, against their specification and those with gradients."""

import math

import pytest
import torch
from torch.nn import functional as F

from finback.kernels import dispatch, linear, native, reference, rotary, tiles

BF16 = torch.finfo(torch.bfloat16).eps


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "rows, width, heads, slots, rank, rope", [(1, 1, 1, 1, 1, 1), (3, 1, 5, 17, 7, 3), (2, 4, 3, 33, 16, 8)]
)
def test_latent_attention(rows, width, heads, slots, rank, rope, masked):
    query, entry = random(rows, width, heads, rank + rope), random(rows, slots, rank + rope)
    mask = None
    if masked:  # every row and token sees another number of slots, one at least
        seen = torch.arange(rows * width).view(rows, width) % slots
        mask = torch.arange(slots) <= seen.unsqueeze(-1)
    kept = query.clone(), entry.clone()
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float32, 1e-5), (torch.bfloat16, 4 * BF16)):
        inputs = query.to(dtype), entry.to(dtype)
        exact = reference.latent_attention(*(x.double() for x in inputs), rank, 0.3, mask)
        found = dispatch.latent_attention(*inputs, rank, 0.3, mask)
        assert found.dtype == dtype and found.shape == (rows, width, heads, rank)
        assert relative(found, exact) <= tolerance
    assert torch.equal(query, kept[0]) and torch.equal(entry, kept[1]), "the cache is read, not written"


def test_latent_attention_weighs_in_float32():
    """Thousands of scores that bfloat16 could not add up: half of the weight lies on the last of 4097."""
    query, entry = torch.zeros(1, 1, 1, 3), torch.zeros(1, 4097, 3)
    query[..., 2], entry[0, -1, 2], entry[0, -1, 0] = 1, 4096.0, 1
    found = dispatch.latent_attention(query.bfloat16(), entry.bfloat16(), 2, 8.317766 / 4096, None)
    assert found[0, 0, 0, 0].item() == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize("rank", [2, 64])
def test_latent_attention_scales_its_scores_in_float32(rank):
    """Scores of 128 and 129, which bfloat16 holds; 0.37 of them it does not. Of a small cache and of a large one."""
    query, entry = torch.zeros(1, 1, 1, rank + 1), torch.zeros(1, 4097, rank + 1)
    query[..., -1], entry[0, 5, -1], entry[0, 9, -1], entry[0, 9, 0] = 1, 128.0, 129.0, 1
    found = dispatch.latent_attention(query.bfloat16(), entry.bfloat16(), rank, 0.37, None)
    assert found[0, 0, 0, 0].item() == pytest.approx(1 / (1 + math.exp(-0.37)), rel=0.01)


def test_latent_attention_of_a_cache_in_another_dtype():
    query, entry = random(2, 1, 3, 10, dtype=torch.float32), random(2, 9, 10, dtype=torch.bfloat16)
    found = dispatch.latent_attention(query, entry, 6, 0.3, None)
    torch.testing.assert_close(found, reference.latent_attention(query, entry, 6, 0.3, None))


@pytest.mark.parametrize("shape", [(1,), (1, 1), (1, 2), (2,), (3,), (1, 3), (4, 2)])
@pytest.mark.parametrize("width", [8, 100, 1023])
def test_linear_of_few_rows(shape, width):
    """A sum of `width` products in float32 or better, rounded once: half a unit of bfloat16, and what the sum loses."""
    x, weight = random(*shape, width, dtype=torch.bfloat16), random(37, width, dtype=torch.bfloat16)
    found = dispatch.linear(x, weight)
    exact = x.double() @ weight.double().T
    bound = exact.abs() * BF16 / 2 + (x.double().abs() @ weight.double().abs().T) * torch.finfo(torch.float32).eps * 32
    assert found.dtype == torch.bfloat16 and found.shape == (*shape, 37)
    assert ((found.double() - exact).abs() <= bound).all()
    assert torch.backends.mkldnn.enabled


@pytest.mark.parametrize("rows, without", [(1, True), (2, True), (3, False), (64, False)])
def test_only_a_few_rows_go_without_onednn(rows, without, monkeypatch):
    seen = []
    monkeypatch.setattr(linear, "_WIDE", True)
    plain = F.linear
    monkeypatch.setattr(F, "linear", lambda *a: seen.append(torch._C._get_mkldnn_enabled()) or plain(*a))
    weight = random(5, 16, dtype=torch.bfloat16)
    for x in (random(rows, 16, dtype=torch.bfloat16), random(1, rows, 16, dtype=torch.bfloat16)):
        dispatch.linear(x, weight)
    assert seen == [not without] * 2
    assert torch._C._get_mkldnn_enabled()


def test_what_may_need_onednn_keeps_it(monkeypatch):
    """Gradients, autocast and other dtypes go torch's own way."""
    monkeypatch.setattr(linear, "_WIDE", True)
    seen = []
    plain = F.linear
    monkeypatch.setattr(F, "linear", lambda *a: seen.append(torch._C._get_mkldnn_enabled()) or plain(*a))
    x, weight = random(1, 16, dtype=torch.bfloat16), random(5, 16, dtype=torch.bfloat16)
    with torch.enable_grad():
        dispatch.linear(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        dispatch.linear(x, weight)
        dispatch.linear(x, weight.float())
    dispatch.linear(x.float(), weight.float())
    assert seen == [True] * 4


def test_onednn_is_on_again_after_a_product_that_raised(monkeypatch):
    monkeypatch.setattr(linear, "_WIDE", True)
    with pytest.raises(RuntimeError):
        dispatch.linear(random(1, 16, dtype=torch.bfloat16), random(5, 15, dtype=torch.bfloat16))
    assert torch._C._get_mkldnn_enabled()


def chosen(tokens: int) -> torch.Tensor:
    """Three of four experts each; of nine experts five are never chosen."""
    seeds = [torch.Generator().manual_seed(i) for i in range(tokens)]
    return torch.stack([torch.randperm(4, generator=seed)[:3] * 2 for seed in seeds])


def products(*stacks: torch.Tensor):
    return [lambda x, expert, stack=stack: F.linear(x, stack[expert]) for stack in stacks]


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 4 * BF16)]
)
@pytest.mark.parametrize("tokens", [1, 2, 7, 500])
@pytest.mark.parametrize("fixed", [False, True])
def test_experts_in_every_form(tokens, fixed, dtype, tolerance):
    """As a stack, as a stream, as a loop; one token, empty experts, and from 384 tokens on groups that are filled."""
    experts = chosen(tokens)
    x, gate_up, down, weights = (
        random(*shape, dtype=dtype) for shape in ((tokens, 6), (9, 8, 6), (9, 6, 4), (tokens, 3))
    )
    exact = reference.expert_ffn(*(t.double() for t in (x, gate_up, down)), experts, weights.double())
    with dispatch.fixed_order(fixed):
        found = [
            dispatch.expert_ffn(x, gate_up, down, experts, weights),
            dispatch.expert_stream(x, *products(gate_up, down), 9, experts, weights),
            dispatch.expert_loop(x, *products(gate_up, down), experts, weights),
        ]
    for out in found:
        assert out.dtype == dtype and relative(out, exact) <= tolerance


def test_a_stream_asks_for_chosen_experts_only():
    asked = []
    gate_up, down = random(9, 8, 6), random(9, 6, 4)
    first, second = products(gate_up, down)
    experts = chosen(5)
    for fixed in (False, True):
        asked.clear()
        with dispatch.fixed_order(fixed):
            dispatch.expert_stream(
                random(5, 6), lambda x, e: asked.append(e) or first(x, e), second, 9, experts, random(5, 3)
            )
        assert asked == experts.unique().tolist(), "each once"


@pytest.mark.parametrize("form", ["ffn", "loop", "stream"])
def test_in_fixed_order_a_rows_bits_do_not_depend_on_the_others(form):
    """Sixteen rows always; fifteen of them choose other experts and hold other numbers."""
    x, weights, experts = random(16, 64, dtype=torch.float32), random(16, 3, dtype=torch.float32), chosen(16)
    gate_up, down = random(9, 96, 64, dtype=torch.float32), random(9, 64, 48, dtype=torch.float32)

    def run(x, experts, weights):
        if form == "ffn":
            return dispatch.expert_ffn(x, gate_up, down, experts, weights)
        if form == "loop":
            return dispatch.expert_loop(x, *products(gate_up, down), experts, weights)
        return dispatch.expert_stream(x, *products(gate_up, down), 9, experts, weights)

    other, others = x.roll(1, 0), experts.roll(3, 0)
    alike = experts[5].expand(16, 3).clone()
    other[5], others[5] = x[5], experts[5]
    with dispatch.fixed_order():
        first = run(x, experts, weights)[5]
        assert torch.equal(run(other, others, weights)[5], first)
        assert torch.equal(run(other, alike, weights)[5], first)


@pytest.mark.parametrize("form", ["ffn", "loop", "stream"])
def test_in_fixed_order_every_product_has_all_rows(form, monkeypatch):
    """So that its sums have one order, which the bits of some machines would not show."""
    x, weights, experts = random(16, 6), random(16, 3), chosen(16)
    gate_up, down, plain, seen = random(9, 8, 6), random(9, 6, 4), F.linear, []
    monkeypatch.setattr(F, "linear", lambda rows, weight: seen.append(len(rows)) or plain(rows, weight))
    with dispatch.fixed_order():
        if form == "ffn":
            dispatch.expert_ffn(x, gate_up, down, experts, weights)
        elif form == "loop":
            dispatch.expert_loop(x, *products(gate_up, down), experts, weights)
        else:
            dispatch.expert_stream(x, *products(gate_up, down), 9, experts, weights)
    assert seen == [16] * 2 * len(experts.unique())


def test_fixed_order_ends_with_its_block():
    from finback.kernels import order

    with pytest.raises(KeyError), dispatch.fixed_order():
        with dispatch.fixed_order(False):
            assert not order._fixed
        assert order._fixed
        raise KeyError
    assert not order._fixed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("path", ["torch", None])
def test_without_gradients_norm_and_rotation_are_those_with_them(dtype, cut, path, monkeypatch):
    """Bit for bit in plain torch; compiled kernels, where there are any, train with other sums of the same numbers."""
    monkeypatch.setattr(native, "_level", native.find(path))
    x, weight = random(3, 5, 8, dtype=dtype), random(8, dtype=dtype)
    angles = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angles), angles)
    turn = turn if dtype == torch.float64 else turn.to(torch.complex64)
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        expected = dispatch.rms_norm(leaf, weight, 1e-6).detach(), dispatch.rotate(leaf, turn).detach()
    kept = x.clone()
    if cut:
        monkeypatch.setattr(tiles, "_NUMBERS", 8)
        monkeypatch.setattr(rotary, "_SMALL", 8)
    found = dispatch.rms_norm(x, weight, 1e-6), dispatch.rotate(x, turn)
    for ours, wanted in zip(found, expected, strict=True):
        assert ours.dtype == wanted.dtype == dtype
        assert cut or native.kernels() is not None or torch.equal(ours, wanted)
        torch.testing.assert_close(ours, wanted)
    assert torch.equal(x, kept)


def test_under_autocast_the_norm_is_in_the_dtype_of_the_next_product():
    with torch.autocast("cpu", torch.bfloat16):
        assert dispatch.rms_norm(random(2, 8, dtype=torch.float32), torch.ones(8), 1e-6).dtype == torch.bfloat16
