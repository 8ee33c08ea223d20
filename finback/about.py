"""What a model folder says about its model, without reading the weights."""

import re
from pathlib import Path
from typing import Any

from finback.errors import UserError
from finback.kernels import native
from finback.kernels.quantise import FORMATS
from finback.model.config import Config
from finback.model.sizes import cache_numbers, memory, sizes
from finback.paths import model_path, read_json
from finback.weights.gguf_file import parts
from finback.weights.reader import read_config

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SMALL = 2**30
_CONTEXT = 4096


def describe(model: str) -> dict[str, Any]:
    """Architecture, parameters, cache and context of a model, by name or path. Raises UserError if it cannot be read.

    Cache bytes are per token in the model's precision; multi-head attention would keep a key and a value of head size
    (qk_nope_head_dim, v_head_dim) for every head and layer (V2 TR table 1).
    """
    path, config, settings = read_config(model)
    count = sizes(config)
    precision = str(settings.get("torch_dtype") or settings.get("dtype") or "bfloat16")
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else parts(path)
    per_number = _BYTES.get(precision, 2)
    value = config.query_dim if config.kv_lora_rank is None else config.v_head_dim
    nope = config.query_dim if config.kv_lora_rank is None else config.qk_nope_head_dim
    heads = config.num_attention_heads * (nope + value) * config.num_hidden_layers
    cached = cache_numbers(config)
    scaled = config.rope_scaling
    return {
        "model": model,
        "folder": str(path),
        "architecture": config.family.architecture,
        "layers": config.num_hidden_layers,
        "dense_layers": min(config.first_k_dense_replace, config.num_hidden_layers),
        "mtp_layers": config.num_nextn_predict_layers,
        "hidden_size": config.hidden_size,
        "attention_heads": config.num_attention_heads,
        "routed_experts": config.n_routed_experts,
        "experts_per_token": config.num_experts_per_tok,
        "shared_experts": config.n_shared_experts,
        "parameters_total": count.total,
        "parameters_active": count.active,
        "parameters_mtp": count.mtp,
        "precision": "GGUF" if path.is_file() else "fp8" if settings.get("quantization_config") else precision,
        "weights_bytes": sum(file.stat().st_size for file in files if file.is_file()),
        "cache_numbers_per_token": cached,
        "cache_bytes_per_token": cached * per_number,
        "multi_head_cache_bytes_per_token": heads * per_number,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "rope_scaling": None
        if scaled is None
        else f"x{scaled.factor:g} from {scaled.original_max_position_embeddings:,}",
        "licence": _licence(path if path.is_dir() else path.parent),
        **{f"memory_{form or 'bfloat16'}": _memory(config, form) for form in (None, *FORMATS)},
    }


def _memory(config: Config, form: str | None) -> int:
    return memory(config, 2, form, _CONTEXT, laid_out=native.kernels() is not None).total


def _licence(folder: Path) -> str | None:
    """What the model's card says, else the first line of its licence."""
    for card in ("README.md", "MODEL_CARD.md"):
        if (folder / card).is_file():
            head = (folder / card).read_text(encoding="utf-8", errors="replace")[:4096]
            if found := re.search(r"^(?:license_name|license): *[\"']?([\w.+-]{1,60})", head, re.MULTILINE):
                return found[1]
    for file in sorted(folder.glob("LICENSE*")):
        lines = file.read_text(encoding="utf-8", errors="replace")[:4096].split("\n")
        return next((line.strip()[:80] for line in lines if line.strip()), None)
    return None


def default_dtype(model: str) -> str:
    """The precision to run in: the checkpoint's, which native kernels are made for.

    Without them float32 where that is at most 1 GiB, because plain torch is the faster so on CPUs.
    """
    if native.kernels() is not None:
        return "auto"
    count = sizes(read_config(model)[1])
    return "float32" if 4 * (count.total + count.mtp) <= _SMALL else "auto"


def sampling_defaults(model: str) -> dict[str, Any]:
    """Temperature, top_p and top_k as the model's generation_config.json has them; greedy where it has none.

    A GGUF file does not say: DeepSeek's advice for R1 and its distilled models, which repeat themselves when greedy.
    """
    found = model_path(model)
    if found.is_file():
        return {"temperature": 0.6, "top_p": 0.95}
    path = found / "generation_config.json"
    settings = read_json(path) if path.is_file() else {}
    if not settings.get("do_sample"):
        return {"temperature": 0.0, "top_p": 1.0}
    known = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    values = {key: default if settings.get(key) is None else settings[key] for key, default in known.items()}
    wrong = next((key for key, value in values.items() if not isinstance(value, int | float)), None)
    if wrong is not None:
        raise UserError(f"{path}: {wrong} is {values[wrong]!r}; it must be a number")
    return values
