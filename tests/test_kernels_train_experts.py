"""Routed experts in training, natively: against float64, beside plain torch, odd sizes and empty experts included."""

import pytest
import torch
from native_paths import native_paths
from torch import Tensor

from finback.kernels import dispatch, native, reference

PATHS = pytest.mark.parametrize("path", native_paths())
# Tokens, hidden, width, experts, chosen: many rows an expert, few, one token, no multiple of 16 or 32, and sums over
# more tokens than one stretch of 512 has.
SIZES = [(300, 64, 48, 4, 2), (37, 40, 24, 5, 3), (1, 10, 6, 3, 1), (5, 33, 17, 8, 2), (700, 32, 16, 1, 1)]


@pytest.fixture(autouse=True)
def _best_path_again():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    native.use(None)


def inputs(tokens: int, hidden: int, width: int, experts: int, chosen: int) -> tuple[list[Tensor], Tensor]:
    """x, gate and up, down, weights; and the choice, from which the last expert is left out where it can be."""
    torch.manual_seed(tokens + hidden)
    x = torch.randn(tokens, hidden).bfloat16()
    gate_up, down = (
        torch.randn(experts, 2 * width, hidden) / hidden**0.5,
        torch.randn(experts, hidden, width) / width**0.5,
    )
    choice = torch.rand(tokens, max(chosen, experts - 1)).topk(chosen).indices
    return [x, gate_up, down, torch.rand(tokens, chosen)], choice


def run(expert_ffn, values: list[Tensor], choice: Tensor, grad: Tensor) -> list[Tensor]:
    """The result, and the gradients of x, gate and up, down, weights."""
    leaves = [value.detach().clone().requires_grad_() for value in values]
    out = expert_ffn(*leaves[:3], choice, leaves[3])
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def in_bfloat16(*args: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return dispatch.expert_ffn(*args)


@PATHS
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_result_and_gradients(path, sizes):
    values, choice = inputs(*sizes)
    grad = torch.randn(sizes[:2], generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = run(reference.expert_ffn, [value.double() for value in values], choice, grad)
    both = []
    for way in ("torch", path):
        native.use(way)
        both.append(run(in_bfloat16, values, choice, grad))
    for ours, plain, truth, value in zip(both[1], both[0], exact, [values[0], *values], strict=True):
        assert ours.dtype == plain.dtype == value.dtype
        scale = truth.norm().clamp(min=1e-30)
        theirs = float((plain.double() - truth).norm() / scale)
        assert float((ours.double() - truth).norm() / scale) <= max(1.5 * theirs, 2**-8)


@PATHS
def test_the_native_form_runs_and_experts_without_tokens_have_no_gradient(path):
    values, choice = inputs(20, 32, 16, 4, 2)
    native.use(path)
    leaves = [value.requires_grad_() for value in values]
    out = in_bfloat16(*leaves[:3], choice, leaves[3])
    assert "Native" in type(out.grad_fn).__name__
    out.sum().backward()
    assert int(choice.max()) < 3 and not leaves[1].grad[3].any() and not leaves[2].grad[3].any()
    assert leaves[1].grad[0].any() and leaves[2].grad[0].any()


@PATHS
def test_bits_do_not_depend_on_threads(path):
    values, choice = inputs(1100, 48, 32, 4, 2)
    grad = torch.randn(1100, 48, generator=torch.Generator().manual_seed(1)).bfloat16()
    native.use(path)
    got = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        got.append(run(in_bfloat16, values, choice, grad))
    assert all(torch.equal(a, b) for other in got[1:] for a, b in zip(got[0], other, strict=True))


@PATHS
def test_inputs_that_lie_apart(path):
    """Slices of wider tensors, a choice by columns."""
    values, choice = inputs(50, 32, 16, 4, 2)
    grad = torch.randn(50, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    native.use(path)
    wanted = run(in_bfloat16, values, choice, grad)
    apart = [torch.cat((value, value), dim=-1)[..., : value.shape[-1]] for value in values]
    leaves = [value.requires_grad_() for value in apart]
    out = in_bfloat16(*leaves[:3], choice.T.contiguous().T, leaves[3])
    out.backward(torch.stack((grad, grad), dim=-1)[..., 0])
    for ours, other in zip([out.detach(), *(leaf.grad for leaf in leaves)], wanted, strict=True):
        assert torch.equal(ours, other)
