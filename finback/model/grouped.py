"""Attention with a key and a value of its own for every group of heads: deepseek-moe-16b, Qwen2, Llama."""

import torch
from torch import Tensor, nn

from finback.kernels import dispatch
from finback.model.attention import Context
from finback.model.config import Config
from finback.model.linear import Linear
from finback.model.rope import softmax_scale


class GroupedAttention(nn.Module):
    """Softmax attention of one layer; all heads share `num_key_value_heads` keys and values. `layer`: the cache's key.

    These checkpoints turn number j of a head with number j + half. Here the halves are dealt out to neighbours first,
    in queries and keys alike, so their products, all that is used, do not change.
    """

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.scale = softmax_scale(config)
        hidden, bias = config.hidden_size, config.family.qkv_bias
        queries, keys = config.num_attention_heads * config.query_dim, config.kv_heads * config.query_dim
        self.q_proj = Linear(hidden, queries, bias)
        self.k_proj = Linear(hidden, keys, bias)
        self.v_proj = Linear(hidden, keys, bias)
        self.o_proj = Linear(queries, hidden)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        query = self._turned(self.q_proj(x_BTD), context)
        entry_BTC = torch.cat((self._turned(self.k_proj(x_BTD), context).flatten(-2), self.v_proj(x_BTD)), dim=-1)
        return self.o_proj(context.attend(self.layer, entry_BTC, self._attend, query))

    def _attend(self, entry_BSC: Tensor, mask: Tensor | None, query_BTHd: Tensor) -> Tensor:
        halves = entry_BSC.type_as(query_BTHd).chunk(2, dim=-1)
        key, value = (half.unflatten(-1, (self.config.kv_heads, -1)) for half in halves)
        group = query_BTHd.shape[2] // key.shape[2]
        if mask is None and query_BTHd.shape[1] < key.shape[1]:  # one new token, the last: it sees every slot
            mask = torch.ones(key.shape[0], 1, key.shape[1], dtype=torch.bool, device=key.device)
        if mask is None:
            key, value = (x.repeat_interleave(group, dim=2) for x in (key, value))
            return dispatch.attention(query_BTHd, key, value, self.scale, None).flatten(-2)
        # The heads of a group as further queries of their one key head: nothing of the cache is copied.
        query = query_BTHd.unflatten(2, (-1, group)).transpose(2, 3).flatten(1, 2)
        mixed = dispatch.attention(query, key, value, self.scale, mask.repeat_interleave(group, dim=1))
        return mixed.unflatten(1, (-1, group)).transpose(2, 3).flatten(-3)

    def _turned(self, x_BTC: Tensor, context: Context) -> Tensor:
        """Heads [B, T, H, d], their halves dealt out to pairs and turned to their positions."""
        pairs = x_BTC.unflatten(-1, (-1, 2, self.config.query_dim // 2)).transpose(-1, -2).flatten(-2)
        return dispatch.rotate(pairs, context.turn.unsqueeze(2))
