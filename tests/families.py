"""A tiny random model of every family, with what its own `config.json` looks like, and its twin in transformers."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

VOCAB = 53
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.02,
    "hidden_act": "silu",
}
_LATENT = {"q_lora_rank": 10, "kv_lora_rank": 14, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 5}
_EXPERTS = {
    "moe_intermediate_size": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
}
_YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1}
_V3 = {
    **_SIZES,
    **_LATENT,
    **_EXPERTS,
    "model_type": "deepseek_v3",
    "n_group": 4,
    "topk_group": 2,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
_V2 = {
    **_SIZES,
    **_LATENT,
    **_EXPERTS,
    "model_type": "deepseek_v2",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "rope_scaling": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    "max_position_embeddings": 640,
}
_QWEN = {**_SIZES, "model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": False}
FAMILIES: dict[str, dict[str, Any]] = {
    "V3, R1": {
        **_V3,
        "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        "max_position_embeddings": 640,
    },
    "Moonlight": {
        **_V3,
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.446,
        "rope_theta": 50000.0,
        "rms_norm_eps": 1e-5,
    },
    "V2": {**_V2, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0},
    "V2-Lite": {
        **_V2,
        "topk_method": "greedy",
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
    },
    "deepseek-moe-16b": {
        **_SIZES,
        **_EXPERTS,
        "model_type": "deepseek",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
    },
    "R1-Distill-Qwen": {**_QWEN, "rope_theta": 1e6},
    "Qwen2, tied": {**_QWEN, "tie_word_embeddings": True},
    "R1-Distill-Llama": {
        **_SIZES,
        "model_type": "llama",
        "num_key_value_heads": 2,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
}


def theirs(name: str, seed: int = 0) -> Any:
    """The family's model in transformers, random, large enough that a wrong formula shows."""
    import transformers

    values = deepcopy(FAMILIES[name])  # transformers writes into what it is given
    kind = values["model_type"]
    if kind == "deepseek":
        model = _deepseek_moe(values)
    else:
        config = transformers.AutoConfig.for_model(**values, attn_implementation="eager")
        model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if key.endswith("bias"):
                tensor.copy_(noise * 0.3)
            else:
                tensor.copy_(1 + 0.2 * noise if tensor.dim() == 1 else noise * 1.5 * tensor.shape[-1] ** -0.5)
    return model.eval()


def _deepseek_moe(values: dict[str, Any]) -> Any:
    """deepseek-moe-16b, which transformers does not have: its Llama, with DeepSeek-V2's mixture in it."""
    from transformers import DeepseekV2Config, LlamaConfig, LlamaForCausalLM
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

    shared = {key: value for key, value in values.items() if key != "model_type"}
    model = LlamaForCausalLM(LlamaConfig(**shared, attn_implementation="eager"))
    mixture = DeepseekV2Config(**shared, topk_method="greedy", routed_scaling_factor=1.0)
    for layer in model.model.layers[values["first_k_dense_replace"] :]:
        layer.mlp = DeepseekV2Moe(mixture)
    return model


def write_theirs(model: Any, name: str, folder: Path) -> None:
    """The folder as the family publishes it: config.json and tensors by their original names."""
    values = FAMILIES[name]
    if values["model_type"] != "deepseek":
        model.save_pretrained(folder)
    else:
        folder.mkdir(exist_ok=True)
        save_file(unfused(model), folder / "model.safetensors", metadata={"format": "pt"})
    architecture = {} if values["model_type"] != "deepseek" else {"architectures": ["DeepseekForCausalLM"]}
    (folder / "config.json").write_text(json.dumps({**values, **architecture, "torch_dtype": "float32"}))


def unfused(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state with every expert's matrices under a name of their own."""
    tensors: dict[str, torch.Tensor] = {}
    for key, value in model.state_dict().items():
        if key.endswith("experts.gate_up_proj"):
            for e, (gate, up) in enumerate(matrix.chunk(2) for matrix in value):
                tensors |= {key.replace("gate_up_proj", f"{e}.gate_proj.weight"): gate.clone()}
                tensors |= {key.replace("gate_up_proj", f"{e}.up_proj.weight"): up.clone()}
        elif key.endswith("experts.down_proj"):
            tensors |= {key.replace("down_proj", f"{e}.down_proj.weight"): m.clone() for e, m in enumerate(value)}
        else:
            tensors[key] = value
    return tensors
