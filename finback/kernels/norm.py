"""RMSNorm with its backward in few passes over memory."""

from typing import Any

import torch
from torch import Tensor

from finback.kernels.precision import compute_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference.rms_norm`; under autocast the result is already in the dtype the next product wants."""
    return _RMSNorm.apply(x, weight, eps, compute_dtype(x))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = _wide(x)
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        inverse = inverse.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        normed = _wide(x) * inverse
        grad = _wide(grad)
        d_weight = (grad * normed).flatten(0, -2).sum(0)
        grad = grad * weight
        share = torch.linalg.vecdot(grad, normed).unsqueeze(-1).div_(x.shape[-1])
        return grad.sub_(normed.mul_(share)).mul_(inverse).to(x.dtype), d_weight.to(weight.dtype), None, None
