"""Attention by blocks of queries with its backward: compiled for bfloat16 on a CPU, else in batched matrix products.

The compiled form makes the probabilities again in the backward, from one number a query. Addresses of tensors are taken
here for it: whoever calls keeps the tensors alive.

Of the other: on a CPU torch's own SDPA takes 2.2 to 2.7 times as long, forward and backward, for 32 x 256 tokens with
heads of 48 and 32 (results/hot_loops). Here a few rows of the batch at a time keep their scores in cache, a block reads
only keys that one of its queries may see, and without gradients memory grows with T, not T².
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from finback.kernels import native
from finback.kernels.precision import compute_dtype

BLOCK = 128  # queries at a time
_SCORES = 1 << 21  # of one batch of products: 4 MB in bf16
_STEP = 64


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """As `reference.attention`. Of a query that sees nothing the compiled form gives zeros, without gradients."""
    dtype = compute_dtype(query)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    form = _Compiled if _compiled(query, key, scale, mask) else _Attention
    return form.apply(query, key, value, scale, mask)


def _compiled(query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> bool:
    """Whether the kernels take it: bfloat16 on a CPU, a positive scale, causal only of as many keys as queries."""
    fits = query.dtype == torch.bfloat16 and query.device.type == "cpu" and scale > 0
    return fits and (mask is not None or query.shape[1] == key.shape[1]) and native.kernels() is not None


_PANEL = 16


def _rows(x: Tensor) -> Tensor:
    """[B, T, H, d] with d filled up to a multiple of 16 by zeros and its numbers side by side, in place if it is so."""
    if more := -x.shape[-1] % _PANEL:  # torch copies even where there is nothing to add
        x = F.pad(x, (0, more))
    return x if x.stride(-1) == 1 else x.contiguous()


def _call(query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sum: Tensor, scale: float, mask: Tensor | None):
    """What the kernels are told, widths multiples of 16; all tensors must stay alive."""
    module = native.kernels()
    assert module is not None
    rows, queries, heads, width = query.shape
    seen = (0, 0, 0) if mask is None else (mask.data_ptr(), mask.stride(0), mask.stride(1))
    return module.TrainAttention(
        *(rows, queries, key.shape[1], heads, width, value.shape[3], scale, *seen, log_sum.data_ptr()),
        *map(_heads, (query, key, value, out)),
    )


def _heads(x_BTHd: Tensor):
    module = native.kernels()
    assert module is not None
    return module.Heads(x_BTHd.data_ptr(), *x_BTHd.stride()[:3])


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        ctx.scale, ctx.widths = scale, (query.shape[3], value.shape[3])
        query, key, value = _rows(query), _rows(key), _rows(value)
        if mask is not None:
            mask = mask.expand(len(query), query.shape[1], key.shape[1])
            mask = mask if mask.stride(-1) == 1 else mask.contiguous()
        out = value.new_empty(*query.shape[:3], value.shape[3])
        log_sum = out.new_empty(len(out), out.shape[2], out.shape[1], dtype=torch.float32)
        _call(query, key, value, out, log_sum, scale, mask).forward(torch.get_num_threads())
        ctx.save_for_backward(query, key, value, out, log_sum, mask)
        return out[..., : ctx.widths[1]]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, log_sum, mask = ctx.saved_tensors
        grad = _rows(grad)
        back = [torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value)]
        call = _call(query, key, value, out, log_sum, ctx.scale, mask)
        call.backward(_heads(grad), *map(_heads, back), torch.get_num_threads())
        wide, narrow = ctx.widths
        return back[0][..., :wide], back[1][..., :wide], back[2][..., :narrow], None, None


def _heads_first(x: Tensor) -> Tensor:
    """[B, T, H, d] to contiguous [B, H, T, d]: torch's batched product wants each matrix dense."""
    return x.transpose(1, 2).contiguous()


Block = tuple[slice, slice, slice]
"""The rows of the batch, the queries and the keys of one batch of products."""


def _blocks(heads: int, batch: int, queries: int, keys: int, mask: Tensor | None) -> list[Block]:
    """All products to make: a block of queries with the keys from the first that one of them may see to the last.

    Without a mask several rows of the batch share a block, as many as keep its scores in cache. With one, key ranges
    are widened to multiples of _STEP: oneDNN prepares a product anew for every size it has not met.
    """
    spans = [slice(start, min(start + BLOCK, queries)) for start in range(0, queries, BLOCK)]
    if mask is None:
        together = max(1, _SCORES // (heads * BLOCK * keys))
        shares = [slice(start, min(start + together, batch)) for start in range(0, batch, together)]
        return [(share, span, slice(0, span.stop)) for share in shares for span in spans]
    blocks = []
    for span in spans:
        seen_BS = mask[:, span].any(1).int()
        firsts, behind = seen_BS.argmax(1).tolist(), seen_BS.flip(1).argmax(1).tolist()
        for row, (first, unseen) in enumerate(zip(firsts, behind, strict=True)):
            end = min(-(-(keys - unseen) // _STEP) * _STEP, keys)
            blocks.append((slice(row, row + 1), span, slice(first // _STEP * _STEP, end)))
    return blocks


def _bias(mask: Tensor | None, block: Block, like: Tensor) -> Tensor:
    """0 where a query may look and -inf where not."""
    row, queries, keys = block
    bias = like.new_full((queries.stop - queries.start, keys.stop - keys.start), float("-inf"))
    if mask is None:
        return bias.triu_(queries.start + 1)
    return bias.masked_fill_(mask[row.start, queries, keys], 0.0)


def _part(x_BHTd: Tensor, share: slice, tokens: slice) -> Tensor:
    """The matrices of some rows of the batch as a view [rows · H, tokens, d]."""
    part = x_BHTd[share, :, tokens]
    return part.view(-1, *part.shape[2:])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        q, k, v = _heads_first(query), _heads_first(key), _heads_first(value)
        batch, heads, length, _ = q.shape
        blocks = _blocks(heads, batch, length, k.shape[2], mask)
        keep = any(ctx.needs_input_grad)
        out = value.new_empty(*query.shape[:3], value.shape[3])
        probabilities: list[Tensor] = []
        for share, queries, keys in blocks:
            bias = _bias(mask, (share, queries, keys), q)
            scores = torch.baddbmm(bias, _part(q, share, queries), _part(k, share, keys).transpose(1, 2), alpha=scale)
            chosen = torch.softmax(scores, -1, out=scores)  # in place: the largest memory there is
            mixed = torch.bmm(chosen, _part(v, share, keys))
            out[share, queries] = mixed.unflatten(0, (-1, heads)).transpose(1, 2)
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
        for (share, queries, keys), chosen in zip(ctx.blocks, probabilities, strict=True):
            g, delta_here = _part(grad, share, queries), delta[share, :, queries].flatten(0, 1)
            _part(dv, share, keys).baddbmm_(chosen.transpose(1, 2), g)
            ds = torch.baddbmm(delta_here, g, _part(v, share, keys).transpose(1, 2), beta=-1).mul_(chosen)
            _part(dq, share, queries).baddbmm_(ds, _part(k, share, keys), beta=0, alpha=ctx.scale)
            _part(dk, share, keys).baddbmm_(ds.transpose(1, 2), _part(q, share, queries), alpha=ctx.scale)
        back = [x.transpose(1, 2) for x in (dq, dk, dv)]
        return (*back, None, None)
