"""RMSNorm; its backward is LayerNorm's around the mean 0, which torch has as one kernel, without the mean it takes off.

LayerNorm: dx = (g·w - mean(g·w) - n · mean(n·g·w)) / rms, with n = x / rms once its mean is said to be 0.
"""

from typing import Any

import torch
from torch import Tensor

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
    return _RMSNorm.apply(x, weight, eps, dtype)


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
