"""What training does row by row, natively: against plain torch, both beside the same in float64, and gradients."""

import math

import pytest
import torch
from native_paths import native_paths

from finback.kernels import dispatch, native, reference

PATHS = pytest.mark.parametrize("path", native_paths())
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
WIDTHS = (1, 16, 31, 80, 256)
SIZES = [(rows, width) for rows in (1, 37, 200) for width in WIDTHS] + [(0, 16), (8300, 24)]
EXACT = 1e-5  # of float32
EPS = 0.05  # so large that no gradient of a single number is a difference of nearly equal ones
NARROW = 2**-8  # of bfloat16, as far as a number is rounded; less than that is not told apart


@pytest.fixture(autouse=True)
def _best_path_again():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    native.use(None)


def random(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def strided(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    """The same as a slice of wider rows that begin on an odd place."""
    wider = random(*shape[:-1], shape[-1] + 7, dtype=dtype, seed=seed).detach()
    return wider[..., 3 : 3 + shape[-1]].requires_grad_()


def results(op, inputs, name: str | None = None) -> list[torch.Tensor]:
    """All outputs, and the gradients of all inputs for a random weighting of them."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outs = op(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    if name is not None:  # it is the native form that runs
        assert all(name in type(out.grad_fn).__name__ for out in outs), [out.grad_fn for out in outs]
    total = torch.zeros((), dtype=torch.float64)
    for seed, out in enumerate(outs):
        total = total + (out.double() * random(*out.shape, seed=100 + seed).detach()).sum()
    return [*(out.detach() for out in outs), *torch.autograd.grad(total, inputs, materialize_grads=True)]


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    assert got.shape == exact.shape and torch.isfinite(got).all()
    return float((got.double() - exact).norm() / exact.norm().clamp(min=1e-30))


def check(path: str, op, inputs, name: str, autocast: bool = False) -> None:
    """Native within EXACT of float64 where all is float32; else at most 1.5 times plain torch's error."""
    exact = results(op, [x.detach().double() for x in inputs])
    both = []
    for way, wanted in (("torch", None), (path, name)):
        native.use(way)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            both.append(results(op, inputs, wanted))
    for plain, ours, truth in zip(*both, exact, strict=True):
        assert ours.dtype == plain.dtype
        narrow = autocast or any(x.dtype == torch.bfloat16 for x in inputs)
        assert error(ours, truth) <= (max(1.5 * error(plain, truth), NARROW) if narrow else EXACT)


@PATHS
@DTYPES
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_norm(path, dtype, autocast):
    for rows, width in SIZES:
        for make in (random, strided):
            inputs = [make(rows, width, dtype=dtype), random(width, seed=1)]
            check(path, lambda x, w: dispatch.rms_norm(x, w, EPS), inputs, "NativeNorm", autocast)
            check(path, lambda x, w: dispatch.add_norm(x, None, w, EPS), inputs, "NativeNorm", autocast)


@PATHS
@DTYPES
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_norm_of_a_sum(path, dtype, autocast):
    added_dtype = torch.bfloat16 if autocast else dtype
    for rows, width in SIZES:
        for make in (random, strided):
            inputs = [make(rows, width, dtype=dtype), make(rows, width, dtype=added_dtype, seed=1), random(width)]
            check(path, lambda x, y, w: dispatch.add_norm(x, y, w, EPS), inputs, "NativeNorm", autocast)


@PATHS
@pytest.mark.parametrize("used", [0, 1])
def test_norm_of_a_sum_of_which_one_is_used(path, used):
    x, added, weight = random(9, 20), random(9, 20, seed=1), random(20)
    check(path, lambda *all: dispatch.add_norm(*all, EPS)[used], [x, added, weight], "NativeNorm" if used else "")


@PATHS
def test_norm_in_three_dimensions_with_other_gradients(path):
    """Gradients as they come: expanded from one number, or in another order of memory."""
    native.use(path)
    x, weight = random(3, 5, 24), random(24)
    for order in (lambda y: y.sum(), lambda y: (y.permute(2, 0, 1) * random(24, 3, 5)).sum()):
        got = torch.autograd.grad(order(dispatch.rms_norm(x, weight, 1e-6)), (x, weight))
        wanted = torch.autograd.grad(order(reference.rms_norm(x, weight, 1e-6)), (x, weight))
        for ours, plain in zip(got, wanted, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


@PATHS
def test_norm_of_large_and_small_numbers(path):
    native.use(path)
    for size in (1e-12, 1e-3, 1e15):
        x = (random(4, 40).detach() * size).requires_grad_()
        inputs = [x, random(40, seed=1)]
        check(path, lambda x, w: dispatch.rms_norm(x, w, 1e-6), inputs, "NativeNorm")


@PATHS
@DTYPES
def test_swiglu(path, dtype):
    for rows, width in SIZES:
        for make in (random, strided):
            inputs = [3 * make(rows, width, dtype=dtype).detach(), make(rows, width, dtype=dtype, seed=1)]
            check(path, dispatch.swiglu, inputs, "Swiglu")
    whole = random(3, 20, 62, dtype=dtype)
    check(path, lambda x: dispatch.swiglu(*x.chunk(2, dim=-1)), [whole], "Swiglu")


@PATHS
def test_swiglu_of_any_size_of_number(path):
    native.use(path)
    gate = torch.tensor([-1e30, -200.0, -88.0, -1.0, 0.0, 1.0, 88.0, 200.0, 1e30]).requires_grad_()
    out = dispatch.swiglu(gate, torch.ones(9))
    (slope,) = torch.autograd.grad(out.sum(), gate)
    torch.testing.assert_close(out, torch.nn.functional.silu(gate), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(slope[[1, 2, 4, 6, 7]], torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))
    bad = dispatch.swiglu(torch.tensor([float("nan"), 1.0]), torch.ones(2))
    assert bad.isnan().tolist() == [True, False]


@PATHS
@DTYPES
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (5, 16), (130, 50), (300, 192)])
def test_swiglu_backward_with_a_weight_for_every_row(path, dtype, rows, width):
    """As experts want it: gate and up in one matrix, a row of weight 0 in no gradient."""
    native.use(path)
    module, weight = native.kernels(), random(rows, seed=2).detach()
    assert module is not None
    weight[::3] = 0
    hidden, grad = random(rows, 2 * width, dtype=dtype).detach(), random(rows, width, dtype=dtype, seed=1).detach()
    active, d_hidden = torch.empty_like(grad), torch.empty_like(hidden)
    d_weight, up_bytes = torch.empty(rows), width * hidden.element_size()
    halves = [(x.data_ptr(), 2 * width, x.data_ptr() + up_bytes, 2 * width) for x in (hidden, d_hidden)]
    parts = (*halves[0], grad.data_ptr(), width, *halves[1], weight.data_ptr(), active.data_ptr(), d_weight.data_ptr())
    module.swiglu_backward(rows, width, dtype == torch.float32, *parts, 2)
    exact, scale = hidden.double().requires_grad_(), weight.double().requires_grad_()
    product = reference.swiglu(*exact.chunk(2, dim=-1)) * scale.unsqueeze(-1)
    wanted = (product, *torch.autograd.grad((product * grad.double()).sum(), (exact, scale)))
    for ours, truth in zip((active, d_hidden, d_weight), wanted, strict=True):
        assert error(ours, truth.detach()) <= (EXACT if ours.dtype == torch.float32 else NARROW)


@PATHS
@DTYPES
@pytest.mark.parametrize("experts", [1, 8, 19])
def test_scores(path, dtype, experts):
    for rows, width in ((0, 8), (1, 1), (37, 31), (200, 80), (8300, 24)):
        for make in (random, strided):
            inputs = [make(rows, width, dtype=dtype), random(experts, width, seed=1)]
            check(path, dispatch.scores, inputs, "Scores", autocast=dtype == torch.bfloat16)


def turns(batch: int, tokens: int, pairs: int) -> torch.Tensor:
    angles = 6 * torch.rand(batch, tokens, pairs, generator=torch.Generator().manual_seed(1))
    return torch.polar(torch.full_like(angles, 1.1), angles)


@PATHS
@DTYPES
@pytest.mark.parametrize("before", [0, 5, 32])
def test_rotation(path, dtype, before):
    for batch, tokens, pairs in ((2, 5, 8), (1, 1, 1), (2, 70, 5), (3, 9, 19), (2, 0, 4)):
        turn = turns(batch, tokens, pairs)
        for make in (random, strided):
            for heads in ((), (1,), (3,)):
                by = turn.unsqueeze(2) if heads else turn
                x = make(batch, tokens, *heads, before + 2 * pairs, dtype=dtype)
                check(path, lambda x, by=by: dispatch.rotate(x, by), [x], "NativeRotate")


@PATHS
def test_rotation_copies_bits(path):
    """What is not turned stays as it is, subnormal numbers and all; and turns that all rows share are torch's."""
    native.use(path)
    bits = torch.arange(2 * 3 * 2 * 24, dtype=torch.int16).view(2, 3, 2, 24).view(torch.bfloat16)
    turned = dispatch.rotate(bits.clone().requires_grad_(), turns(2, 3, 2).unsqueeze(2))
    assert torch.equal(turned[..., :20].view(torch.int16), bits[..., :20].view(torch.int16))
    assert "Native" not in type(dispatch.rotate(random(2, 3, 4), turns(1, 3, 2)).grad_fn).__name__


@PATHS
@DTYPES
def test_keys_and_values(path, dtype):
    for batch, tokens, heads, own, shared, value in ((2, 5, 3, 32, 16, 32), (1, 1, 1, 7, 2, 5), (2, 70, 4, 17, 6, 33)):
        for make in (random, strided):
            inputs = [make(batch, tokens, heads, own + value, dtype=dtype), make(batch, tokens, shared, dtype=dtype)]
            check(path, lambda x, k, own=own: dispatch.keys_values(x, k, own), inputs, "KeysValues")


def loss(hidden, weight, targets):
    return dispatch.cross_entropy(hidden, weight, targets, chunk=150)


@PATHS
@DTYPES
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (1, 50), (37, 16), (300, 515), (5, 4096), (0, 9)])
def test_cross_entropy(path, dtype, rows, vocabulary):
    targets = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(0))
    targets[::5] = reference.IGNORED
    inputs = [random(rows, 8, dtype=dtype), random(vocabulary, 8, dtype=dtype, seed=1)]
    check(path, lambda h, w: loss(h, w, targets), inputs, "CrossEntropy")


@PATHS
@DTYPES
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (3, 16), (70, 515)])
def test_logits_become_their_gradient(path, dtype, rows, vocabulary):
    native.use(path)
    logits = 10 * random(rows, vocabulary).detach()
    logits = logits.to(dtype) - 3  # none of them 0: what is past the end must not pass for one
    targets = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(0))
    exact = logits.double().requires_grad_()
    value = torch.nn.functional.cross_entropy(exact, targets, reduction="sum")
    (wanted,) = torch.autograd.grad(value, exact)
    module = native.kernels()
    assert module is not None
    got = module.loss_to_gradient(*logits.shape, dtype == torch.float32, logits.data_ptr(), targets.data_ptr(), 2)
    assert abs(got - value.item()) <= 1e-6 * max(1.0, value.item())
    assert (logits.double() - wanted).norm() <= (1e-6 if dtype == torch.float32 else 2**-8) * max(1, wanted.norm())


@PATHS
def test_cross_entropy_of_hopeless_targets_and_of_nan(path):
    native.use(path)
    hidden, weight = torch.tensor([[300.0, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    for target, value in ((0, 0.0), (1, 600.0), (2, 300.0)):
        assert dispatch.cross_entropy(hidden, weight, torch.tensor([target])).item() == value
    for bad in (float("nan"), float("inf")):
        assert dispatch.cross_entropy(torch.full((1, 2), bad), weight, torch.tensor([0])).isnan()
    for place in range(40):  # a single one, wherever it stands
        logits, target = torch.zeros(1, 40), torch.tensor([(place + 1) % 40])
        logits[0, place] = float("nan")
        module = native.kernels()
        assert module is not None
        assert math.isnan(module.loss_to_gradient(1, 40, True, logits.data_ptr(), target.data_ptr(), 1))
        assert logits[0, :place].isnan().all() and logits[0, place:].isnan().all()
    with pytest.raises(AssertionError, match="outside the vocabulary"):
        dispatch.cross_entropy(hidden, weight, torch.tensor([3]))


@PATHS
def test_bits_do_not_depend_on_threads(path):
    native.use(path)
    targets = torch.randint(0, 40, (9000,), generator=torch.Generator().manual_seed(0))
    everything = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        norm = results(
            lambda x, y, w: dispatch.add_norm(x, y, w, 1e-6), [random(9000, 24), random(9000, 24), random(24)]
        )
        hidden, weight = random(9000, 8), random(40, 8)
        logits = (hidden @ weight.T).detach() if not everything else everything[0][1].clone()
        before = logits.clone()
        module = native.kernels()
        assert module is not None
        value = module.loss_to_gradient(*logits.shape, True, logits.data_ptr(), targets.data_ptr(), threads)
        everything.append(([*norm, logits, torch.tensor(value)], before))
    for others, _ in everything[1:]:
        assert all(torch.equal(a, b) for a, b in zip(everything[0][0], others, strict=True))


def test_other_tensors_take_plain_torch():
    """float64, no gradients, and where no kernels are."""
    gate, weight = random(2, 8), random(8)
    assert "Swiglu" not in type(dispatch.swiglu(gate.double(), gate.double()).grad_fn).__name__
    with torch.no_grad():
        assert torch.equal(dispatch.swiglu(gate, gate), reference.swiglu(gate, gate))
    native.use("torch")
    for out in (dispatch.swiglu(gate, gate), dispatch.rms_norm(gate, weight, 1e-6)):
        assert "Native" not in type(out.grad_fn).__name__ and "Swiglu" not in type(out.grad_fn).__name__
