"""What a GGUF file's metadata says of a model, both ways: the table of keys, and the few that need arithmetic.

Source: gguf-py's constants and llama.cpp's converters for deepseek, deepseek2, qwen2 and llama.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from finback.errors import UserError
from finback.model.config import Config, Llama3Scaling, RopeScaling
from finback.model.rope import inverse_frequencies

ARCHITECTURES = {
    "deepseek_v3": "deepseek2",
    "deepseek_v2": "deepseek2",
    "deepseek": "deepseek",
    "qwen2": "qwen2",
    "llama": "llama",
}
_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
_EXPERTS = {
    "n_routed_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "n_shared_experts": "expert_shared_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "first_k_dense_replace": "leading_dense_block_count",
    "routed_scaling_factor": "expert_weights_scale",
    "norm_topk_prob": "expert_weights_norm",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
}
_LATENT = {"q_lora_rank": "attention.q_lora_rank", "kv_lora_rank": "attention.kv_lora_rank"}
_SOFTMAX, _SIGMOID = 1, 2
# Files made before the keys for groups: DeepSeek's own two models that have them, by their number of experts.
_OLD_GROUPS = {256: (8, 4), 160: (8, 3)}
_LLAMA3 = {"original_max_position_embeddings": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def metadata_of(config: Config) -> dict[str, Any]:
    """The keys that describe `config`, those of the tokenizer left out."""
    arch, latent = ARCHITECTURES[config.model_type], config.kv_lora_rank is not None
    table = _KEYS | (_LATENT if latent else {}) | (_EXPERTS if config.n_routed_experts else {})
    found = {key: getattr(config, name) for name, key in table.items() if getattr(config, name) is not None}
    found["rope.dimension_count"] = config.rope_dim
    found["attention.head_count_kv"] = 1 if latent else config.kv_heads
    if latent:
        assert config.kv_lora_rank is not None
        found |= {"attention.key_length": config.cache_width, "attention.value_length": config.kv_lora_rank}
        found |= {"attention.key_length_mla": config.query_dim, "attention.value_length_mla": config.v_head_dim}
    elif config.head_dim:
        found |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if latent and config.n_routed_experts:
        found["expert_gating_func"] = _SIGMOID if config.scoring_func == "sigmoid" else _SOFTMAX
    if isinstance(scaling := config.active_scaling, RopeScaling):
        found |= {"rope.scaling.type": "yarn", "rope.scaling.factor": float(scaling.factor)}
        found["rope.scaling.original_context_length"] = scaling.original_max_position_embeddings
        found["rope.scaling.yarn_log_multiplier"] = 0.1 * scaling.mscale_all_dim
    return {f"{arch}.{key}": value for key, value in found.items()}


def config_of(metadata: Mapping[str, Any], vocab_size: int, tied: bool, factors: Tensor | None) -> Config:
    """The configuration that `metadata` describes. `factors`: the tensor by which Llama 3.1's rotation is slowed.

    Raises UserError for another architecture, a missing key or a value that cannot be.
    """
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES.values():
        known = ", ".join(sorted(set(ARCHITECTURES.values())))
        raise UserError(f"GGUF: general.architecture is {arch!r}; known are {known}")
    get = partial(_get, metadata, str(arch))
    values: dict[str, Any] = {name: get(key) for name, key in (_KEYS | _LATENT | _EXPERTS).items()}
    needed = dict(_KEYS)
    if arch == "deepseek2":
        needed |= {"n_routed_experts": "expert_count", "qk_rope_head_dim": "rope.dimension_count"}
        values |= _deepseek2(get, values["n_routed_experts"])
    else:
        values |= {"model_type": arch, "n_group": None, "topk_group": None}
        values |= {"num_key_value_heads": get("attention.head_count_kv"), "head_dim": get("attention.key_length")}
    values |= {name: metadata.get(f"tokenizer.ggml.{name}") for name in ("bos_token_id", "eos_token_id")}
    values |= {"vocab_size": vocab_size, "tie_word_embeddings": tied, "rope_scaling": _scaling(get, factors)}
    values["rope_theta"] = values["rope_theta"] or 10000.0
    if lacking := [f"{arch}.{key}" for name, key in needed.items() if values[name] is None]:
        raise UserError(f"GGUF: the metadata lacks {', '.join(lacking)}; the file is damaged")
    if isinstance(values["num_hidden_layers"], int) and isinstance(past := get("nextn_predict_layers", 0), int):
        values["num_hidden_layers"] -= past
    config = Config.from_dict(values)
    if factors is not None and not _same(rope_factors(config), factors):
        raise UserError("GGUF: rope_freqs is not Llama 3.1's way of stretching a context; use the original checkpoint")
    return config


def _deepseek2(get: Callable[..., Any], experts: Any) -> dict[str, Any]:
    """What the architecture has of its own; files from before the keys for absorbed attention and groups included."""
    sigmoid = get("expert_gating_func", _SOFTMAX) == _SIGMOID
    groups = _OLD_GROUPS.get(experts, (1, 1)) if isinstance(experts, int) else (1, 1)
    n_group, rope = get("expert_group_count", groups[0]), get("rope.dimension_count")
    query, value = (get(f"attention.{part}_length_mla", get(f"attention.{part}_length")) for part in ("key", "value"))
    both = isinstance(query, int) and isinstance(rope, int)
    return {
        "model_type": "deepseek_v3" if sigmoid else "deepseek_v2",
        "topk_method": "noaux_tc" if sigmoid else "greedy" if n_group == 1 else "group_limited_greedy",
        "n_group": n_group,
        "topk_group": get("expert_group_used_count", groups[1]),
        "qk_nope_head_dim": query - rope if both else query,
        "qk_rope_head_dim": rope,
        "v_head_dim": value,
    }


def _get(metadata: Mapping[str, Any], arch: str, key: str, default: Any = None) -> Any:
    return _rounded(metadata.get(f"{arch}.{key}", default))


def rope_factors(config: Config) -> Tensor:
    """By what Llama 3.1's rule slows each pair: llama.cpp keeps the result, not the rule."""
    plain = Config.from_dict(config.to_dict() | {"rope_scaling": None})
    return inverse_frequencies(plain) / inverse_frequencies(config)


def _scaling(get: Callable[..., Any], factors: Tensor | None) -> dict[str, Any] | None:
    if factors is not None:
        return {"rope_type": "llama3", "factor": round(float(factors.max()), 3), **_LLAMA3}
    kind = get("rope.scaling.type", "none")
    if kind != "yarn":
        return None if kind == "none" else {"type": kind}
    multiplier = get("rope.scaling.yarn_log_multiplier", 0.0)
    # The converter keeps mscale_all_dim alone; in DeepSeek's models mscale equals it. Qwen2's has neither: 1 and 0.
    mscale = _rounded(10 * multiplier) if isinstance(multiplier, float) else multiplier
    return {
        "type": "yarn",
        "factor": get("rope.scaling.factor"),
        "original_max_position_embeddings": get("rope.scaling.original_context_length"),
        **({"mscale": mscale, "mscale_all_dim": mscale} if mscale else {}),
    }


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3)


def is_writable(config: Config) -> bool:
    """Whether a GGUF file can say how this rotation is scaled: it comes back the same."""
    metadata = metadata_of(config) | {"general.architecture": ARCHITECTURES[config.model_type]}
    factors = rope_factors(config) if isinstance(config.rope_scaling, Llama3Scaling) else None
    try:
        again = config_of(metadata, config.vocab_size, config.tie_word_embeddings, factors)
    except UserError:
        return False
    return again.rope_scaling == config.active_scaling


def _rounded(value: Any) -> Any:
    """A float32 of the file as the decimal number it was made from."""
    return float(f"{value:.7g}") if isinstance(value, float) else value
