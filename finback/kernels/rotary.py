"""Rotary embedding of interleaved pairs, each pair a complex number turned by another, in one pass over memory."""

from typing import Any

import torch
from torch import Tensor

from finback.kernels.precision import wide_dtype
from finback.kernels.tiles import tiles

_SMALL = 1 << 16  # numbers that need no tiles


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """As `reference.rotate`."""
    return _Rotate.apply(x, turn) if torch.is_grad_enabled() else _turned(x, turn)


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    if x.numel() <= _SMALL:
        whole = x.to(wide_dtype(x), memory_format=torch.contiguous_format, copy=True)
        torch.view_as_complex(whole.unflatten(-1, (-1, 2))).mul_(turn)
        return whole.to(x.dtype)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    x_N, out_N, turn_N = x.flatten(0, 1), out.flatten(0, 1), turn.flatten(0, 1)
    for rows in tiles(x_N):
        part = x_N[rows].to(wide_dtype(x), memory_format=torch.contiguous_format, copy=True)
        torch.view_as_complex(part.unflatten(-1, (-1, 2))).mul_(turn_N[rows])
        out_N[rows] = part
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, turn: Tensor) -> Tensor:
        ctx.save_for_backward(turn)
        return _turned(x, turn)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (turn,) = ctx.saved_tensors
        return _turned(grad, turn.conj()), None
