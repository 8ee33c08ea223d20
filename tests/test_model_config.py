"""config.json in both forms, and one clear line for what cannot be."""

import json

import pytest
from tiny_model import tiny

from finback.errors import UserError
from finback.model import Config, RopeScaling

# The file DeepSeek published with V3, as far as it concerns the architecture (facts 1.1).
V3_FILE = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def test_the_original_file_is_read_and_the_defaults_are_v3():
    config = Config.from_dict(V3_FILE)
    assert config.rope_scaling == RopeScaling(40, 4096, 32, 1, 1.0, 1.0)
    assert config.num_nextn_predict_layers == 1
    different = {"rope_scaling", "max_position_embeddings", "num_nextn_predict_layers", "initializer_range"}
    for name in V3_FILE.keys() & Config.__dataclass_fields__.keys() - different:
        assert getattr(Config(), name) == getattr(config, name), name


def test_what_is_written_is_the_original_form_and_reads_back():
    config = Config.from_dict(V3_FILE)
    written = json.loads(json.dumps(config.to_dict()))
    extras = (
        "attention_dropout aux_loss_alpha ep_size pretraining_tp seq_aux torch_dtype transformers_version use_cache"
    )
    for name in V3_FILE.keys() - set(extras.split()):
        assert written[name] == V3_FILE[name], name
    assert Config.from_dict(written) == config


@pytest.mark.parametrize("scaling", [None, RopeScaling(40, 4096, 32, 1, 1.0, 1.0)])
def test_the_newer_form_means_the_same(scaling):
    from transformers import DeepseekV3Config

    config = tiny(q_lora_rank=None, rope_theta=50000.0, rope_scaling=scaling, num_nextn_predict_layers=1)
    newer = DeepseekV3Config(**config.to_dict()).to_dict()
    assert "rope_parameters" in newer and "rope_theta" not in newer
    assert Config.from_dict(newer) == config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "mixtral"}, "mixtral"),
        ({"model_type": ["deepseek_v3"]}, "model_type"),
        ({"scoring_func": "softmax"}, "softmax"),
        ({"topk_method": "group_limited_greedy"}, "group_limited_greedy"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_interleave": False}, "rope_interleave"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "linear"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "original_max_position_embeddings"),
        ({"n_group": 7}, "n_group"),
        ({"topk_group": 9}, "topk_group"),
        ({"n_group": 256, "topk_group": 256}, "n_group"),
        ({"num_experts_per_tok": 129}, "129"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim"),
        ({"hidden_size": "large"}, "hidden_size"),
        ({"kv_lora_rank": "512"}, "kv_lora_rank"),
        ({"v_head_dim": 12.5}, "v_head_dim"),
        ({"q_lora_rank": 0}, "q_lora_rank"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers"),
        ({"vocab_size": True}, "vocab_size"),
        ({"rope_theta": "10000"}, "rope_theta"),
        ({"rope_scaling": "yarn"}, "rope_scaling"),
        ({"rope_scaling": {"type": "yarn", "factor": "40", "original_max_position_embeddings": 4096}}, "factor"),
        ({"rope_parameters": [1], "rope_scaling": None}, "rope_scaling"),
    ],
)
def test_another_architecture_is_one_clear_line(change, named):
    with pytest.raises(UserError, match=named) as caught:
        Config.from_dict(V3_FILE | change)
    assert "\n" not in str(caught.value)
