"""The mixture's feed-forward, grouped: tokens sorted by expert, one matrix product a group, its backward by hand.

The gradient of a token's weight comes from the activation's gradient, so that the outputs need not be kept.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from finback.kernels import native
from finback.kernels.linear import linear
from finback.kernels.precision import compute_dtype
from finback.kernels.reference import Product

_STEP = 128  # rows: at most 3 % more of them at 16,384 choices of 8 experts

_silu_backward = torch.ops.aten.silu_backward.default


def expert_ffn(x_ND: Tensor, gate_up: Tensor, down: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """As `reference.expert_ffn`."""
    dtype = compute_dtype(x_ND)
    if not torch.is_grad_enabled() and x_ND.device.type == "cpu":
        return expert_stream(x_ND, _product(gate_up), _product(down), len(gate_up), experts_NK, weights_NK)
    if dtype == torch.bfloat16 and native.training(x_ND, gate_up, down, weights_NK) is not None:
        return _NativeExpertFFN.apply(x_ND.to(dtype), gate_up, down, experts_NK, weights_NK)
    return _ExpertFFN.apply(x_ND.to(dtype), gate_up.to(dtype), down.to(dtype), experts_NK, weights_NK.to(dtype))


def _product(stack: Tensor) -> Product:
    return lambda x, expert: linear(x, stack[expert] if stack.dtype == x.dtype else stack[expert].to(x.dtype))


def expert_stream(
    x_ND: Tensor, gate_up: Product, down: Product, n_experts: int, experts_NK: Tensor, weights_NK: Tensor
) -> Tensor:
    """As `expert_ffn`, a product for every expert that was chosen: no stack need be in memory. Without gradients."""
    x_ND = x_ND.to(compute_dtype(x_ND))
    if len(x_ND) == 1:
        results = []
        for expert in experts_NK[0].tolist():
            gate, up = gate_up(x_ND, expert).chunk(2, dim=-1)
            results.append(down(F.silu(gate).mul_(up), expert))
        return weights_NK.to(x_ND.dtype) @ torch.cat(results)
    place, source, ends = _deal(experts_NK, n_experts)
    rows_MD = x_ND.index_select(0, source)
    active: Tensor | None = None
    result = torch.empty_like(rows_MD)
    for expert, (start, end) in enumerate(pairwise([0, *ends.tolist()])):
        if start == end:
            continue
        rows = slice(start, end)
        gate, up = gate_up(rows_MD[rows], expert).chunk(2, dim=-1)
        if active is None:  # one buffer for all: where its rows lie in memory changes the last bits of sums
            active = gate.new_empty(len(source), gate.shape[-1])
        part = torch.mul(F.silu(gate), up, out=active[rows])
        result[rows] = down(part, expert)
    weights_NK = weights_NK.to(result.dtype)
    return F.embedding_bag(place.view_as(experts_NK), result, per_sample_weights=weights_NK, mode="sum")


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


def _deal(experts_NK: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lay the choices out by expert: where each choice goes [N·K], whose token fills each row, each group's end.

    oneDNN prepares a product anew for every size it has not met, which cost as much as the products themselves; so
    groups of many rows are filled up to a multiple of _STEP. Those rows repeat token 0 and are never read.
    """
    choices = experts_NK.flatten()
    sizes = torch.bincount(choices, minlength=n_experts)
    order = choices.argsort(stable=True)
    token = order.div(experts_NK.shape[1], rounding_mode="floor")
    ends = sizes.cumsum(0)
    if len(choices) < _STEP * n_experts:
        return order.argsort(), token, ends.int()
    starts = ends - sizes
    filled = (sizes + _STEP - 1).div(_STEP, rounding_mode="floor") * _STEP
    ends = filled.cumsum(0)
    rank = torch.arange(len(choices), device=choices.device)
    row = rank + (ends - filled - starts).index_select(0, choices.index_select(0, order))
    place = torch.empty_like(order).scatter_(0, order, row)
    source = order.new_zeros(int(ends[-1])).scatter_(0, row, token)
    return place, source, ends.int()


class _ExpertFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, gate_up: Tensor, down: Tensor, experts_NK: Tensor, weights_NK: Tensor):
        place, source, ends = _deal(experts_NK, len(gate_up))
        hidden = _grouped(x_ND.index_select(0, source), gate_up.transpose(1, 2), ends)
        gate, up = hidden.chunk(2, dim=-1)
        silu = F.silu(gate)
        result = _grouped(silu * up, down.transpose(1, 2), ends)
        place_NK = place.view_as(experts_NK)
        ctx.save_for_backward(x_ND, gate_up, down, weights_NK, place_NK, source, ends, hidden, silu)
        return F.embedding_bag(place_NK, result, per_sample_weights=weights_NK, mode="sum")

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, gate_up, down, weights_NK, place_NK, source, ends, hidden, silu = ctx.saved_tensors
        grad = grad_ND.to(x_ND.dtype).index_select(0, source)
        # Rows that only fill up have weight 0, and with it no part in any gradient.
        weight = weights_NK.new_zeros(len(source)).scatter_(0, place_NK.flatten(), weights_NK.flatten()).unsqueeze(-1)
        gate, up = hidden.chunk(2, dim=-1)
        active = silu * up
        d_active = _grouped(grad, down, ends)
        d_weights = torch.linalg.vecdot(d_active, active).index_select(0, place_NK.flatten()).view_as(place_NK)
        d_active.mul_(weight)
        d_down = _grouped(grad.mul_(weight).T, active, ends)
        d_hidden = torch.empty_like(hidden)
        d_gate, d_up = d_hidden.chunk(2, dim=-1)
        torch.mul(d_active, silu, out=d_up)
        d_gate.copy_(_silu_backward(d_active.mul_(up), gate))
        d_gate_up = _grouped(d_hidden.T, x_ND.index_select(0, source), ends)
        dx = _grouped(d_hidden, gate_up, ends)
        return F.embedding_bag(place_NK, dx, mode="sum"), d_gate_up, d_down, None, d_weights


class _NativeExpertFFN(torch.autograd.Function):
    """The same in one native call each way: weights are laid into panels anew, their gradients are float32 sums."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, gate_up: Tensor, down: Tensor, experts_NK: Tensor, weights_NK: Tensor):
        ctx.dtypes, ctx.module = (gate_up.dtype, down.dtype, weights_NK.dtype), native.kernels()
        x_ND, experts_NK, weights_NK = x_ND.contiguous(), experts_NK.contiguous(), weights_NK.float().contiguous()
        # An expert's rows are filled up to a multiple of 32.
        hidden, out = x_ND.new_empty(experts_NK.numel() + 32 * len(down), gate_up.shape[1]), torch.empty_like(x_ND)
        inputs = (x_ND, gate_up, down, experts_NK, weights_NK)
        _native(ctx.module, *inputs).forward(hidden.data_ptr(), out.data_ptr(), torch.get_num_threads())
        ctx.save_for_backward(*inputs, hidden)
        return out

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, hidden = ctx.saved_tensors
        x_ND, gate_up, down, _, weights_NK = inputs
        grad_ND, dx = grad_ND.to(x_ND.dtype).contiguous(), torch.empty_like(x_ND)
        d_gate_up, d_down = torch.empty(gate_up.shape), torch.empty(down.shape)
        d_weights = torch.empty_like(weights_NK)
        to = (grad_ND, dx, d_gate_up, d_gate_up.chunk(2, dim=1)[1], d_down, d_weights)
        addresses = (hidden.data_ptr(), *(each.data_ptr() for each in to))
        _native(ctx.module, *inputs).backward(*addresses, torch.get_num_threads())
        grads = (x.to(dtype) for x, dtype in zip((d_gate_up, d_down, d_weights), ctx.dtypes, strict=True))
        return dx, next(grads), next(grads), None, next(grads)


def _native(module: Any, x_ND: Tensor, gate_up: Tensor, down: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Any:
    def stored(stack: Tensor) -> Any:
        assert stack.stride(-1) == 1
        wide = stack.dtype == torch.float32
        return module.Stored(stack.data_ptr(), stack.shape[1], stack.shape[2], stack.stride(1), wide)

    gate, up = gate_up.chunk(2, dim=1)
    sizes = (*x_ND.shape, gate.shape[1], len(gate), experts_NK.shape[1])
    where = (x_ND.data_ptr(), experts_NK.data_ptr(), weights_NK.data_ptr())
    return module.TrainExperts(*sizes, *where, *map(stored, (gate, up, down)), gate_up.stride(0), down.stride(0))
