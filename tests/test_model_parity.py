"""Our logits are those of transformers' DeepseekV3ForCausalLM, whatever the configuration."""

import pytest
import torch
from tiny_model import tiny, tiny_model, tokens, twin

from finback.model import RopeScaling

YARN = RopeScaling(factor=40, original_max_position_embeddings=32, mscale=1.0, mscale_all_dim=1.0)
GROUPS = {"n_group": 4, "topk_group": 2}

CASES = {
    "q_lora": {},
    "no q_lora": {"q_lora_rank": None},
    "groups": GROUPS,
    "groups of two, one kept": {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 2},
    "two shared experts": {"n_shared_experts": 2},
    "weights not normalised": {"norm_topk_prob": False, "routed_scaling_factor": 1.7},
    "YaRN": {"rope_scaling": YARN, "max_position_embeddings": 1280},
    "YaRN, unequal magnitudes": {
        "rope_scaling": RopeScaling(40, 32, mscale=0.9, mscale_all_dim=0.6),
        "max_position_embeddings": 1280,
        "rope_theta": 50000.0,
    },
    "odd sizes": {"qk_nope_head_dim": 7, "kv_lora_rank": 15, "q_lora_rank": 11, "v_head_dim": 9},
    "all dense": {"first_k_dense_replace": 3},
    "tied head": {"tie_word_embeddings": True},
    "everything": {**GROUPS, "n_shared_experts": 2, "rope_scaling": YARN, "max_position_embeddings": 1280},
}


def difference(model, ids) -> float:
    with torch.no_grad():
        ours, theirs = model(ids), twin(model)(ids).logits
    assert ours.dtype == torch.float32
    assert theirs.std() > 0.3, "the comparison needs logits that say something"
    return (ours - theirs).abs().max().item()


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name):
    """48 positions: beyond the 32 of the YaRN cases' original length."""
    assert difference(tiny_model(tiny(**CASES[name])), tokens(2, 48)) <= 1e-4


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_logits_equal_with_biases_that_change_the_selection(sign):
    """All biases of one sign and far apart; negative ones with groups need masking by -inf, not by 0."""
    model = tiny_model(tiny(**GROUPS))
    ids = tokens(2, 40)
    chosen = {}
    with torch.no_grad():
        for spread in (0.0, 1.0):
            for _, router in model.routers():
                router.e_score_correction_bias.copy_(sign * (1.5 + spread * torch.linspace(0, 1, 8)))
            assert difference(model, ids) <= 1e-4
            chosen[spread] = {}
            model(ids, routing=chosen[spread])
    moved = [(chosen[0.0][i].sort().values != chosen[1.0][i].sort().values).any(-1).float().mean() for i in (1, 2)]
    assert min(moved) > 0.2


def test_gradients_equal_transformers():
    """Backward too: the loss's gradient with respect to the router, a stack of experts and the embedding."""
    model = tiny_model(tiny(**GROUPS))
    other, ids = twin(model), tokens(2, 24)
    for logits in (model(ids), other(ids).logits):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    ours = dict(model.named_parameters())
    theirs = dict(other.named_parameters())
    for mine, name in (
        ("decoder.layers.1.mlp.gate.weight", "model.layers.1.mlp.gate.weight"),
        ("decoder.layers.1.mlp.experts.gate_up.value", "model.layers.1.mlp.experts.gate_up_proj"),
        ("decoder.layers.2.mlp.experts.down.value", "model.layers.2.mlp.experts.down_proj"),
        ("decoder.layers.0.self_attn.kv_b_proj.weight.value", "model.layers.0.self_attn.kv_b_proj.weight"),
        ("decoder.embed_tokens.weight", "model.embed_tokens.weight"),
    ):
        assert ours[mine].grad.abs().max() > 1e-4
        torch.testing.assert_close(ours[mine].grad, theirs[name].grad, atol=1e-5, rtol=1e-4)


def test_bfloat16_stays_close_to_float32():
    model = tiny_model(tiny())
    ids = tokens(2, 20)
    with torch.no_grad():
        exact = model(ids)
        for name, parameter in model.named_parameters():
            if "mlp.gate." not in name:
                parameter.data = parameter.data.bfloat16()
        rough = model(ids)
    assert rough.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(exact, rough, dim=-1).median() > 0.995
