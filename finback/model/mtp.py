"""Multi-token prediction: one more block that predicts the token after the next (V3 TR 2.2)."""

import torch
from torch import Tensor, nn

from finback.model.attention import Context
from finback.model.block import Block
from finback.model.config import Config
from finback.model.linear import Linear, RMSNorm
from finback.model.moe import Routing


class MTP(nn.Module):
    """h' = norm(block(eh_proj[enorm(Emb(t_{i+1})) ; hnorm(h_i)])), to be read by the main model's head.

    The order of the two halves is the checkpoint's, the reverse of the paper's. h_i is the main model's output after
    its final norm. Embedding and head belong to the main model.
    """

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.config = config
        self.enorm = RMSNorm(hidden, eps)
        self.hnorm = RMSNorm(hidden, eps)
        self.eh_proj = Linear(2 * hidden, hidden)
        self.block = Block(config, layer)
        self.norm = RMSNorm(hidden, eps)

    def forward(
        self,
        hidden_BTD: Tensor,
        next_embeds_BTD: Tensor,
        *,
        positions: Tensor | None = None,
        cache=None,
        routing: Routing | None = None,
    ) -> Tensor:
        """Row i joins hidden_i with the embedding of token i + 1; the result predicts token i + 2."""
        joined = torch.cat((self.enorm(next_embeds_BTD), self.hnorm(hidden_BTD)), dim=-1)
        context = Context.build(self.config, positions, hidden_BTD.shape, hidden_BTD.device, cache)
        return self.norm(*self.block(self.eh_proj(joined), None, context, routing), both=True)[1]
