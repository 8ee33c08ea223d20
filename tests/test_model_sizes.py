"""Analytic counts: DeepSeek-V3's published numbers, and a count of what is really built."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import tiny

from finback.errors import UserError
from finback.model import Config, Model
from finback.model.sizes import attention_parameters, cache_numbers, flops_per_token, sizes


def built(config: Config) -> Model:
    with torch.device("meta"):
        return Model(config)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_v3_has_671_billion_parameters():
    counts = sizes(Config())
    assert counts.total == 671_026_404_352
    assert counts.total + 58 * 256 == 671_026_419_200
    model = built(Config())
    assert count(model) == counts.total
    assert sum(bias.numel() for name, bias in model.named_buffers() if name.endswith("correction_bias")) == 58 * 256


def test_v3_parts():
    counts = sizes(Config())
    assert counts.embedding == counts.head == 129280 * 7168
    assert attention_parameters(Config()) + 1536 + 512 == 187_107_328  # facts 1.1 count the two latent norms
    assert counts.dense_mlp == 3 * 396_361_728
    assert counts.routed_experts == 58 * 256 * 44_040_192


def test_v3_active_parameters():
    counts = sizes(Config())
    assert round(counts.active_without_embedding / 1e9, 2) == 36.63
    assert round(counts.active / 1e9, 2) == 37.55


def test_v3_mtp_module():
    """11.5 B without, 11.610 B with eh_proj and norms (facts 1.1)."""
    counts = sizes(Config(num_nextn_predict_layers=1))
    assert round(counts.mtp / 1e9, 3) == 11.610
    assert counts.total == 671_026_404_352


def test_v3_cache_is_70_272_bytes_a_token_in_bf16():
    assert cache_numbers(Config()) == 576 * 61 == 35_136
    assert 2 * cache_numbers(Config()) == 70_272
    assert cache_numbers(Config(num_nextn_predict_layers=1), mtp=True) == 35_136 + 576


def test_flops_of_a_token_are_twice_its_weights_plus_attention():
    """For a dense model, 2 · (every matrix), and per attended token 2 · heads · (192 + 128) a layer."""
    config = Config()
    weights = sizes(config).active_without_embedding - sizes(config).norms
    per_pair = 2 * 61 * 128 * (192 + 128)
    assert flops_per_token(config, 1000) - flops_per_token(config, 0) == 1000 * per_pair
    assert flops_per_token(config, 0) == 2 * weights


@settings(max_examples=60)
@given(st.data())
def test_every_part_equals_what_is_built(data):
    config = tiny(
        q_lora_rank=data.draw(st.sampled_from([None, 10])),
        num_hidden_layers=data.draw(st.integers(1, 4)),
        first_k_dense_replace=data.draw(st.integers(0, 5)),
        n_shared_experts=data.draw(st.integers(1, 2)),
        num_nextn_predict_layers=data.draw(st.integers(0, 2)),
        tie_word_embeddings=data.draw(st.booleans()),
        v_head_dim=data.draw(st.integers(1, 9)),
    )
    model, counts = built(config), sizes(config)
    assert count(model.decoder) == counts.total
    assert count(model.mtp) == counts.mtp
    blocks = list(model.decoder.layers.values())
    attention = sum(p.numel() for b in blocks for n, p in b.self_attn.named_parameters() if "layernorm" not in n)
    assert attention == counts.attention == len(blocks) * attention_parameters(config)
    assert sum(p.numel() for n, p in model.decoder.named_parameters() if "norm" in n) == counts.norms
    mixtures = [b.mlp for b in blocks if hasattr(b.mlp, "experts")]
    assert sum(count(m.experts) for m in mixtures) == counts.routed_experts
    assert sum(count(m.shared_experts) for m in mixtures) == counts.shared_experts
    assert sum(count(m.gate) for m in mixtures) == counts.router
    assert sum(count(b.mlp) for b in blocks if not hasattr(b.mlp, "experts")) == counts.dense_mlp


def test_flops_equal_those_torch_counts():
    """torch's own counter on one row of the naive form, where each token attends to all T by its matrix products."""
    from torch.utils.flop_counter import FlopCounterMode

    from finback.kernels import reference

    config, T = tiny(first_k_dense_replace=9, n_group=1), 6
    model = Model(config)
    model.init_weights(0)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("finback.kernels.dispatch.attention", reference.attention)
        model(torch.zeros(1, T, dtype=torch.long))
    assert counter.get_total_flops() == T * flops_per_token(config, T)


def test_a_size_that_cannot_be_is_refused():
    with pytest.raises(UserError, match="n_group"):
        tiny(n_group=3)
