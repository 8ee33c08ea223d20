"""Grouped experts against the naive loop over tokens, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

from finback.model.linear import Experts


def experts(count: int = 5, hidden: int = 8, width: int = 4, seed: int = 0) -> Experts:
    made, generator = Experts(count, hidden, width).double(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return made


def naive(made: Experts, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """Σ_k w_k · down_e(silu(gate_e x) · up_e x), a token and a choice at a time; gate rows come first in the stack."""
    gate_up, down, out = made.gate_up.dense(), made.down.dense(), []
    width = down.shape[2]
    for x, chosen, weights in zip(x_ND, experts_NK.tolist(), weights_NK, strict=True):
        parts = []
        for e, weight in zip(chosen, weights, strict=True):
            gate, up = gate_up[e, :width] @ x, gate_up[e, width:] @ x
            parts.append(weight * (down[e] @ (F.silu(gate) * up)))
        out.append(sum(parts))
    return torch.stack(out)


def draw(n: int, count: int, k: int, seed: int, hidden: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, hidden, generator=generator, dtype=torch.float64, requires_grad=True)
    chosen = torch.stack([torch.randperm(count, generator=generator)[:k] for _ in range(n)])
    weights = torch.rand(n, k, generator=generator, dtype=torch.float64, requires_grad=True)
    return x, chosen, weights


@settings(max_examples=40)
@given(st.integers(1, 12), st.integers(1, 6), st.data())
def test_grouped_equals_naive_forward_and_backward(n, count, data):
    """Few tokens and many experts leave some empty; one token; one expert."""
    k, seed = data.draw(st.integers(1, count)), data.draw(st.integers(0, 10**6))
    made = experts(count)
    x, chosen, weights = draw(n, count, k, seed)
    direction = torch.randn(n, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    gradients = []
    for form in (made, lambda *a: naive(made, *a)):
        out = form(x, chosen, weights)
        wanted = [x, weights, made.gate_up.dense(), made.down.dense()]
        gradients.append([out.detach(), *torch.autograd.grad((out * direction).sum(), wanted)])
    for grouped, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(grouped, plain, rtol=1e-9, atol=1e-9)


def test_gradient_equals_finite_differences():
    made = experts(3, 4, 4)
    x, chosen, weights = draw(4, 3, 2, seed=1, hidden=4)
    chosen = torch.where(chosen == 1, 2, chosen)  # expert 1 is empty
    chosen[:, 1] = torch.where(chosen[:, 0] == 0, 2, 0)
    assert gradcheck(lambda x, w, *_: made(x, chosen, w), (x, weights, *made.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_follow(dtype):
    made = experts()
    x, chosen, weights = draw(9, 5, 2, seed=2)
    exact = naive(made, x, chosen, weights)
    low = made.to(dtype)(x.to(dtype), chosen, weights.to(dtype))
    assert low.dtype == dtype
    error = (low.double() - exact).norm() / exact.norm()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)


def test_no_token_at_all():
    made = experts()
    out = made(torch.zeros(0, 8, dtype=torch.float64), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2).double())
    assert out.shape == (0, 8)
