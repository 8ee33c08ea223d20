"""A router's products in fp32, of activations in any dtype; natively without a copy of those in fp32."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from finback.kernels import native
from finback.kernels.precision import wide

_CACHED = 1 << 16  # numbers of a weight that stays in cache: of a larger one products by blocks are faster


def scores(x_ND: Tensor, weight_ED: Tensor) -> Tensor:
    """As `reference.scores`."""
    if native.training(x_ND, weight_ED) is not None and weight_ED.numel() <= _CACHED:
        return _Scores.apply(x_ND, weight_ED)
    with torch.autocast(x_ND.device.type, enabled=False):
        x_ND = wide(x_ND)
        return F.linear(x_ND, weight_ED.to(x_ND.dtype))


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.module = native.kernels()
        x_ND, weight_ED = native.rows(x), weight.float().contiguous()
        out = torch.empty(len(x_ND), len(weight))
        parts = (*native.address(x_ND), weight_ED.data_ptr(), out.data_ptr(), torch.get_num_threads())
        ctx.module.scores(*x_ND.shape, len(weight), x.dtype == torch.float32, *parts)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        x_ND, weight_ED, grad = native.rows(x), weight.float().contiguous(), grad.contiguous()
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        d_weight = torch.empty_like(weight_ED)
        parts = (*native.address(x_ND), weight_ED.data_ptr(), grad.data_ptr(), dx.data_ptr(), d_weight.data_ptr())
        ctx.module.scores_backward(*x_ND.shape, len(weight), x.dtype == torch.float32, *parts, torch.get_num_threads())
        return dx, d_weight.to(weight.dtype)
