"""Products of training by native kernels, with their gradients: bfloat16 rows, weights of any width, float32 sums.

Weights are brought into panels anew in every call (they change with every step); their gradients are float32 sums over
tokens, in one order however many threads there are. Source of the layout: kernels/panels.py, docs/kernels.md.
"""

from typing import Any

import torch
from torch import Tensor

from finback.kernels import native
from finback.kernels.precision import compute_dtype

_GROUP = 32  # an expert's rows are filled up to a multiple of it: STEP of kernels/cpu/common.h


def takes(x: Tensor, *weights: Tensor) -> bool:
    """Whether a product with gradients is made here: in bfloat16, on the CPU, with native kernels."""
    kinds = (torch.bfloat16, torch.float32)
    if not torch.is_grad_enabled() or x.device.type != "cpu" or compute_dtype(x) != torch.bfloat16:
        return False
    return all(weight.dtype in kinds for weight in (x, *weights)) and x.numel() > 0 and native.kernels() is not None


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] times weight [out, in]ᵀ, bfloat16."""
    return _Linear.apply(x.to(torch.bfloat16), weight)


def gated_ffn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate x) · up x) of x [..., D], gate and up [F, D], down [D, F]; bfloat16."""
    return _GatedFFN.apply(x.to(torch.bfloat16), gate, up, down, None, None)


def expert_ffn(x_ND: Tensor, gate_up: Tensor, down: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """As `reference.expert_ffn`, bfloat16."""
    gate, up = gate_up.chunk(2, dim=1)
    return _GatedFFN.apply(x_ND.to(torch.bfloat16), gate, up, down, experts_NK, weights_NK)


def product(x_NK: Tensor, weight_MK: Tensor) -> Tensor:
    """x times a matrix, transposed: [N, M] bfloat16, without gradients."""
    x_NK = x_NK.contiguous()
    out = x_NK.new_empty(len(x_NK), len(weight_MK))
    _module().train_linear(_matrix(weight_MK), x_NK.data_ptr(), len(x_NK), out.data_ptr(), torch.get_num_threads())
    return out


def product_backward(
    grad_NM: Tensor, x_NK: Tensor, weight_MK: Tensor, dx_NK: Tensor | None, d_weight_MK: Tensor, more: bool
) -> None:
    """Of `product`: dx = grad W, and d_weight (float32) = gradᵀ x, or `more`: added to what it holds."""
    assert grad_NM.is_contiguous() and x_NK.is_contiguous() and d_weight_MK.dtype == torch.float32
    _module().train_linear_backward(
        *(_matrix(weight_MK), x_NK.data_ptr(), len(x_NK), grad_NM.data_ptr()),
        *(0 if dx_NK is None else dx_NK.data_ptr(), d_weight_MK.data_ptr(), more, torch.get_num_threads()),
    )


def _module() -> Any:
    module = native.kernels()
    assert module is not None
    return module


def _matrix(weight: Tensor) -> Any:
    """The last two dimensions of a weight, of its first expert, as kernels take it."""
    assert weight.stride(-1) == 1 and weight.dtype in (torch.bfloat16, torch.float32)
    wide = weight.dtype == torch.float32
    return _module().Stored(weight.data_ptr(), weight.shape[-2], weight.shape[-1], weight.stride(-2), wide)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors
        dx = torch.empty(x.shape, dtype=x.dtype) if ctx.needs_input_grad[0] else None
        d_weight = torch.empty(weight.shape)
        grad_NM, x_NK = grad.to(x.dtype).flatten(0, -2).contiguous(), x.flatten(0, -2).contiguous()
        product_backward(grad_NM, x_NK, weight, dx, d_weight, False)
        return dx, d_weight.to(weight.dtype)


class _GatedFFN(torch.autograd.Function):
    """One expert that sees all tokens, or a stack of which each token has chosen some."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, experts: Tensor | None, weights: Tensor | None
    ) -> Tensor:
        x = x.contiguous()
        rows = x.numel() // x.shape[-1]
        if experts is not None and weights is not None:
            experts = experts.contiguous()
            ctx.weight_dtype, weights = weights.dtype, weights.float().contiguous()
            rows = experts.numel() + len(gate) * _GROUP
        rows = -(-rows // _GROUP) * _GROUP
        hidden, out = x.new_empty(rows, 2 * gate.shape[-2]), torch.empty_like(x)
        call = _call(x, gate, up, down, experts, weights)
        call.forward(hidden.data_ptr(), out.data_ptr(), torch.get_num_threads())
        ctx.save_for_backward(x, gate, up, down, experts, weights, hidden)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, hidden = ctx.saved_tensors
        x, gate, _, down, experts, weights = inputs
        grad, dx = grad.to(x.dtype).contiguous(), torch.empty_like(x)
        if experts is None:
            d_gate, d_up = torch.empty(gate.shape), torch.empty(gate.shape)
        else:  # as they lie: below each other in one stack
            d_gate, d_up = torch.empty(len(gate), 2 * gate.shape[1], gate.shape[2]).chunk(2, dim=1)
        d_down = torch.empty(down.shape)
        d_weights = None if weights is None else torch.empty_like(weights)
        to = (dx, d_gate, d_up, d_down)
        _call(*inputs).backward(
            *(hidden.data_ptr(), grad.data_ptr(), *(each.data_ptr() for each in to)),
            *(0 if d_weights is None else d_weights.data_ptr(), torch.get_num_threads()),
        )
        d_gate, d_up, d_down = (each.to(gate.dtype) for each in to[1:])
        return dx, d_gate, d_up, d_down, None, None if d_weights is None else d_weights.to(ctx.weight_dtype)


def _call(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, experts: Tensor | None, weights: Tensor | None) -> Any:
    if experts is None or weights is None:
        count, chosen, next_gate, next_down, where = 1, 1, 0, 0, (0, 0)
    else:
        count, chosen, next_gate, next_down = len(gate), experts.shape[1], gate.stride(0), down.stride(0)
        where = experts.data_ptr(), weights.data_ptr()
    sizes = (x.numel() // x.shape[-1], x.shape[-1], gate.shape[-2], count, chosen)
    return _module().TrainExperts(*sizes, x.data_ptr(), *where, *map(_matrix, (gate, up, down)), next_gate, next_down)
