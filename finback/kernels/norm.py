"""RMSNorm; its backward is LayerNorm's around the mean 0, which torch has as one kernel, without the mean it takes off.

Natively both are one pass over memory, and so is a residual's addition with them.
LayerNorm: dx = (g·w - mean(g·w) - n · mean(n·g·w)) / rms, with n = x / rms once its mean is said to be 0.
"""

from typing import Any

import torch
from torch import Tensor

from finback.kernels import native
from finback.kernels.precision import compute_dtype, wide
from finback.kernels.tiles import tiles

_layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference.rms_norm`; under autocast the result is already in the dtype the next product wants."""
    dtype = compute_dtype(x)
    if not torch.is_grad_enabled():
        if x.numel() == x.shape[-1] and x.device.type == "cpu":
            return _one_row(x, weight, eps).to(dtype)
        return _normed(x, weight, eps)[0].to(dtype)
    if native.training(x) is not None and dtype in (torch.float32, torch.bfloat16) and weight.device == x.device:
        return _NativeNorm.apply(x, None, weight, eps, dtype)[1]
    return _RMSNorm.apply(x, weight, eps, dtype)


def add_norm(x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `reference.add_norm`, where None adds nothing; natively x's two gradients are joined on the way as well."""
    dtype = compute_dtype(x)
    if added is None or (added.dtype == dtype and added.shape == x.shape):
        like = (x, added if added is not None else x)
        if native.training(*like) is not None and dtype in (torch.float32, torch.bfloat16):
            return _NativeNorm.apply(x, added, weight, eps, dtype)
    total = x if added is None else x + added
    return total, rms_norm(total, weight, eps)


def _one_row(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same for a single row, where each call counts: 1 / rms is a number, not a tensor."""
    row = wide(x).reshape(-1)
    inverse = (torch.dot(row, row).item() / len(row) + eps) ** -0.5
    return row.mul(inverse).mul_(weight).view(x.shape)


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normed rows in their wide dtype, and 1 / rms of each."""
    x_wide = wide(x)
    inverse = torch.linalg.vector_norm(x_wide, dim=-1, keepdim=True).square_()
    inverse = inverse.div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x_wide * inverse).mul_(weight), inverse


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        normed, inverse = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return normed.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        x_ND, grad_ND, inverse_N1 = x.flatten(0, -2), grad.flatten(0, -2), inverse.flatten(0, -2)
        weight_D = weight.to(inverse.dtype)
        centre_N1 = torch.zeros_like(inverse_N1)
        dx_ND, d_weight = torch.empty_like(x_ND), torch.zeros_like(weight_D)
        for rows in tiles(x_ND):
            g_ND = grad_ND[rows].to(weight_D.dtype)
            parts = (g_ND, wide(x_ND[rows]), x.shape[-1:], centre_N1[rows], inverse_N1[rows], weight_D, None)
            centred, d_scale, _ = _layer_norm_backward(*parts, [True, True, False])
            d_weight += d_scale
            mean_N1 = torch.mv(g_ND, weight_D).unsqueeze(-1).div_(x.shape[-1])
            torch.add(centred, mean_N1.mul_(inverse_N1[rows]), out=dx_ND[rows])
        return dx_ND.view(x.shape), d_weight.to(weight.dtype), None, None


class _NativeNorm(torch.autograd.Function):
    """x + added, and that normed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype):
        module, threads = native.kernels(), torch.get_num_threads()
        assert module is not None
        x_ND, added_ND = native.rows(x), None if added is None else native.rows(added)
        total = x.view_as(x) if added is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        out = torch.empty(x.shape, dtype=dtype)
        inverse_N, weight_D = torch.empty(len(x_ND)), weight.float().contiguous()
        kinds = (x.dtype == torch.float32, dtype == torch.float32)
        where = (*native.address(x_ND), *native.address(added_ND), total.data_ptr(), weight_D.data_ptr())
        module.norm(*x_ND.shape, *kinds, *where, eps, inverse_N.data_ptr(), out.data_ptr(), threads)
        ctx.save_for_backward(total, weight, inverse_N)
        ctx.set_materialize_grads(False)
        ctx.module, ctx.kinds, ctx.added = module, kinds, None if added is None else added.dtype
        return total, out

    @staticmethod
    def backward(ctx: Any, beside: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, inverse_N = ctx.saved_tensors
        if grad is None:
            return beside, beside if beside is None or ctx.added is None else beside.to(ctx.added), None, None, None
        x_ND, grad_ND = native.rows(total), native.rows(grad)
        beside_ND = None if beside is None else native.rows(beside)
        dx = torch.empty_like(total, memory_format=torch.contiguous_format)
        d_added = None if ctx.added is None else dx if ctx.added == dx.dtype else torch.empty_like(dx, dtype=ctx.added)
        weight_D = weight.float().contiguous()
        d_weight = torch.empty_like(weight_D)
        other = 0 if d_added is None or d_added is dx else d_added.data_ptr()
        parts = (*native.address(x_ND), weight_D.data_ptr(), inverse_N.data_ptr(), *native.address(grad_ND))
        outs = (*native.address(beside_ND), dx.data_ptr(), other, d_weight.data_ptr())
        ctx.module.norm_backward(*x_ND.shape, *ctx.kinds, *parts, *outs, torch.get_num_threads())
        return dx, d_added, d_weight.to(weight.dtype), None, None
