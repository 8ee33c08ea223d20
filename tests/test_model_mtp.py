"""Multi-token prediction: V3 TR 2.2 written out again in plain torch, with the checkpoint's order of the two halves."""

import torch
from tiny_model import tiny, tiny_model, tokens, twin
from torch import Tensor
from torch.nn import functional as F

CONFIG = tiny(num_nextn_predict_layers=1, first_k_dense_replace=1, n_group=4, topk_group=2)
LAYER = str(CONFIG.num_hidden_layers)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + CONFIG.rms_norm_eps) * weight


def by_hand(model, hidden_TD: Tensor, next_ids_T: Tensor) -> Tensor:
    """One row, one head and one token at a time: logits [T, V]."""
    w = {n.removeprefix(f"mtp.{LAYER}."): v for n, v in model.state_dict().items() if n.startswith("mtp.")}
    embeds = model.decoder.embed_tokens.weight[next_ids_T]
    joined = torch.cat((norm(embeds, w["enorm.weight"]), norm(hidden_TD, w["hnorm.weight"])), dim=-1)
    x = joined @ w["eh_proj.weight.value"].T
    x = x + attend(
        {n.removeprefix("block.self_attn."): v for n, v in w.items()}, norm(x, w["block.input_layernorm.weight"])
    )
    y = norm(x, w["block.post_attention_layernorm.weight"])
    x = x + torch.stack([mixture({n.removeprefix("block.mlp."): v for n, v in w.items()}, token) for token in y])
    return norm(x, w["norm.weight"]) @ model.decoder.lm_head.weight.dense().T


def attend(w: dict[str, Tensor], x: Tensor) -> Tensor:
    c, T = CONFIG, len(x)
    query = (norm(x @ w["q_a_proj.weight.value"].T, w["q_a_layernorm.weight"])) @ w["q_b_proj.weight.value"].T
    down = x @ w["kv_a_proj_with_mqa.weight.value"].T
    latent, shared = norm(down[:, : c.kv_lora_rank], w["kv_a_layernorm.weight"]), turn(down[:, c.kv_lora_rank :])
    up = latent @ w["kv_b_proj.weight.value"].T
    nope, width, outs = c.qk_nope_head_dim, c.qk_nope_head_dim + c.v_head_dim, []
    for head in range(c.num_attention_heads):
        q = query.view(T, c.num_attention_heads, -1)[:, head]
        kv = up[:, head * width : (head + 1) * width]
        scores = q[:, :nope] @ kv[:, :nope].T + turn(q[:, nope:]) @ shared.T
        scores = scores / (nope + c.qk_rope_head_dim) ** 0.5
        scores = scores + torch.full((T, T), float("-inf")).triu(1)
        outs.append(scores.softmax(-1) @ kv[:, nope:])
    return torch.cat(outs, dim=-1) @ w["o_proj.weight.value"].T


def turn(x_TR: Tensor) -> Tensor:
    out = x_TR.clone()
    for t in range(len(x_TR)):
        for pair in range(x_TR.shape[1] // 2):
            angle = torch.tensor(t * CONFIG.rope_theta ** (-2 * pair / x_TR.shape[1]))
            a, b = x_TR[t, 2 * pair], x_TR[t, 2 * pair + 1]
            out[t, 2 * pair] = a * angle.cos() - b * angle.sin()
            out[t, 2 * pair + 1] = a * angle.sin() + b * angle.cos()
    return out


def mixture(w: dict[str, Tensor], x_D: Tensor) -> Tensor:
    c = CONFIG
    scores = torch.sigmoid(w["gate.weight"] @ x_D)
    choice = (scores + w["gate.e_score_correction_bias"]).view(c.n_group, -1)
    kept = choice.topk(2).values.sum(-1).topk(c.topk_group).indices.tolist()
    for group in set(range(c.n_group)) - set(kept):
        choice[group] = float("-inf")
    picked = choice.flatten().topk(c.num_experts_per_tok).indices
    shared = {part: w[f"shared_experts.{part}_proj.weight.value"] for part in ("gate", "up", "down")}
    out = shared["down"] @ (F.silu(shared["gate"] @ x_D) * (shared["up"] @ x_D))
    for e in picked.tolist():
        gate, up = w["experts.gate_up.value"][e].chunk(2)
        weight = c.routed_scaling_factor * scores[e] / scores[picked].sum()
        out = out + weight * (w["experts.down.value"][e] @ (F.silu(gate @ x_D) * (up @ x_D)))
    return out


def mtp_logits(model, ids: Tensor) -> tuple[Tensor, Tensor]:
    """hidden [B, T, D] of the main model, and the logits of the module at positions 0..T-2."""
    (mtp,) = model.mtp.values()
    hidden = model.decoder(ids)
    return hidden, model.decoder.logits(mtp(hidden[:, :-1], model.decoder.embed_tokens(ids[:, 1:])))


@torch.no_grad()
def test_the_module_equals_the_paper_written_out():
    model, ids = tiny_model(CONFIG), tokens(2, 9)
    hidden, logits = mtp_logits(model, ids)
    for row in range(2):
        torch.testing.assert_close(logits[row], by_hand(model, hidden[row, :-1], ids[row, 1:]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_transformers_module_agrees():
    """transformers loads the MTP layer for speculation; its projection takes [enorm(embedding); hnorm(hidden)] too."""
    from transformers.modeling_layers import MtpModel

    model, ids = tiny_model(CONFIG), tokens(1, 9)
    theirs = MtpModel(twin(model), 1).eval()
    moved = {n.removeprefix(f"mtp.{LAYER}."): v for n, v in model.state_dict().items() if n.startswith("mtp.")}
    renamed = {
        "layers.0."
        + name.replace("block.", "mtp_block.")
        .replace("experts.gate_up.value", "experts.gate_up_proj")
        .replace("experts.down.value", "experts.down_proj")
        .removesuffix(".value"): value
        for name, value in moved.items()
        if not name.startswith("norm.")
    }
    renamed["layers.0.post_norm.weight"] = moved["norm.weight"]
    left = theirs.load_state_dict(renamed, strict=False)
    assert not left.unexpected_keys
    assert not [name for name in left.missing_keys if name.startswith("layers.")]
    hidden, logits = mtp_logits(model, ids)
    positions = torch.arange(8).unsqueeze(0)
    theirs_hidden = theirs.forward_layer(0, hidden[:, :-1], positions, None, input_ids=ids[:, 1:])
    torch.testing.assert_close(theirs.shared_head(theirs_hidden), logits, rtol=1e-4, atol=1e-4)


def test_it_learns_the_token_after_the_next_from_the_one_in_between():
    """Rows x0, x1, 2·x0 + x1 mod 7: h_0 knows x0 only, so nothing but x1's embedding can tell the target at i + 2."""
    config = tiny(
        num_nextn_predict_layers=1, num_hidden_layers=1, vocab_size=7, n_routed_experts=2, num_experts_per_tok=1
    )
    model = tiny_model(config).train()
    rows = torch.cartesian_prod(torch.arange(7), torch.arange(7))
    rows = torch.cat((rows, (2 * rows[:, :1] + rows[:, 1:]) % 7), dim=1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(120):
        _, logits = mtp_logits(model, rows)
        loss = F.cross_entropy(logits[:, 0], rows[:, 2])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.1


@torch.no_grad()
def test_position_i_sees_no_token_after_the_next():
    model, ids = tiny_model(CONFIG), tokens(1, 10)
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % CONFIG.vocab_size
    _, before = mtp_logits(model, ids)
    _, after = mtp_logits(model, changed)
    torch.testing.assert_close(before[:, :6], after[:, :6], rtol=1e-5, atol=1e-5)
    assert (before[:, 6] - after[:, 6]).abs().max() > 1e-3


def test_embedding_and_head_are_the_main_models():
    """The module owns neither; its loss reaches both, and the main model's layers through h_i."""
    model, ids = tiny_model(CONFIG), tokens(1, 8)
    assert not [name for name, _ in model.mtp.named_parameters() if "embed" in name or "head" in name]
    mtp_logits(model, ids)[1].logsumexp(-1).sum().backward()
    for parameter in (model.decoder.embed_tokens.weight, model.decoder.lm_head.weight.value):
        assert parameter.grad.abs().max() > 0
    assert model.decoder.layers["0"].mlp.down_proj.weight.value.grad.abs().max() > 0
