"""The configuration of a model of the family, in the field names of the original `config.json` files."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from finback.errors import UserError
from finback.model.family import FAMILIES, Family


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
        if min(self.factor, self.original_max_position_embeddings) < 1 or not 0 < self.beta_slow <= self.beta_fast:
            raise UserError(
                f"config.json: rope_scaling = {asdict(self)}; factor and original_max_position_embeddings must be at "
                "least 1, and 0 < beta_slow <= beta_fast"
            )


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's: long wavelengths are stretched by `factor`, short ones stay, those between are blended."""

    factor: float
    original_max_position_embeddings: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        _check_types(self, "rope_scaling.")
        ordered = 0 < self.low_freq_factor < self.high_freq_factor
        if not ordered or min(self.factor, self.original_max_position_embeddings) < 1:
            raise UserError(
                f"config.json: rope_scaling = {asdict(self)}; factor and original_max_position_embeddings must be at "
                "least 1, and 0 < low_freq_factor < high_freq_factor"
            )


Scaling = RopeScaling | Llama3Scaling
_SCALINGS: dict[str, type[RopeScaling] | type[Llama3Scaling]] = {"yarn": RopeScaling, "llama3": Llama3Scaling}


@dataclass(frozen=True)
class Config:
    """Sizes and constants of one model; defaults are DeepSeek-V3's own (facts: `config.json` of V3 and R1).

    `model_type` names the family, `kv_lora_rank` None means plain attention with `num_key_value_heads` heads of
    `head_dim` numbers, `q_lora_rank` None one full-rank query projection, `n_routed_experts` 0 that every layer is
    dense. `initializer_range` is the paper's 0.006.
    """

    model_type: str = "deepseek_v3"
    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    num_hidden_layers: int = 61
    num_nextn_predict_layers: int = 0
    num_attention_heads: int = 128
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    moe_intermediate_size: int = 2048
    n_shared_experts: int = 1
    n_routed_experts: int = 256
    num_experts_per_tok: int = 8
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    n_group: int = 8
    topk_group: int = 4
    first_k_dense_replace: int = 3
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    q_lora_rank: int | None = 1536
    kv_lora_rank: int | None = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: Scaling | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 0
    eos_token_id: int | None = 1

    def __post_init__(self) -> None:
        if self.model_type not in FAMILIES:
            raise UserError(
                f"config.json: model_type = {self.model_type!r} is not known; allowed: {', '.join(FAMILIES)}"
            )
        _check_types(self)
        for name in _AT_LEAST_ONE:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"config.json: {name} = {getattr(self, name)}; it must be at least 1")
        for field in fields(self):
            limit = _LIMITS.get(field.name, _LIMIT)
            if isinstance(value := getattr(self, field.name), int) and value > limit:
                raise UserError(f"config.json: {field.name} = {value}; it must be at most {limit:,}")
        if self.rope_theta <= 1:
            raise UserError(f"config.json: rope_theta = {self.rope_theta}; it must be more than 1")
        if self.query_dim < 2 or self.rope_dim < 2 or self.rope_dim % 2:
            name = "qk_rope_head_dim" if self.kv_lora_rank else "head_dim"
            raise UserError(f"config.json: {name} = {self.rope_dim}; it must be even and at least 2 (pairs turn)")
        if self.num_attention_heads % self.kv_heads:
            raise UserError(
                f"config.json: num_attention_heads = {self.num_attention_heads} cannot share num_key_value_heads = "
                f"{self.kv_heads}; the first must be a multiple of the second"
            )
        layers = self.num_hidden_layers + self.num_nextn_predict_layers
        if any(self.is_moe(layer) for layer in (layers - 1, self.num_hidden_layers - 1)):
            self._check_experts()

    def _check_experts(self) -> None:
        experts, groups = self.n_routed_experts, self.n_group
        if groups < 1 or experts % groups or not 1 <= self.topk_group <= groups:
            raise UserError(
                f"config.json: n_routed_experts = {experts} with n_group = {groups}, topk_group = {self.topk_group}; "
                "experts must divide into the groups and topk_group must be 1..n_group"
            )
        if experts * self.num_hidden_layers > _LIMIT:
            raise UserError(f"config.json: n_routed_experts = {experts} in every layer; at most {_LIMIT:,} in all")
        if groups > 1 and experts // groups < 2:
            raise UserError(f"config.json: n_group = {groups} leaves fewer than the 2 experts a group is scored by")
        if self.num_experts_per_tok > experts // groups * self.topk_group:
            raise UserError(
                f"config.json: num_experts_per_tok = {self.num_experts_per_tok} is more than the "
                f"{experts // groups * self.topk_group} experts of the {self.topk_group} chosen groups"
            )

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values of plain attention."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def query_dim(self) -> int:
        """Numbers of one head's query and key."""
        if self.kv_lora_rank is not None:
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rope_dim(self) -> int:
        """How many of them turn with the position: the rope part of latent attention, all of plain attention."""
        return self.qk_rope_head_dim if self.kv_lora_rank is not None else self.query_dim

    @property
    def cache_width(self) -> int:
        """Numbers cached per token and layer: latent and shared roped key, or the keys and values of all KV heads."""
        if self.kv_lora_rank is not None:
            return self.kv_lora_rank + self.qk_rope_head_dim
        return 2 * self.kv_heads * self.query_dim

    @property
    def absorbed_below(self) -> float:
        """Fewer new tokens make the absorbed form of latent attention the cheaper one: 85 for (M), 171 for V3.

        Expanding an entry costs 2 L (n + v) a head, once; absorbed, each token pays 2 L - n - v more a slot.
        """
        assert self.kv_lora_rank is not None
        rank, per_head = self.kv_lora_rank, self.qk_nope_head_dim + self.v_head_dim
        saved = 2 * rank - per_head
        return rank * per_head / saved if saved > 0 else float("inf")

    @property
    def active_scaling(self) -> Scaling | None:
        """The scaling in force. DeepSeek's YaRN only where the context was extended, Qwen2's wherever it is named."""
        scaling = self.rope_scaling
        if self.kv_lora_rank is None or not isinstance(scaling, RopeScaling):
            return scaling
        extended = self.max_position_embeddings > scaling.original_max_position_embeddings
        return scaling if extended else None

    def is_moe(self, layer: int) -> bool:
        """Whether the layer at this absolute index has experts (MTP layers, past the end, always do)."""
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """Read the original form, or the form newer transformers writes (`rope_parameters`).

        Keys that say nothing about the computation are ignored; a value that asks for another architecture raises
        UserError.
        """
        name = values.get("model_type")
        family = FAMILIES.get(name) if isinstance(name, str) else None
        if family is None:
            raise UserError(f"config.json: model_type = {name!r} is not known; allowed: {', '.join(FAMILIES)}")
        none = dict.fromkeys((key for key in _NONE_IS_0 if key in values and values[key] is None), 0)
        values = {key: value for key, value in values.items() if value is not None or key == "q_lora_rank"} | none
        for key, allowed in family.fixed.items():
            if values.get(key, allowed[0]) not in allowed:
                raise UserError(f"config.json: {key} = {values[key]!r} is not supported; allowed: {allowed[0]!r}")
        rope = values.get("rope_parameters") or {}
        scaling = _scaling(values.get("rope_scaling") or rope, values)
        known = set(family.fields)
        kept = {key: value for key, value in values.items() if key in known and key != "rope_scaling"}
        if "rope_theta" in rope:
            kept["rope_theta"] = rope["rope_theta"]
        for key in ("bos_token_id", "eos_token_id"):
            if isinstance(kept.get(key), list):  # transformers allows several ends; the tokenizer knows them
                kept[key] = next(iter(kept[key]), None)
        return cls(**{"model_type": name, **family.defaults, **kept}, rope_scaling=scaling)

    def to_dict(self) -> dict[str, Any]:
        """The original `config.json` form, readable by DeepSeek's own loaders and by transformers."""
        family = self.family
        values = {key: value for key, value in asdict(self).items() if key in family.fields}
        if values.get("head_dim") is None:
            values.pop("head_dim", None)
        if self.rope_scaling is not None:
            kind = next(kind for kind, known in _SCALINGS.items() if isinstance(self.rope_scaling, known))
            values["rope_scaling"] = {family.scaling_key: kind, **asdict(self.rope_scaling)}
        fixed = {key: allowed[0] for key, allowed in family.fixed.items()}
        heads = {"num_key_value_heads": self.kv_heads}
        return {"architectures": [family.architecture], "model_type": self.model_type, **fixed, **values, **heads}


def _scaling(values: Any, config: dict[str, Any]) -> Scaling | None:
    """Read `rope_scaling` (`type`) or the newer `rope_parameters` (`rope_type`); None where nothing is scaled."""
    if not isinstance(values, dict):
        raise UserError(f"config.json: rope_scaling = {values!r}; it must be null or an object such as {_YARN}")
    kind = values.get("rope_type", values.get("type", "default"))
    if kind == "default":
        return None
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise UserError(
            f"config.json: rope_scaling type {kind!r} is not known; allowed: {', '.join(_SCALINGS)}, or none"
        )
    known = {f.name for f in fields(_SCALINGS[kind])}
    try:
        return _SCALINGS[kind](**{name: value for name, value in values.items() if name in known and value is not None})
    except TypeError as error:
        raise UserError(f"config.json: rope_scaling {values}: {error}") from error


def _check_types(values: "Config | Scaling", prefix: str = "") -> None:
    """Raise UserError for a field below 0 or not of its declared type (a whole number may stand for a float)."""
    for field in fields(values):
        value = getattr(values, field.name)
        allowed: Any = int | float if field.type is float else field.type
        if not isinstance(value, allowed) or (isinstance(value, bool) and field.type is not bool):
            wanted = getattr(field.type, "__name__", str(field.type))
            raise UserError(f"config.json: {prefix}{field.name} = {value!r}; it must be {wanted}")
        if isinstance(value, int | float) and not 0 <= value < float("inf"):
            raise UserError(f"config.json: {prefix}{field.name} = {value!r}; it must not be negative, nor infinite")
        if field.type is float:
            object.__setattr__(values, field.name, float(value))


# Far above any real model, and small enough that a lying file costs no time and no number of bytes overflows.
_LIMIT = 10**6
_LIMITS = {
    **dict.fromkeys(("num_hidden_layers", "num_nextn_predict_layers"), 1000),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_routed_experts", "n_shared_experts"), 4096),
    **dict.fromkeys(("vocab_size", "bos_token_id", "eos_token_id"), 10**7),
    "max_position_embeddings": 10**9,
}
_NONE_IS_0 = ("n_routed_experts", "n_shared_experts", "num_nextn_predict_layers")
_YARN = '{"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}'
_AT_LEAST_ONE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_experts_per_tok", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    *("num_key_value_heads", "moe_intermediate_size"),
)
