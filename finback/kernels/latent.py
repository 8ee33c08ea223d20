"""Absorbed latent attention of a few new tokens in two batched products: heads and tokens are rows of one matrix."""

import torch
from torch import Tensor

from finback.kernels.precision import wide_dtype


def latent_attention(query: Tensor, entry: Tensor, rank: int, scale: float, mask: Tensor | None) -> Tensor:
    """As `reference.latent_attention`."""
    entry = entry.type_as(query)
    # Tokens inside heads, so that a token's mask repeats over heads without being copied.
    query_BRC = query.transpose(1, 2).flatten(1, 2)
    scores_BRS = torch.bmm(query_BRC, entry.transpose(1, 2)).to(wide_dtype(query)).mul_(scale)
    if mask is not None:
        scores_BRS.unflatten(1, (-1, query.shape[1])).masked_fill_(mask.logical_not().unsqueeze(1), float("-inf"))
    mixed_BRL = torch.bmm(scores_BRS.softmax(-1).type_as(query), entry[..., :rank])
    return mixed_BRL.unflatten(1, (-1, query.shape[1])).transpose(1, 2)
