"""The model: a decoder, its head, and the modules that predict further tokens."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from finback.kernels.precision import wide
from finback.model.attention import Cache, Context
from finback.model.block import Block
from finback.model.config import Config
from finback.model.linear import Linear, RMSNorm
from finback.model.moe import Router, Routing
from finback.model.mtp import MTP


class Decoder(nn.Module):
    """Embedding, layers, final norm and head. Layers are keyed by absolute index, so that a stage may hold a few."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        # From an empty table: an Embedding that draws its own imports torch's compiler on the meta device, 0.9 s.
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleDict({str(i): Block(config, i) for i in range(config.num_hidden_layers)})
        self.fused: Any = None  # model/fused.py, where all layers can run in one call
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight.value = self.embed_tokens.weight

    def forward(
        self,
        ids: Tensor | None = None,
        *,
        embeds: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        routing: Routing | None = None,
    ) -> Tensor:
        """Token ids [B, T] or embeddings [B, T, D] to hidden states [B, T, D] after the final norm.

        `positions` [B, T] are 0..T-1 by default. Without a cache, positions that restart at 0 within a row begin a new
        document, and tokens attend within their own. With a cache, position p is slot p and attends to slots 0..p.
        """
        x_BTD = self.embed_tokens(ids) if embeds is None else embeds
        context = Context.build(self.config, positions, x_BTD.shape, x_BTD.device, cache)
        if self.fused is not None and (out_BTD := self.fused(x_BTD, context, routing)) is not None:
            return self.norm(out_BTD)
        added_BTD = None
        for layer in self.layers.values():
            x_BTD, added_BTD = layer(x_BTD, added_BTD, context, routing)
        return self.norm(x_BTD, added_BTD, both=True)[1]

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 scores (float64 of a float64 model) over the vocabulary, [..., V]."""
        return wide(self.lm_head(hidden))


class Model(nn.Module):
    """A decoder with its multi-token prediction modules; `model(ids)` gives the decoder's logits."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.expert_cache: Any = None  # the weights room's HotExperts, where routed experts stay on disk
        self.decoder = Decoder(config)
        first = config.num_hidden_layers
        extra = range(first, first + config.num_nextn_predict_layers)
        self.mtp = nn.ModuleDict({str(i): MTP(config, i) for i in extra})

    def forward(self, ids_BT: Tensor, *, positions: Tensor | None = None, routing: Routing | None = None) -> Tensor:
        """Logits [B, T, V], float32; logits[:, t] predicts token t + 1."""
        return self.decoder.logits(self.decoder(ids_BT, positions=positions, routing=routing))

    def routers(self) -> Iterator[tuple[str, Router]]:
        """Every router with its name."""
        for name, module in self.named_modules():
            if isinstance(module, Router):
                yield name, module

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Every matrix normal with standard deviation `initializer_range` (V3 TR 4.2: 0.006), norms 1, biases 0."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
            else:
                values = torch.empty(parameter.shape).normal_(0.0, self.config.initializer_range, generator=generator)
                parameter.copy_(values)
        for _, router in self.routers():
            if router.e_score_correction_bias is not None:
                router.e_score_correction_bias.zero_()
            router.load.zero_()
