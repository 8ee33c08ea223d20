"""Attention by blocks of queries with its backward, in batched matrix products.

On a CPU torch's own SDPA takes 2.2 times as long, forward and backward, for 32 x 256 tokens with heads of 48 and 32
(results/hot_loops). Here one row of the batch at a time keeps its scores in cache, a block reads only keys that one of
its queries may see, and without gradients memory grows with T, not T².
"""

from typing import Any

import torch
from torch import Tensor

from finback.kernels.precision import compute_dtype

BLOCK = 256  # queries at a time
MASKED_BLOCK = 128  # smaller where documents share a row: a block then sees few keys
_STEP = 64


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """As `reference.attention`."""
    dtype = compute_dtype(query)
    return _Attention.apply(query.to(dtype), key.to(dtype), value.to(dtype), scale, mask)


def _heads_first(x: Tensor) -> Tensor:
    """[B, T, H, d] to contiguous [B, H, T, d]: torch's batched product wants each matrix dense."""
    return x.transpose(1, 2).contiguous()


def _blocks(batch: int, queries: int, keys: int, mask: Tensor | None) -> list[list[tuple[slice, slice]]]:
    """Per row of the batch, pairs of query and key ranges: from the first key a block may see to the last.

    Widened to multiples of _STEP: oneDNN prepares a product anew for every size it has not met.
    """
    if mask is None:
        ends = [min(start + BLOCK, queries) for start in range(0, queries, BLOCK)]
        return [[(slice((end - 1) // BLOCK * BLOCK, end), slice(0, end)) for end in ends]] * batch
    blocks: list[list[tuple[slice, slice]]] = [[] for _ in range(batch)]
    for start in range(0, queries, MASKED_BLOCK):
        rows = slice(start, min(start + MASKED_BLOCK, queries))
        seen_BS = mask[:, rows].any(1).int()
        firsts, behind = seen_BS.argmax(1).tolist(), seen_BS.flip(1).argmax(1).tolist()
        for row, first, unseen in zip(blocks, firsts, behind, strict=True):
            end = min(-(-(keys - unseen) // _STEP) * _STEP, keys)
            row.append((rows, slice(first // _STEP * _STEP, end)))
    return blocks


def _bias(mask: Tensor | None, row: int, rows: slice, columns: slice, like: Tensor) -> Tensor:
    """0 where a query may look and -inf where not, for one block of one row of the batch."""
    bias = like.new_full((rows.stop - rows.start, columns.stop - columns.start), float("-inf"))
    if mask is None:
        return bias.triu_(rows.start + 1)
    return bias.masked_fill_(mask[row, rows, columns], 0.0)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        q, k, v = _heads_first(query), _heads_first(key), _heads_first(value)
        blocks = _blocks(len(q), q.shape[2], k.shape[2], mask)
        keep = any(ctx.needs_input_grad)
        out = value.new_empty(*query.shape[:3], value.shape[3])
        probabilities: list[Tensor] = []
        causal = [_bias(None, 0, rows, columns, q) for rows, columns in blocks[0]] if mask is None else None
        for b in range(len(q)):
            for i, (rows, columns) in enumerate(blocks[b]):
                bias = causal[i] if causal else _bias(mask, b, rows, columns, q)
                scores = torch.baddbmm(bias, q[b, :, rows], k[b, :, columns].transpose(1, 2), alpha=scale)
                chosen = torch.softmax(scores, -1)
                out[b, rows] = torch.bmm(chosen, v[b, :, columns]).transpose(0, 1)
                if keep:
                    probabilities.append(chosen)
        ctx.save_for_backward(q, k, v, out, *probabilities)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *probabilities = ctx.saved_tensors
        # d softmax: P · (dP - Σ P·dP), and Σ P·dP = Σ grad·out
        delta = torch.linalg.vecdot(grad, out).transpose(1, 2).unsqueeze(-1)
        grad = _heads_first(grad)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        saved = iter(probabilities)
        for b in range(len(q)):
            for rows, columns in ctx.blocks[b]:
                chosen, g = next(saved), grad[b, :, rows]
                dv[b, :, columns].baddbmm_(chosen.transpose(1, 2), g)
                ds = torch.baddbmm(delta[b, :, rows], g, v[b, :, columns].transpose(1, 2), beta=-1).mul_(chosen)
                dq[b, :, rows].baddbmm_(ds, k[b, :, columns], beta=0, alpha=ctx.scale)
                dk[b, :, columns].baddbmm_(ds.transpose(1, 2), q[b, :, rows], alpha=ctx.scale)
        back = [x.transpose(1, 2) for x in (dq, dk, dv)]
        return (*back, None, None)
