"""Multi-head latent attention: V2 TR 2.1, V3 TR 2.1.1.

One latent of `kv_lora_rank` numbers and one roped key per token stand for the keys and values of every head. The naive
form expands them (training, prefill); the absorbed form moves the expansion into the query and the output, so that
decoding reads only the latents. Both are the same function.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from finback.kernels import dispatch
from finback.model.config import Config
from finback.model.linear import Linear, RMSNorm
from finback.model.rope import rotation, softmax_scale

# Of the latents' norms, whatever rms_norm_eps says (Moonlight's is 1e-5): so the checkpoints' own code has it.
_EPS = 1e-6


@dataclass(frozen=True)
class Part:
    """Tokens of a flat pass that attend alike: `rows` sequences with `width` neighbouring new tokens each.

    tokens: where they stand in the pass, rows x width of them; None is all of it.
    mask_BTS: which of the `slots` cached positions a token sees; None where each row's new tokens are the last of
    them, and either all (its sequence starts here: plain causal) or one.
    """

    tokens: slice | None
    rows: int
    width: int
    slots: int
    mask_BTS: Tensor | None

    def take(self, x_1NX: Tensor) -> Tensor:
        """The part's tokens of [1, N, ...] as [rows, width, ...]."""
        chosen = x_1NX if self.tokens is None else x_1NX[:, self.tokens]
        return chosen.reshape(self.rows, self.width, *x_1NX.shape[2:])


class Pages(NamedTuple):
    """Where one layer's entries lie, token by token of a pass, for kernels that read them in place.

    entries_SC: all slots, contiguous, in the model's dtype. slot_N: where each token's own entry goes. tables: blocks
    of 16 slots, those of a token from `table_N` on. length_N: how many slots it sees. single_n: the tokens that attend
    each by itself. spans_s4: of the others, stretches [first token, how many, its table, slots before]. All but the
    first int64.
    """

    entries_SC: Tensor
    slot_N: Tensor
    tables: Tensor
    table_N: Tensor
    length_N: Tensor
    single_n: Tensor
    spans_s4: Tensor


class Cache(Protocol):
    """Where attention writes what it must remember and reads it back; made for one pass over tokens [1, N].

    The parts cover all tokens in order.
    """

    parts: Sequence[Part]

    def write(self, layer: int, entry_1NC: Tensor) -> None:
        """Store the entries ([latent | roped key], or [keys | values]) of this pass's tokens."""

    def read(self, layer: int, part: Part) -> Tensor:
        """The first `part.slots` positions of the part's sequences, [B, S, C]; what a row lacks is masked."""

    def pages(self, layer: int) -> Pages | None:
        """The same, for kernels that read entries in place; None where they are packed."""


@dataclass
class Context:
    """What every layer of one forward call shares."""

    turn: Tensor
    mask_BTT: Tensor | None  # True where a token may look; None is plain causal
    cache: Cache | None

    @classmethod
    def build(cls, config: Config, positions_BT: Tensor | None, shape: torch.Size, device, cache: Cache | None):
        """Positions default to 0..T-1; without a cache, those that restart at 0 mark documents that never mix."""
        mask = None
        if positions_BT is None:
            positions_BT = torch.arange(shape[1], device=device).expand(shape[0], -1)
        elif cache is None:
            document = (positions_BT == 0).cumsum(-1)
            same = document.unsqueeze(-1) == document.unsqueeze(-2)
            mask = same.tril()
        return cls(rotation(config, positions_BT), mask, cache)

    def attend(self, layer: int, entry: Tensor, attend: "Attend", *queries: Tensor) -> Tensor:
        """`attend(entries, mask, *queries)` over whole rows; with a cache, over what it holds, part by part."""
        if self.cache is None:
            return attend(entry, self.mask_BTT, *queries)
        self.cache.write(layer, entry)
        mixed = []
        for part in self.cache.parts:
            fresh = part.mask_BTS is None and part.slots == part.width
            entries = part.take(entry) if fresh else self.cache.read(layer, part)
            mixed.append(attend(entries, part.mask_BTS, *(part.take(query) for query in queries)).flatten(0, 1))
        return (mixed[0] if len(mixed) == 1 else torch.cat(mixed)).unsqueeze(0)


Attend = Callable[..., Tensor]


class LatentAttention(nn.Module):
    """Latent attention of one layer; `layer` is its absolute index, the cache's key."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.scale = softmax_scale(config)
        heads, hidden = config.num_attention_heads, config.hidden_size
        assert config.kv_lora_rank is not None
        self.rank = config.kv_lora_rank
        query = heads * config.query_dim
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, query)
        else:
            self.q_a_proj = Linear(hidden, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, _EPS)
            self.q_b_proj = Linear(config.q_lora_rank, query)
        self.kv_a_proj_with_mqa = Linear(hidden, config.cache_width)
        self.kv_a_layernorm = RMSNorm(self.rank, _EPS)
        self.kv_b_proj = Linear(self.rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(heads * config.v_head_dim, hidden)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        query = self._query(x_BTD, context)
        return self.o_proj(context.attend(self.layer, self._entry(x_BTD, context), self._attend, query))

    def _attend(self, entry_BSC: Tensor, mask: Tensor | None, query: Tensor) -> Tensor:
        new, held = query.shape[1], entry_BSC.shape[1]
        if new < held and new < self.config.absorbed_below:
            return self._absorbed(query, entry_BSC, mask)
        return self._naive(query, entry_BSC, mask)

    def _query(self, x_BTD: Tensor, context: Context) -> Tensor:
        """Per head [nope | rope], the second part turned to its position: [B, T, H, ·]."""
        if self.config.q_lora_rank is None:
            q = self.q_proj(x_BTD)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD)))
        q = q.unflatten(-1, (self.config.num_attention_heads, -1))
        return dispatch.rotate(q, context.turn.unsqueeze(2))

    def _entry(self, x_BTD: Tensor, context: Context) -> Tensor:
        """What is remembered of each token: the normed latent and the roped shared key, [B, T, C]."""
        latent, key = self.kv_a_proj_with_mqa(x_BTD).split((self.rank, self.config.qk_rope_head_dim), dim=-1)
        return torch.cat((self.kv_a_layernorm(latent), dispatch.rotate(key, context.turn)), dim=-1)

    def _naive(self, query: Tensor, entry_BSC: Tensor, mask: Tensor | None) -> Tensor:
        latent, key = entry_BSC.split((self.rank, self.config.qk_rope_head_dim), dim=-1)
        expanded = self.kv_b_proj(latent).unflatten(-1, (self.config.num_attention_heads, -1))
        key, value = dispatch.keys_values(expanded, key, self.config.qk_nope_head_dim)
        return dispatch.attention(query, key, value, self.scale, mask).flatten(-2)

    def _absorbed(self, query: Tensor, entry_BSC: Tensor, mask_BTS: Tensor | None) -> Tensor:
        nope = self.config.qk_nope_head_dim
        q_nope, q_rope = query.split((nope, self.config.qk_rope_head_dim), dim=-1)
        weight_HXL = self.kv_b_proj.weight.dense().unflatten(0, (self.config.num_attention_heads, -1))
        query = torch.cat((dispatch.per_head(q_nope, weight_HXL[:, :nope]), q_rope), dim=-1)
        mixed = dispatch.latent_attention(query, entry_BSC, self.rank, self.scale, mask_BTS)
        return dispatch.per_head(mixed, weight_HXL[:, nope:].transpose(1, 2)).flatten(-2)
