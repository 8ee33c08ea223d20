"""One transformer layer: attention, then a dense feed-forward or a mixture of experts."""

from typing import Any

from torch import Tensor, nn

from finback.model.attention import Context, LatentAttention
from finback.model.config import Config
from finback.model.grouped import GroupedAttention
from finback.model.linear import MLP, RMSNorm
from finback.model.moe import MoE, Routing


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the last sum is left to the norm that comes next, in one pass."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        attention = GroupedAttention if config.kv_lora_rank is None else LatentAttention
        self.self_attn = attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.fused: Any = None  # model/fused.py, where the weights lie in panels
        self.mlp = MoE(config, layer) if config.is_moe(layer) else MLP(config.hidden_size, config.intermediate_size)

    def forward(
        self, x_BTD: Tensor, added_BTD: Tensor | None, context: Context, routing: Routing | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Takes x and what is still to be added to it, returns both after this layer; None adds nothing."""
        if self.fused is not None and self.fused.takes(x_BTD):
            x_BTD = x_BTD if added_BTD is None else x_BTD + added_BTD
            return self.fused(x_BTD, context, routing), None
        x_BTD, normed_BTD = self.input_layernorm(x_BTD, added_BTD, both=True)
        x_BTD, normed_BTD = self.post_attention_layernorm(x_BTD, self.self_attn(normed_BTD, context), both=True)
        if isinstance(self.mlp, MoE):
            return x_BTD, self.mlp(normed_BTD, routing)
        return x_BTD, self.mlp(normed_BTD)
