"""RMSNorm with its backward in few passes over memory."""

from typing import Any

import torch
from torch import Tensor

from finback.kernels.precision import compute_dtype, wide


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference.rms_norm`; under autocast the result is already in the dtype the next product wants."""
    return _RMSNorm.apply(x, weight, eps, compute_dtype(x))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        x_wide = wide(x)
        inverse = torch.linalg.vector_norm(x_wide, dim=-1, keepdim=True).square_()
        inverse = inverse.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x_wide * inverse).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        normed = wide(x) * inverse
        product = normed * grad
        share = (product @ weight.to(product.dtype)).unsqueeze(-1).div_(x.shape[-1])
        d_weight = product.flatten(0, -2).sum(0)
        dx = torch.mul(grad, weight, out=product).addcmul_(normed, share, value=-1).mul_(inverse)
        return dx.to(x.dtype), d_weight.to(weight.dtype), None, None
