"""Every fast version against its specification, forward and backward, and gradients against finite differences."""

import pytest
import torch
from torch.autograd import gradcheck

from finback.kernels import attention, dispatch, reference, rotary, tiles


@pytest.fixture(autouse=True, params=[None, 8], ids=["", "cut"])
def small_tiles(request, monkeypatch):
    """Everything once as it is, and once cut into parts far smaller than these inputs."""
    if request.param:
        monkeypatch.setattr(tiles, "_NUMBERS", request.param)
        monkeypatch.setattr(rotary, "_SMALL", request.param)
        monkeypatch.setattr(attention, "_SCORES", 2 * 3 * attention.BLOCK * 300)


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def agree(fast, plain, inputs: list[torch.Tensor], *rest, tolerance: float = 1e-9) -> None:
    """Same value and same gradients for a random weighting of the output."""
    a, b = fast(*inputs, *rest), plain(*inputs, *rest)
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    direction = torch.randn(a.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(a.dtype)
    for x, y in zip(
        torch.autograd.grad((a * direction).sum(), inputs),
        torch.autograd.grad((b * direction).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def plain_norm(x, weight, eps):
    """In float64; the reference computes in fp32 by definition."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def plain_attention(query, key, value, scale, mask):
    if mask is None:
        mask = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).tril().unsqueeze(0)
    scores = torch.einsum("bthd,bshd->bhts", query, key) * scale
    weights = scores.masked_fill(~mask.unsqueeze(1), float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshe->bthe", weights, value)


def test_rms_norm_value_and_gradient():
    agree(dispatch.rms_norm, plain_norm, [random(3, 5, 8), random(8)], 1e-6)
    assert gradcheck(lambda x, w: dispatch.rms_norm(x, w, 1e-6), [random(2, 8), random(8)])


@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("before", [0, 5, 8])
def test_rotation_value_and_gradient(heads: int | None, before: int):
    """A slice of wider rows, as the model has it; odd widths before it put the pairs on odd places."""
    shape = (2, 5) if heads is None else (2, 5, heads)
    angles = torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    turn = torch.polar(torch.full_like(angles, 1.1), angles).reshape(2, 5, *[1] * (len(shape) - 2), 4)
    whole = random(*shape, before + 8)
    kept = whole.detach().clone()

    def plain(x):
        even, odd = x[..., before:].unflatten(-1, (-1, 2)).unbind(-1)
        pairs = (even * turn.real - odd * turn.imag, even * turn.imag + odd * turn.real)
        return torch.stack(pairs, -1).flatten(-2)

    agree(lambda x: dispatch.rotate(x[..., before:], turn), plain, [whole])
    assert torch.equal(whole, kept)
    halves = [whole.detach()[..., :8].to(torch.bfloat16).requires_grad_()]
    agree(
        dispatch.rotate, reference.rotate, halves, turn.to(torch.complex64), tolerance=torch.finfo(torch.bfloat16).eps
    )


def test_rotation_of_a_tensor_in_another_order_of_memory():
    x = random(4, 3, 2, 8).detach()
    turn = torch.polar(torch.ones(4, 3, 1, 4, dtype=torch.float64), torch.rand(4, 3, 1, 4, dtype=torch.float64))
    other = x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    assert torch.equal(dispatch.rotate(other, turn), dispatch.rotate(x, turn))


@pytest.mark.parametrize("tokens", [1, 7, 256, 300])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_value_and_gradient(tokens: int, masked: bool):
    """Odd lengths, more than one block, value heads narrower than key heads, documents that do not mix."""
    inputs = [random(5, tokens, 3, 6), random(5, tokens, 3, 6), random(5, tokens, 3, 4)]
    mask = None
    if masked:
        lengths = torch.tensor([[3], [100], [7], [400], [64]])
        document = torch.arange(tokens) // lengths
        mask = (document[:, :, None] == document[:, None]).tril()
    agree(dispatch.attention, plain_attention, inputs, 0.3, mask)


def test_attention_gradient_by_finite_differences():
    inputs = [random(1, 3, 2, 4), random(1, 3, 2, 4), random(1, 3, 2, 3)]
    assert gradcheck(lambda q, k, v: dispatch.attention(q, k, v, 0.5, None), inputs)


def test_attention_equals_the_reference_in_float32():
    inputs = [random(2, 40, 3, n, dtype=torch.float32, seed=n) for n in (6, 6, 4)]
    agree(dispatch.attention, reference.attention, inputs, 0.3, None, tolerance=1e-5)


@pytest.mark.parametrize("tokens", [1, 5, 64, 500])
def test_experts_value_and_gradient(tokens: int):
    """Empty experts included: only four of the nine are ever chosen. From 384 tokens on groups are filled up."""
    seeds = [torch.Generator().manual_seed(i) for i in range(tokens)]
    experts = torch.stack([torch.randperm(4, generator=seed)[:3] * 2 for seed in seeds])
    inputs = [random(tokens, 6), random(9, 8, 6), random(9, 6, 4)]
    weights = random(tokens, 3)

    def run(kernel):
        return lambda x, gate_up, down, w: kernel(x, gate_up, down, experts, w)

    agree(run(dispatch.expert_ffn), run(reference.expert_ffn), [*inputs, weights])
    if tokens == 5:
        assert gradcheck(run(dispatch.expert_ffn), [*inputs, weights])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [12, 16])
def test_experts_in_less_than_float64(width: int, dtype: torch.dtype):
    """The grouped product of torch itself, and our loop for widths it does not take, beside the exact result."""
    experts = torch.randint(0, 4, (50, 2), generator=torch.Generator().manual_seed(0))
    inputs = [random(*shape, dtype=dtype) for shape in ((50, 16), (4, 2 * width, 16), (4, 16, width), (50, 2))]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    outs = [
        kernel(*x[:3], experts, x[3]) for kernel, x in ((dispatch.expert_ffn, inputs), (reference.expert_ffn, exact))
    ]
    grads = [torch.autograd.grad(out.square().sum(), x) for out, x in zip(outs, (inputs, exact), strict=True)]
    for ours, wanted in zip((outs[0], *grads[0]), (outs[1], *grads[1]), strict=True):
        assert ours.dtype == dtype
        error = (ours.double() - wanted).abs().max() / wanted.abs().max()
        assert error <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_cross_entropy_value_and_gradient(chunk: int):
    targets = torch.tensor([3, reference.IGNORED, 0, 6, 6, reference.IGNORED, 1])
    inputs = [random(7, 5), random(8, 5)]

    def plain(h, w):
        return -(h @ w.T).log_softmax(-1)[targets >= 0].gather(1, targets[targets >= 0, None]).sum()

    agree(lambda h, w: dispatch.cross_entropy(h, w, targets, chunk), plain, inputs)
    assert gradcheck(lambda h, w: dispatch.cross_entropy(h, w, targets, chunk), inputs)


def test_cross_entropy_of_nothing_is_zero():
    targets = torch.full((4,), reference.IGNORED)
    assert dispatch.cross_entropy(random(4, 5), random(8, 5), targets).item() == 0.0


def test_cross_entropy_of_a_hopeless_target_is_finite():
    """softmax underflows to 0 there; the loss is the distance of the logits."""
    hidden, weight = torch.tensor([[300.0, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    for target, loss in ((0, 0.0), (1, 600.0), (2, 300.0)):
        assert dispatch.cross_entropy(hidden, weight, torch.tensor([target])).item() == loss
