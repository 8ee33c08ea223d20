"""The mixture's feed-forward, grouped: tokens sorted by expert, one matrix product a group, its backward by hand.

The backward keeps the sorted products' inputs only; the activation is recomputed, and the gradient of a token's weight
comes from the activation's gradient, so that no second pass over the outputs is needed.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from finback.kernels.precision import compute_dtype


def expert_ffn(x_ND: Tensor, gate_up: Tensor, down: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """As `reference.expert_ffn`."""
    dtype = compute_dtype(x_ND)
    return _ExpertFFN.apply(x_ND.to(dtype), gate_up.to(dtype), down.to(dtype), experts_NK, weights_NK.to(dtype))


def _grouped(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """One product per group. [M, x] x [E, x, y] gives [M, y]; [x, M] x [M, y] gives [E, x, y]."""
    if a.dtype in (torch.bfloat16, torch.float32) and _aligned(a) and _aligned(b):
        return torch._grouped_mm(a, b, ends)
    bounds = [0, *ends.tolist()]  # odd widths, and float64 for finite differences
    spans = [slice(s, e) for s, e in pairwise(bounds)]
    if b.dim() == 3:
        return torch.cat([a[span] @ b[e] for e, span in enumerate(spans)])
    return torch.stack([a[:, span] @ b[span] for span in spans])


def _aligned(x: Tensor) -> bool:
    """torch's grouped product wants every row to start on 16 bytes."""
    return all(stride == 1 or stride * x.element_size() % 16 == 0 for stride in x.stride())


class _ExpertFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, gate_up: Tensor, down: Tensor, experts_NK: Tensor, weights_NK: Tensor):
        chosen = experts_NK.shape[1]
        order = experts_NK.flatten().argsort(stable=True)
        ends = torch.bincount(experts_NK.flatten(), minlength=len(gate_up)).cumsum(0).int()
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        tokens = order // chosen
        hidden = _grouped(x_ND.index_select(0, tokens), gate_up.transpose(1, 2), ends)
        gate, up = hidden.chunk(2, dim=-1)
        result = _grouped(F.silu(gate).mul_(up), down.transpose(1, 2), ends)
        out_ND = torch.bmm(weights_NK.unsqueeze(1), result.index_select(0, place).unflatten(0, (-1, chosen))).squeeze(1)
        ctx.save_for_backward(x_ND, gate_up, down, weights_NK, order, ends, place, hidden)
        return out_ND

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, gate_up, down, weights_NK, order, ends, place, hidden = ctx.saved_tensors
        chosen = weights_NK.shape[1]
        tokens = order // chosen
        grad = grad_ND.to(x_ND.dtype).index_select(0, tokens)
        weight = weights_NK.flatten()[order].unsqueeze(-1)
        gate, up = hidden.chunk(2, dim=-1)
        silu = F.silu(gate)
        active = silu * up
        d_active = _grouped(grad, down, ends)
        d_weights = torch.linalg.vecdot(d_active, active)[place].view_as(weights_NK)
        d_active.mul_(weight)
        d_down = _grouped(grad.mul_(weight).T, active, ends)
        d_hidden = torch.empty_like(hidden)
        d_gate, d_up = d_hidden.chunk(2, dim=-1)
        torch.mul(d_active, silu, out=d_up)
        d_gate.copy_(torch.ops.aten.silu_backward(d_active.mul_(up), gate))
        d_gate_up = _grouped(d_hidden.T, x_ND.index_select(0, tokens), ends)
        dx_ND = _grouped(d_hidden, gate_up, ends).index_select(0, place).unflatten(0, (-1, chosen)).sum(1)
        return dx_ND, d_gate_up, d_down, None, d_weights
