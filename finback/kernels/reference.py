"""The specification of every hot loop, in plain torch. Faster versions must equal these."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
"""The target that carries no loss."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, computed in fp32, returned in x's dtype."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).type_as(x) * weight.type_as(x)


def add_norm(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + added in x's dtype, and that normed."""
    total = (x + added).type_as(x)
    return total, rms_norm(total, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up."""
    return F.silu(gate) * up


def scores(x_ND: Tensor, weight_ED: Tensor) -> Tensor:
    """x Wᵀ, of whatever dtype, in fp32."""
    return x_ND.float() @ weight_ED.float().T


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the last 2P numbers of x [B, T, ..., D], pairs that are complex numbers, by factors [B, T, ..., P].

    In fp32, pairs interleaved; the numbers before them stay as they are.
    """
    before, pairs = x.tensor_split([x.shape[-1] - 2 * turn.shape[-1]], dim=-1)
    even, odd = pairs.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turn.real, turn.imag
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)
    return torch.cat((before, turned), dim=-1)


def keys_values(expanded: Tensor, shared: Tensor, own: int) -> tuple[Tensor, Tensor]:
    """Expanded latents [B, T, H, own | value], one key for all heads [B, T, R]: keys [B, T, H, own | R], and values."""
    key, value = expanded.tensor_split([own], dim=-1)
    return torch.cat((key, shared.unsqueeze(2).expand(-1, -1, key.shape[2], -1).type_as(key)), dim=-1), value


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """softmax(scale · q kᵀ) v per head: q [B, T, H, d], k [B, S, H, d], v [B, S, H, e] to [B, T, H, e].

    `mask` [B, T, S] is True where a token may look; None is causal (T = S). Softmax in fp32.
    """
    scores = torch.einsum("bthd,bshd->bhts", query, key).float() * scale
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril().unsqueeze(0)
    scores = scores.masked_fill(~mask.unsqueeze(1), float("-inf"))
    return torch.einsum("bhts,bshe->bthe", scores.softmax(-1).type_as(value), value)


def latent_attention(query: Tensor, entry: Tensor, rank: int, scale: float, mask: Tensor | None) -> Tensor:
    """Attention of every head on one shared stream: q [B, T, H, C], entries [B, S, C] to mixed latents [B, T, H, L].

    The first `rank` numbers of an entry are the latent, which is also the value. Without a mask all is seen.
    """
    scores = torch.einsum("bthc,bsc->bhts", query, entry.type_as(query)).float() * scale
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(1), float("-inf"))
    return torch.einsum("bhts,bsl->bthl", scores.softmax(-1).type_as(query), entry[..., :rank].type_as(query))


def per_head(x_BTHn: Tensor, weight_Hnm: Tensor) -> Tensor:
    """Every head by its own matrix: [B, T, H, n] times [H, n, m] to [B, T, H, m]."""
    return torch.einsum("bthn,hnm->bthm", x_BTHn, weight_Hnm)


def expert_ffn(x_ND: Tensor, gate_up: Tensor, down: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """Σ_k weights[n, k] · down_e(silu(gate_e x_n) · up_e x_n) with e = experts[n, k]; returns [N, D]."""

    def product(stack: Tensor) -> Product:
        return lambda x, expert: F.linear(x, stack[expert])

    return expert_loop(x_ND, product(gate_up), product(down), experts_NK, weights_NK)


Product = Callable[[Tensor, int], Tensor]


def expert_loop(x_ND: Tensor, gate_up: Product, down: Product, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """`expert_ffn` with its products given as functions of (rows, expert): stacks need not be dense."""
    out_ND = torch.zeros_like(x_ND)
    for expert in experts_NK.unique().tolist():
        token, choice = (experts_NK == expert).nonzero(as_tuple=True)
        gate, up = gate_up(x_ND[token], expert).chunk(2, dim=-1)
        result = down(F.silu(gate) * up, expert)
        out_ND = out_ND.index_add(0, token, (result * weights_NK[token, choice, None]).type_as(out_ND))
    return out_ND


def cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Sum over n of -log softmax(W h_n)[target_n] in fp32; targets of IGNORED count nothing."""
    logits = F.linear(hidden_ND, weight_VD).float()
    return F.cross_entropy(logits, targets_N, ignore_index=IGNORED, reduction="sum")
