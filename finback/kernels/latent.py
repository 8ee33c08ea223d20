"""Absorbed latent attention of a few new tokens, in batched products: heads and tokens are rows of one matrix.

Small products are made in float32: oneDNN takes 20 to 30 us to begin one in bfloat16, MKL 2 in float32.
"""

import torch
from torch import Tensor

from finback.kernels.precision import wide_dtype

_SMALL = 1 << 17  # numbers of the larger operand


def latent_attention(query: Tensor, entry: Tensor, rank: int, scale: float, mask: Tensor | None) -> Tensor:
    """As `reference.latent_attention`."""
    dtype = _dtype(query, entry)
    entry = entry if entry.dtype == dtype else entry.to(dtype)
    # Tokens inside heads, so that a token's mask repeats over heads without being copied.
    query_BRC = query.transpose(1, 2).flatten(1, 2).to(dtype)
    scores_BRS = torch.bmm(query_BRC, entry.transpose(1, 2)).to(wide_dtype(query)).mul_(scale)
    if mask is not None:
        by_head = scores_BRS.unflatten(1, (-1, query.shape[1]))
        scores_BRS = torch.where(mask.unsqueeze(1), by_head, float("-inf")).view_as(scores_BRS)
    mixed_BRL = torch.bmm(scores_BRS.softmax(-1).to(dtype), entry[..., :rank])
    return mixed_BRL.unflatten(1, (-1, query.shape[1])).transpose(1, 2).to(query.dtype)


def per_head(x_BTHn: Tensor, weight_Hnm: Tensor) -> Tensor:
    """Every head by its own matrix: [B, T, H, n] times [H, n, m] to [B, T, H, m]."""
    dtype = _dtype(x_BTHn, weight_Hnm)
    x_HNn = x_BTHn.flatten(0, 1).transpose(0, 1).to(dtype)
    out_HNm = torch.bmm(x_HNn, weight_Hnm.to(dtype)).to(x_BTHn.dtype)
    return out_HNm.transpose(0, 1).unflatten(0, x_BTHn.shape[:2])


def _dtype(x: Tensor, other: Tensor) -> torch.dtype:
    small = x.dtype == torch.bfloat16 and x.device.type == "cpu" and other.numel() <= _SMALL
    return torch.float32 if small else x.dtype
