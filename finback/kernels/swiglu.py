"""silu(gate) · up; natively in one pass, and its gradients in another, from gate and up alone."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from finback.kernels import native


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As `reference.swiglu`."""
    if native.training(gate, up) is None or gate.dtype != up.dtype or gate.shape != up.shape:
        return F.silu(gate) * up
    return _Swiglu.apply(gate, up)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.module = native.kernels()
        gate_ND, up_ND = native.rows(gate), native.rows(up)
        active = torch.empty_like(gate, memory_format=torch.contiguous_format)
        parts = (*native.address(gate_ND), *native.address(up_ND), active.data_ptr())
        ctx.module.swiglu(*gate_ND.shape, gate.dtype == torch.float32, *parts, torch.get_num_threads())
        return active

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        back = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (gate, up)]
        all_rows = [native.rows(x) for x in (gate, up, grad, *back)]
        parts = [part for x_ND in all_rows for part in native.address(x_ND)]
        wide = gate.dtype == torch.float32
        ctx.module.swiglu_backward(*all_rows[0].shape, wide, *parts, 0, 0, 0, torch.get_num_threads())
        return back[0], back[1]
