"""The configuration of a DeepSeek-V3 model, in the field names of the original `config.json`."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from finback.errors import UserError


@dataclass(frozen=True)
class RopeScaling:
    """YaRN (V3 TR 4.3): `factor` stretches the context beyond `original_max_position_embeddings` tokens."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        _check_types(self, "rope_scaling.")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RopeScaling | None":
        """Read `rope_scaling` (`type`) or the newer `rope_parameters` (`rope_type`); None where nothing is scaled."""
        if not isinstance(values, dict):
            raise UserError(f"config.json: rope_scaling = {values!r}; it must be null or an object such as {_YARN}")
        kind = values.get("rope_type", values.get("type", "default"))
        if kind == "default":
            return None
        if kind != "yarn":
            raise UserError(f"config.json: rope_scaling type {kind!r} is not known; allowed: yarn, or none")
        known = {f.name for f in fields(cls)}
        try:
            return cls(**{name: value for name, value in values.items() if name in known and value is not None})
        except TypeError as error:
            raise UserError(f"config.json: rope_scaling {values}: {error}") from error


@dataclass(frozen=True)
class Config:
    """Sizes and constants of one model; defaults are DeepSeek-V3's own (facts: `config.json` of V3 and R1).

    A `q_lora_rank` of None means one full-rank query projection. `initializer_range` is the paper's 0.006.
    """

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_nextn_predict_layers: int = 0
    num_attention_heads: int = 128
    n_shared_experts: int = 1
    n_routed_experts: int = 256
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    first_k_dense_replace: int = 3
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006
    tie_word_embeddings: bool = False
    bos_token_id: int = 0
    eos_token_id: int = 1

    def __post_init__(self) -> None:
        _check_types(self)
        for name in _AT_LEAST_ONE:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"config.json: {name} = {getattr(self, name)}; it must be at least 1")
        if self.qk_rope_head_dim % 2:
            raise UserError(f"config.json: qk_rope_head_dim = {self.qk_rope_head_dim}; it must be even (pairs turn)")
        if self.first_k_dense_replace < self.num_hidden_layers or self.num_nextn_predict_layers:
            self._check_experts()

    def _check_experts(self) -> None:
        experts, groups = self.n_routed_experts, self.n_group
        if groups < 1 or experts % groups or not 1 <= self.topk_group <= groups:
            raise UserError(
                f"config.json: n_routed_experts = {experts} with n_group = {groups}, topk_group = {self.topk_group}; "
                "experts must divide into the groups and topk_group must be 1..n_group"
            )
        if groups > 1 and experts // groups < 2:
            raise UserError(f"config.json: n_group = {groups} leaves fewer than the 2 experts a group is scored by")
        if self.num_experts_per_tok > experts // groups * self.topk_group:
            raise UserError(
                f"config.json: num_experts_per_tok = {self.num_experts_per_tok} is more than the "
                f"{experts // groups * self.topk_group} experts of the {self.topk_group} chosen groups"
            )

    @property
    def cache_width(self) -> int:
        """Numbers cached per token and layer: the latent and the one roped key that all heads share."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def active_scaling(self) -> RopeScaling | None:
        """YaRN, only where the context was extended: `max_position_embeddings` past the original length."""
        scaling = self.rope_scaling
        extended = scaling is not None and self.max_position_embeddings > scaling.original_max_position_embeddings
        return scaling if extended else None

    def is_moe(self, layer: int) -> bool:
        """Whether the layer at this absolute index has experts (MTP layers, past the end, always do)."""
        return layer >= self.first_k_dense_replace

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """Read the original form, or the form newer transformers writes (`rope_parameters`).

        Keys that say nothing about the computation are ignored; a value that asks for another architecture raises
        UserError.
        """
        for key, allowed in _FIXED.items():
            if values.get(key, allowed[0]) not in allowed:
                raise UserError(f"config.json: {key} = {values[key]!r} is not supported; allowed: {allowed[0]!r}")
        values = {key: value for key, value in values.items() if value is not None or key == "q_lora_rank"}
        rope = values.get("rope_parameters") or {}
        scaling = RopeScaling.from_dict(values.get("rope_scaling") or rope)
        known = {f.name for f in fields(cls)}
        kept = {key: value for key, value in values.items() if key in known and key != "rope_scaling"}
        if "rope_theta" in rope:
            kept["rope_theta"] = rope["rope_theta"]
        try:
            return cls(**kept, rope_scaling=scaling)
        except TypeError as error:
            raise UserError(f"config.json: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The original `config.json` form, readable by DeepSeek's own loaders and by transformers."""
        values = asdict(self)
        if self.rope_scaling is not None:
            values["rope_scaling"] = {"type": "yarn", **asdict(self.rope_scaling)}
        fixed = {key: allowed[0] for key, allowed in _FIXED.items()}
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            **fixed,
            "num_key_value_heads": self.num_attention_heads,
            **values,
        }


def _check_types(values: "Config | RopeScaling", prefix: str = "") -> None:
    """Raise UserError for a field below 0 or not of its declared type (a whole number may stand for a float)."""
    for field in fields(values):
        value = getattr(values, field.name)
        allowed: Any = int | float if field.type is float else field.type
        if not isinstance(value, allowed) or (isinstance(value, bool) and field.type is not bool):
            wanted = getattr(field.type, "__name__", str(field.type))
            raise UserError(f"config.json: {prefix}{field.name} = {value!r}; it must be {wanted}")
        if isinstance(value, int | float) and value < 0:
            raise UserError(f"config.json: {prefix}{field.name} = {value!r}; it must not be negative")


_YARN = '{"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}'
_AT_LEAST_ONE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_experts_per_tok", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
)
# What this architecture fixes: the first value is written, any of them is read.
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("deepseek_v3",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "moe_layer_freq": (1,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "rope_interleave": (True,),
}
