"""A recipe of a second, for the tests of training."""

from pathlib import Path
from typing import Any

from finback.train import recipe

TOML = """
seed = 3
save_dtype = "float32"

[model]
hidden_size = 32
intermediate_size = 48
moe_intermediate_size = 16
num_hidden_layers = 2
num_nextn_predict_layers = 1
num_attention_heads = 2
n_routed_experts = 4
num_experts_per_tok = 2
n_group = 1
topk_group = 1
first_k_dense_replace = 1
q_lora_rank = 16
kv_lora_rank = 8
qk_nope_head_dim = 8
qk_rope_head_dim = 4
v_head_dim = 8
initializer_range = 0.05

[tokenizer]
vocab_size = 300
texts = 20

[[stage]]
name = "read"
kind = "pretrain"
steps = 5
batch = 4
sequence = 48
accumulation = 2
tasks = { sorting = 1.0, letters = 2.0 }
mtp_lambda = 0.3
checkpoint_every = 2
log_every = 1
optimizer = { kind = "muon", lr = 2e-3, warmup = 2 }

[[stage]]
name = "reply"
kind = "sft"
steps = 4
batch = 2
sequence = 640
tasks = { sorting = 1.0 }
no_think = 0.3
easier = 0.5
multi_turn = 0.2
mtp_lambda = 0.1
checkpoint_every = 2
log_every = 1
optimizer = { kind = "adamw", lr = 1e-3, decay = "linear" }
"""


def write(folder: Path, old: str = "", new: str = "") -> Path:
    """The recipe as a file, with one piece of it replaced."""
    assert old in TOML
    path = folder / "tiny.toml"
    path.write_text(TOML.replace(old, new, 1) if old else TOML)
    return path


def stage(**changes: Any) -> recipe.Stage:
    """One stage by itself."""
    values = {"name": "s", "kind": "sft", "steps": 1, "batch": 1, "sequence": 8, "tasks": {"sorting": 1.0}}
    return recipe.Stage.model_validate(values | {"optimizer": {"lr": 1.0}} | changes)


def load(folder: Path, *overrides: str) -> recipe.Recipe:
    return recipe.load(write(folder), overrides)
