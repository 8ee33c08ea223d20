"""Tiny random models for the tests, and their twins in transformers."""

from typing import Any

import torch
from torch import Tensor

from finback.model import Config, Model

SIZES: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 10,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 5,
    "max_position_embeddings": 256,
}


def tiny(**changes: Any) -> Config:
    """A configuration in which no two sizes that could be confused are equal."""
    return Config(**(SIZES | changes))


def tiny_model(config: Config, seed: int = 0) -> Model:
    """Random weights large enough that a wrong formula shows; norms away from 1, correction biases of both signs."""
    generator = torch.Generator().manual_seed(seed)
    model = Model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else noise * 1.5 * parameter.shape[-1] ** -0.5)
        for _, router in model.routers():
            if router.e_score_correction_bias is not None:
                router.e_score_correction_bias.copy_(torch.randn(config.n_routed_experts, generator=generator) * 0.3)
    return model.eval()


def tokens(*shape: int, seed: int = 0, vocabulary: int = SIZES["vocab_size"]) -> Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def twin(model: Model) -> Any:
    """transformers' DeepseekV3ForCausalLM with the same weights, moved name by name."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    values = model.config.to_dict()
    other = DeepseekV3ForCausalLM(DeepseekV3Config(**values, attn_implementation="eager"))
    moved = {_twin_name(n): value for n, value in model.state_dict().items() if not n.startswith("mtp.")}
    other.load_state_dict(moved, strict=True)
    return other.eval()


def _twin_name(name: str) -> str:
    name = name.replace("experts.gate_up.value", "experts.gate_up_proj").replace(
        "experts.down.value", "experts.down_proj"
    )
    name = name.removesuffix(".value")
    return name.removeprefix("decoder.") if "lm_head" in name else name.replace("decoder.", "model.", 1)
