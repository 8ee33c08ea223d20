"""Rotary embedding of interleaved pairs, each pair a complex number turned by another, in one pass over memory."""

from typing import Any

import torch
from torch import Tensor

from finback.kernels import native
from finback.kernels.precision import wide_dtype
from finback.kernels.tiles import tiles

_SMALL = 1 << 16  # numbers that need no tiles


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """As `reference.rotate`."""
    if native.training(x) is not None and turn.dtype == torch.complex64 and turn.numel() == _turns(x, turn):
        return _NativeRotate.apply(x, turn)
    before = x.shape[-1] - 2 * turn.shape[-1]
    pairs = x[..., before:] if before else x
    turned = _Rotate.apply(pairs, turn) if torch.is_grad_enabled() else _turned(pairs, turn)
    return torch.cat((x[..., :before], turned), dim=-1) if before else turned


def _turns(x: Tensor, turn: Tensor) -> int:
    """How many factors there are if each token has its own, for all heads."""
    return x.shape[0] * x.shape[1] * turn.shape[-1]


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


class _NativeRotate(torch.autograd.Function):
    """The same with what is copied beside it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, turn: Tensor) -> Tensor:
        ctx.module = native.kernels()
        turn = turn.contiguous()
        ctx.save_for_backward(turn)
        return _copied(ctx.module, x, turn, False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (turn,) = ctx.saved_tensors
        return _copied(ctx.module, grad, turn, True), None


def _copied(module: Any, x: Tensor, turn: Tensor, back: bool) -> Tensor:
    """x with its last numbers turned, or turned back."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    x_NHd = x.flatten(0, 1).flatten(1, -2) if x.dim() > 3 else x.flatten(0, 1).unsqueeze(1)
    x_NHd = x_NHd if x_NHd.stride(-1) == 1 else x_NHd.contiguous()
    turning = 2 * turn.shape[-1]
    sizes = (*x_NHd.shape[:2], x.shape[-1] - turning, turning, x.dtype == torch.float32)
    place = (x_NHd.data_ptr(), x_NHd.stride(0), x_NHd.stride(1))
    module.turn(*sizes, *place, turn.data_ptr(), back, out.data_ptr(), torch.get_num_threads())
    return out
