"""Cross-entropy of the output head without ever holding tokens x vocabulary: by chunks, gradients made on the way."""

from typing import Any

import torch
from torch import Tensor

from finback.kernels import native
from finback.kernels.precision import compute_dtype, wide_dtype
from finback.kernels.reference import IGNORED
from finback.kernels.tiles import tiles


def cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int = 2048) -> Tensor:
    """As `reference.cross_entropy`; at most `chunk` x V logits exist at a time."""
    dtype = compute_dtype(hidden_ND)
    return _CrossEntropy.apply(hidden_ND.to(dtype), weight_VD, targets_N, chunk)


def _loss_to_gradient(logits_RV: Tensor, targets_R: Tensor, dtype: torch.dtype) -> Tensor | float:
    """The sum of the rows' losses; the logits become its gradient, softmax - onehot, in place."""
    module = native.taking(logits_RV)
    if module is None:
        return sum((_by_softmax(logits_RV[rows], targets_R[rows], dtype) for rows in tiles(logits_RV)), 0.0)
    inside = bool(((targets_R >= 0) & (targets_R < logits_RV.shape[1])).all())
    assert inside and logits_RV.is_contiguous(), "a target outside the vocabulary"
    sizes = (*logits_RV.shape, logits_RV.dtype == torch.float32)
    return module.loss_to_gradient(*sizes, logits_RV.data_ptr(), targets_R.data_ptr(), torch.get_num_threads())


def _by_softmax(logits_RV: Tensor, targets_R: Tensor, dtype: torch.dtype) -> Tensor:
    """The same of a few rows, in plain torch.

    log Σ exp(l) = max l - log(max p), exact where softmax is: max p >= 1 / V.
    """
    targets_R1 = targets_R.unsqueeze(1)
    scores = logits_RV.to(dtype, copy=True)
    margin = scores.amax(1, keepdim=True) - scores.gather(1, targets_R1)
    torch.softmax(scores, -1, out=scores)
    loss = (margin - scores.amax(1, keepdim=True).log_()).sum()
    scores.scatter_add_(1, targets_R1, scores.new_full((), -1.0).expand(targets_R1.shape))
    logits_RV.copy_(scores)
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int) -> Tensor:
        wide = wide_dtype(hidden_ND)
        total = torch.zeros((), dtype=wide, device=hidden_ND.device)
        need = any(ctx.needs_input_grad)
        d_hidden = torch.zeros_like(hidden_ND) if need else None
        d_weight = torch.zeros_like(weight_VD, dtype=wide) if need else None
        head_VD = weight_VD.to(hidden_ND.dtype)
        kept = (targets_N != IGNORED).nonzero().squeeze(1)
        # One buffer serves all chunks: memory touched for the first time costs more than this arithmetic.
        buffer = hidden_ND.new_empty(min(chunk, len(kept)), len(weight_VD))
        for part in kept.split(chunk):
            hidden, targets = hidden_ND.index_select(0, part), targets_N.index_select(0, part)
            logits = torch.mm(hidden, head_VD.T, out=buffer[: len(part)])
            total += _loss_to_gradient(logits, targets, wide)
            if d_hidden is None or d_weight is None:
                continue
            d_hidden.index_copy_(0, part, logits @ head_VD)
            d_weight += logits.T @ hidden
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grad.to(d_hidden.dtype), (d_weight * grad).to(ctx.dtype), None, None
