"""Training's compiled attention on every path that runs here: beside float64, beside plain torch, and by itself."""

import pytest
import torch
from native_paths import native_paths

from finback.kernels import attention, native

pytestmark = pytest.mark.skipif(
    not native_paths(), reason="this processor takes no native path; the plain form has its own tests"
)


@pytest.fixture(params=native_paths())
def path(request):
    native.use(request.param)
    yield request.param
    native.use(None)


def packed(tokens: int, *lengths: int) -> torch.Tensor:
    """A row for each length: documents of so many tokens that do not mix, causal inside."""
    document = torch.arange(tokens) // torch.tensor(lengths)[:, None]
    return (document[:, :, None] == document[:, None]).tril()


def exact(query, key, value, scale, mask):
    """In whatever dtype the inputs have; a query that sees nothing gets zeros."""
    if mask is None:
        mask = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).tril()[None]
    scores = torch.einsum("bthd,bshd->bhts", query, key) * scale
    weights = scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhts,bshe->bthe", weights, value)


def inputs(rows: int, tokens: int, heads: int, key: int, value: int, keys: int | None = None, size: float = 1.0):
    generator = torch.Generator().manual_seed(tokens + key)
    shapes = ((tokens, key), (keys or tokens, key), (keys or tokens, value))
    made = [size * torch.randn(rows, length, heads, width, generator=generator) for length, width in shapes]
    return [x.bfloat16().requires_grad_() for x in made]


def gradients(run, given, scale, mask):
    """The output and the gradients of all inputs, for one random direction."""
    out = run(*given, scale, mask)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).bfloat16().to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, given, direction)]


def errors(got, wanted) -> list[float]:
    """Relative to the whole: of single numbers that come to nothing nobody asks how many digits they have."""
    for x in got:
        assert torch.isfinite(x).all()
    with torch.no_grad():
        return [float((x.double() - y).norm() / y.norm().clamp(min=1e-9)) for x, y in zip(got, wanted, strict=True)]


def compare(given, scale, mask, bound: float = 1.0) -> None:
    """No further from float64 than plain torch in bfloat16, which rounds the same things and the scores too."""
    wide = [x.detach().double().requires_grad_() for x in given]
    wanted = gradients(exact, wide, scale, mask)
    ours = errors(gradients(attention.attention, given, scale, mask), wanted)
    torchs = errors(gradients(attention._Attention.apply, given, scale, mask), wanted)
    for one, other in zip(ours, torchs, strict=True):
        assert one <= max(bound * other, 2**-9), (ours, torchs)
    assert max(ours) <= 0.01


SHAPES = [
    (2, 2, 3, 16, 16),
    (2, 7, 3, 6, 5),
    (3, 31, 1, 48, 32),
    (2, 32, 2, 48, 32),
    (1, 33, 2, 33, 70),
    (1, 257, 2, 48, 32),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_causal(path, shape):
    """Odd lengths and widths, and more than one block of queries."""
    compare(inputs(*shape), 0.3, None)


def test_more_keys_than_a_chunk_and_wide_heads(path):
    compare(inputs(1, 601, 1, 48, 32), 0.14, None)
    compare(inputs(1, 290, 1, 192, 128), 0.07, None)


@pytest.mark.parametrize("tokens", [5, 77, 300])
def test_documents_packed_in_a_row(path, tokens):
    compare(inputs(3, tokens, 2, 48, 32), 0.3, packed(tokens, 3, 100, 64))
    compare(inputs(2, tokens, 2, 7, 3), 0.3, packed(tokens, 13, 400))


def test_any_mask_and_other_numbers_of_keys(path):
    """Strips that see keys far apart, none, or all; a mask for every row, whose numbers lie apart."""
    for queries, keys in ((150, 40), (40, 700)):
        mask = torch.rand(2, queries, keys, generator=torch.Generator().manual_seed(1)) < 0.03
        mask[:, :, 3] = True
        mask[:, 32:64] = False
        mask[:, 32:64, 20] = True
        compare(inputs(2, queries, 2, 48, 32, keys), 0.3, mask)
        compare(inputs(2, queries, 2, 48, 32, keys), 0.3, mask[:1].mT.contiguous().mT.expand(2, -1, -1))


def test_one_token_sees_itself(path):
    query, key, value = given = inputs(2, 1, 3, 48, 32)
    out, d_query, d_key, _ = gradients(attention.attention, given, 0.3, None)
    assert torch.equal(out, value)
    exactly = torch.zeros_like(query)
    torch.testing.assert_close(d_query, exactly, rtol=0, atol=2**-6)  # what one rounding of the output leaves of zero
    torch.testing.assert_close(d_key, torch.zeros_like(key), rtol=0, atol=2**-6)


def test_a_query_that_sees_nothing_is_zero(path):
    given, mask = inputs(2, 70, 2, 16, 16), packed(70, 9, 70)
    mask[0, 20], mask[1, 32:64] = False, False
    wide = [x.detach().double().requires_grad_() for x in given]
    got = gradients(attention.attention, given, 0.3, mask)
    for x in got[:2]:
        assert not x[0, 20].any() and not x[1, 32:64].any() and x[0, 21].any()
    assert max(errors([got[0]], [exact(*wide, 0.3, mask)])) <= 0.01
    seen = mask.any(-1)
    kept = exact(*wide, 0.3, mask.logical_or(torch.eye(70, dtype=torch.bool)))
    direction = torch.randn(kept.shape, generator=torch.Generator().manual_seed(5)).bfloat16().double()
    wanted = torch.autograd.grad((kept * direction)[seen].sum(), wide)
    assert max(errors(got[1:], wanted)) <= 0.01


def test_large_scores(path):
    """Nearly all weight on few keys, sums far from where the first chunk began."""
    compare(inputs(1, 600, 2, 48, 32, size=4.0), 1.0, None, bound=1.5)


def test_no_number_stays_none(path):
    given = inputs(1, 40, 1, 16, 16)
    with torch.no_grad():
        given[1][0, 5] = float("nan")
    out = attention.attention(*given, 0.3, None)
    assert torch.isfinite(out[0, :5]).all() and out[0, 5:].isnan().all()


def test_gradients_by_finite_differences(path):
    """Of the float64 form, along random directions: the loss moves by what the compiled gradients say."""
    given = inputs(2, 45, 2, 48, 32)
    mask = packed(45, 20, 45)
    _, *grads = gradients(attention.attention, given, 0.3, mask)
    wide = [x.detach().double() for x in given]
    weights = torch.randn(2, 45, 2, 32, generator=torch.Generator().manual_seed(5)).bfloat16().double()
    for place, grad in enumerate(grads):
        step = torch.zeros_like(wide[place]).copy_(grad.double())
        ahead, behind = ([*wide[:place], wide[place] + d * step, *wide[place + 1 :]] for d in (1e-4, -1e-4))
        moved = ((exact(*ahead, 0.3, mask) - exact(*behind, 0.3, mask)) * weights).sum() / 2e-4
        torch.testing.assert_close(moved, (grad.double() * step).sum(), rtol=5e-3, atol=0)


def test_views_are_read_in_place(path):
    """Keys and values in one tensor as the model has them, heads before tokens, numbers apart; a gradient expanded."""
    whole = torch.randn(2, 40, 3, 80, generator=torch.Generator().manual_seed(3)).bfloat16()
    ways = {
        "split": lambda x: x,
        "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "numbers first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    }
    results = []
    for way in ways.values():
        key, value = way(whole).split((48, 32), dim=-1)
        leaves = [x.detach().requires_grad_() for x in (key + 1, key, value)]
        with torch.no_grad():
            views = [way(x).requires_grad_() if x.is_contiguous() else x for x in leaves]
        out = attention.attention(*views, 0.3, None)
        results.append([out, *torch.autograd.grad(out.sum(), views)])
    for others in results[1:]:
        for x, y in zip(results[0], others, strict=True):
            assert torch.equal(x, y)


def test_the_layout_that_neighbours_want(path):
    out, *grads = gradients(attention.attention, inputs(2, 40, 3, 48, 32), 0.3, None)
    assert all(x.is_contiguous() for x in (out, *grads))


def test_bits_do_not_depend_on_threads_or_other_rows(path):
    given, mask = inputs(3, 300, 5, 48, 32), packed(300, 50, 300, 7)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(gradients(attention.attention, given, 0.3, mask))
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], others, strict=True))
    alone = attention.attention(*(x[1:2] for x in given), 0.3, mask[1:2])
    assert torch.equal(alone[0], results[0][0][1])
    causal = attention.attention(*(x[1:2] for x in given), 0.3, None)
    assert torch.equal(causal, alone)


def test_nothing_in_nothing_out(path):
    for shape in ((0, 4, 2, 16, 16), (2, 0, 2, 16, 16)):
        results = gradients(attention.attention, inputs(*shape), 0.3, None)
        assert [x.numel() for x in results] == [0] * 4


def test_what_the_kernels_do_not_take(path, monkeypatch):
    """float32, float64 and scales that are not above zero go the plain way; autocast makes bfloat16 of float32."""
    taken = []
    plain = attention._Compiled.forward
    monkeypatch.setattr(attention._Compiled, "forward", lambda *given: (taken.append(1), plain(*given))[1])
    given = inputs(2, 20, 2, 16, 16)
    for dtype in (torch.float32, torch.float64):
        wide = [x.detach().to(dtype) for x in given]
        wanted = exact(*(x.double() for x in wide), 0.3, None)
        assert float((attention.attention(*wide, 0.3, None) - wanted).norm() / wanted.norm()) < 1e-5
    compare(given, -0.3, None)
    assert not taken
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention.attention(*(x.detach().float() for x in given), 0.3, None).dtype == torch.bfloat16
    assert len(taken) == 1
