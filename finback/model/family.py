"""The families of one architecture: which fields their `config.json` has, and what each of them fixes.

Everything else about a family follows from the values of its fields: `kv_lora_rank` makes attention latent,
`n_routed_experts` makes layers mixtures, `scoring_func` and `topk_method` choose the router.
"""

from dataclasses import dataclass, field
from typing import Any

_COMMON = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "rope_theta", "rope_scaling", "rms_norm_eps", "initializer_range"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id"),
)
_LATENT = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_GROUPED = ("num_key_value_heads", "head_dim")
_EXPERTS = (
    *("moe_intermediate_size", "n_shared_experts", "n_routed_experts", "num_experts_per_tok", "first_k_dense_replace"),
    *("norm_topk_prob", "scoring_func"),
)
_GROUPS = ("n_group", "topk_group", "topk_method", "routed_scaling_factor")


@dataclass(frozen=True)
class Family:
    """`fields` are those its config.json has; `defaults` hold where a file lacks one (or where the family has none).

    `fixed`: values that only this architecture's choice may have; the first is written, any of them is read.
    `qkv_bias`: query, key and value projections add a bias. `scaling_key`: what `rope_scaling` calls its kind.
    """

    architecture: str
    fields: tuple[str, ...]
    defaults: dict[str, Any] = field(default_factory=dict)
    fixed: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    qkv_bias: bool = False
    scaling_key: str = "type"


_SILU: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",)}
_MOE: dict[str, tuple[Any, ...]] = {**_SILU, "attention_bias": (False,), "moe_layer_freq": (1,)}
_INTERLEAVED: dict[str, tuple[Any, ...]] = {"rope_interleave": (True,)}
_PLAIN = {"kv_lora_rank": None, "q_lora_rank": None, "num_key_value_heads": None}
_SOFTMAX = {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False, "routed_scaling_factor": 1.0}
_ONE_GROUP = {"n_group": 1, "topk_group": 1}
_NO_EXPERTS = {"n_routed_experts": 0, "n_shared_experts": 0, **_ONE_GROUP}

FAMILIES: dict[str, Family] = {
    # DeepSeek-V3, R1, V3.1; Moonlight.
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        (*_COMMON, *_LATENT, *_EXPERTS, *_GROUPS, "num_nextn_predict_layers"),
        {"n_group": 8, "topk_group": 4},
        {**_MOE, "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), **_INTERLEAVED},
    ),
    # V2, V2-Lite, V2.5: softmax scores, groups by their best expert, weights normalised or scaled, never both.
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        (*_COMMON, *_LATENT, *_EXPERTS, *_GROUPS),
        {**_SOFTMAX, **_ONE_GROUP, "first_k_dense_replace": 0},
        {**_MOE, "scoring_func": ("softmax",), "topk_method": ("greedy", "group_limited_greedy"), **_INTERLEAVED},
    ),
    # deepseek-moe-16b: the first mixture, with Llama's attention.
    "deepseek": Family(
        "DeepseekForCausalLM",
        (*_COMMON, *_GROUPED, *_EXPERTS),
        {**_PLAIN, **_SOFTMAX, **_ONE_GROUP, "first_k_dense_replace": 0},
        {**_MOE, "scoring_func": ("softmax",)},
    ),
    # R1-Distill-Qwen.
    "qwen2": Family(
        "Qwen2ForCausalLM",
        (*_COMMON, *_GROUPED),
        {**_PLAIN, **_NO_EXPERTS, "bos_token_id": None, "eos_token_id": None},
        {**_SILU, "use_sliding_window": (False,)},
        qkv_bias=True,
        scaling_key="rope_type",
    ),
    # R1-Distill-Llama.
    "llama": Family(
        "LlamaForCausalLM",
        (*_COMMON, *_GROUPED),
        {**_PLAIN, **_NO_EXPERTS, "bos_token_id": 1, "eos_token_id": 2},
        {**_SILU, "attention_bias": (False,), "mlp_bias": (False,)},
        scaling_key="rope_type",
    ),
}
