"""Cross-entropy of the output head without ever holding tokens x vocabulary: by chunks, gradients made on the way."""

from typing import Any

import torch
from torch import Tensor

from finback.kernels.precision import compute_dtype
from finback.kernels.reference import IGNORED


def cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int = 1024) -> Tensor:
    """As `reference.cross_entropy`; at most `chunk` x V logits exist at a time."""
    dtype = compute_dtype(hidden_ND)
    return _CrossEntropy.apply(hidden_ND.to(dtype), weight_VD.to(dtype), targets_N, chunk)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int) -> Tensor:
        wide = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=wide, device=hidden_ND.device)
        need = any(ctx.needs_input_grad)
        d_hidden = torch.zeros_like(hidden_ND) if need else None
        d_weight = torch.zeros_like(weight_VD, dtype=wide) if need else None
        kept = (targets_N != IGNORED).nonzero().squeeze(1)
        # Two buffers serve all chunks: memory touched for the first time costs more than this arithmetic.
        narrow = hidden_ND.new_empty(min(chunk, len(kept)), len(weight_VD))
        scores = torch.empty_like(narrow, dtype=wide)
        for part in kept.split(chunk):
            hidden, targets = hidden_ND[part], targets_N[part].unsqueeze(1)
            delta, scored = narrow[: len(part)], scores[: len(part)]
            torch.mm(hidden, weight_VD.T, out=delta)
            torch.log_softmax(delta, -1, dtype=wide, out=scored)
            total -= scored.gather(1, targets).sum()
            if d_hidden is None or d_weight is None:
                continue
            scored.exp_().scatter_add_(1, targets, scored.new_full((), -1.0).expand(targets.shape))
            delta.copy_(scored)
            d_hidden[part] = delta @ weight_VD
            d_weight += delta.T @ hidden
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grad.to(d_hidden.dtype), (d_weight * grad).to(d_hidden.dtype), None, None
