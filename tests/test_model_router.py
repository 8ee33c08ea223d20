"""The router: what is chosen, what it weighs, what is counted, and the balance loss; oracles are loops."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import tiny, tiny_model, tokens
from torch import Tensor

from finback.kernels import native
from finback.model.moe import Router
from finback.train.losses import update_biases

SCALE = 2.5


def router(bias: Tensor | None = None, **changes) -> Router:
    """A router whose logits are its input: as many hidden numbers as experts, and the identity as weight."""
    config = tiny(**{"hidden_size": 8, "n_routed_experts": 8, "routed_scaling_factor": SCALE} | changes)
    made = Router(config, layer=1)
    with torch.no_grad():
        made.weight.copy_(torch.eye(config.n_routed_experts))
        if bias is not None:
            made.e_score_correction_bias.copy_(bias)
    return made.eval()


def logits(scores: list[float]) -> Tensor:
    """Inputs [1, 1, E] that give these sigmoid scores."""
    return torch.logit(torch.tensor(scores)).view(1, 1, -1)


def chosen(made: Router, x: Tensor) -> list[dict[int, float]]:
    experts, weights = made(x, None)
    return [dict(zip(e, w, strict=True)) for e, w in zip(experts.tolist(), weights.tolist(), strict=True)]


def by_hand(
    scores: list[float], bias: list[float], groups: int, kept: int, k: int, normalised: bool
) -> dict[int, float]:
    """V3 TR 2.1.2 with the checkpoint's group score, one token."""
    choice = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(scores) // groups
    group_scores = [sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
    best = sorted(range(groups), key=group_scores.__getitem__)[-kept:]
    allowed = [e for e in range(len(scores)) if groups == 1 or e // size in best]
    picked = sorted(allowed, key=choice.__getitem__)[-k:]
    total = sum(scores[e] for e in picked) if normalised else 1.0
    return {e: SCALE * scores[e] / total for e in picked}


eight = st.lists(st.integers(-300, 300), min_size=8, max_size=8, unique=True)


@settings(max_examples=150)
@given(eight, eight, st.sampled_from([(1, 1, 3), (2, 1, 3), (4, 2, 3), (4, 1, 2), (4, 3, 6)]), st.booleans())
def test_the_choice_and_its_weights_follow_the_definition(raw, biases, shape, normalised):
    groups, kept, k = shape
    x, bias = torch.tensor(raw).view(1, 1, 8) / 100, torch.tensor(biases) / 77.0
    settings_ = {"n_group": groups, "topk_group": kept, "num_experts_per_tok": k, "norm_topk_prob": normalised}
    scores = x.sigmoid().flatten().tolist()
    expected = by_hand(scores, bias.tolist(), groups, kept, k, normalised)
    assert chosen(router(bias, **settings_), x)[0] == pytest.approx(expected, rel=1e-5)


def test_without_bias_and_groups_it_is_plain_top_k():
    x = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(0))
    top = x.flatten(0, 1).topk(3).indices
    assert [set(c) for c in chosen(router(), x)] == [set(row) for row in top.tolist()]


def test_weights_sum_to_the_scaling_factor():
    x = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(0))
    _, weights = router(torch.linspace(-1, 1, 8))(x, None)
    torch.testing.assert_close(weights.sum(-1), torch.full((40,), SCALE))


def test_a_bias_moves_the_choice_and_never_a_weight():
    """Without normalisation an expert that stays chosen keeps its weight exactly; with it, ratios stay."""
    x = torch.randn(1, 200, 8, generator=torch.Generator().manual_seed(1))
    bias = torch.tensor([1.0, -1.0, 0.5, 0.0, -0.5, 0.2, -0.2, 0.7])
    changed = 0
    for before, after in zip(
        chosen(router(norm_topk_prob=False), x), chosen(router(bias, norm_topk_prob=False), x), strict=True
    ):
        changed += before.keys() != after.keys()
        for expert in before.keys() & after.keys():
            assert before[expert] == after[expert]
    assert changed > 50
    for before, after in zip(chosen(router(), x), chosen(router(bias), x), strict=True):
        stay = sorted(before.keys() & after.keys())
        ratios = [before[e] / after[e] for e in stay]
        assert ratios == pytest.approx([ratios[0]] * len(ratios) if ratios else [], rel=1e-5)


def test_masked_groups_stay_out_when_every_biased_score_is_negative():
    """With 0 in place of -inf, the dropped experts would win: 0 is more than any of these."""
    made = router(torch.full((8,), -5.0), n_group=4, topk_group=1, num_experts_per_tok=2)
    (choice,) = chosen(made, logits([0.1, 0.2, 0.3, 0.4, 0.8, 0.7, 0.5, 0.6]))
    assert choice.keys() == {4, 5}


def test_a_group_is_scored_by_its_two_best_together():
    """Group 0 holds the single best expert, group 1 the better pair."""
    made = router(n_group=2, topk_group=1, num_experts_per_tok=2)
    (choice,) = chosen(made, logits([0.95, 0.1, 0.1, 0.1, 0.7, 0.6, 0.1, 0.1]))
    assert choice.keys() == {4, 5}


@pytest.mark.parametrize("path", ["torch", None])
def test_scores_are_float32_whatever_the_input_and_autocast(path, monkeypatch):
    """In bf16 these two scores are equal and their order is lost."""
    monkeypatch.setattr(native, "_level", native.find(path))
    made = router(num_experts_per_tok=1)
    with torch.no_grad():
        made.weight[3, 3] = 1.001
    x = torch.zeros(1, 1, 8, dtype=torch.bfloat16)
    x[..., 2:4] = 1.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        experts, weights = made(x, None)
    assert experts.item() == 3
    assert weights.dtype == torch.float32


def test_replayed_routing_gives_the_same_output_and_the_router_still_learns():
    model, ids = tiny_model(tiny(n_group=4, topk_group=2, num_nextn_predict_layers=1)), tokens(2, 12)
    record: dict[int, Tensor] = {}
    first = model(ids, routing=record)
    assert sorted(record) == [1, 2]
    assert all(experts.shape == (24, 3) for experts in record.values())
    for _, other in model.routers():
        other.e_score_correction_bias.uniform_(-5, 5)
    assert (model(ids) - first).abs().max() > 1e-3
    again = model(ids, routing=dict(record))
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    again.logsumexp(-1).sum().backward()
    assert model.decoder.layers["1"].mlp.gate.weight.grad.abs().max() > 0


def test_the_choice_is_outside_the_gradient():
    """The bias is a buffer: no optimiser sees it, and it is saved."""
    model = tiny_model(tiny())
    assert not [name for name, _ in model.named_parameters() if "bias" in name]
    saved = [name for name in model.state_dict() if "e_score_correction_bias" in name]
    assert len(saved) == 2
    assert not [name for name in model.state_dict() if name.endswith(".load")]


# Balancing


def test_load_counts_every_choice_of_every_training_step():
    made = router().train()
    x = torch.randn(3, 10, 8, generator=torch.Generator().manual_seed(3))
    counts = torch.zeros(8)
    for _ in range(2):
        experts, _ = made(x, None)
        counts += torch.bincount(experts.flatten(), minlength=8)
    torch.testing.assert_close(made.load, counts)
    made.eval()(x, None)
    torch.testing.assert_close(made.load, counts)


def test_moving_the_bias_against_the_load_evens_it_out():
    """V3 TR 2.1.2: up for an expert with less than the mean, down for one with more."""
    made = router(num_experts_per_tok=2).train()
    x = torch.randn(4, 64, 8, generator=torch.Generator().manual_seed(4)) + torch.linspace(-2, 2, 8)
    model, worst = SimpleNamespace(routers=lambda: [("the one", made)]), []
    for _ in range(300):
        before = made.e_score_correction_bias.clone()
        with torch.no_grad():
            made(x, None)
        load = made.load.clone()
        worst.append(update_biases(model, gamma=0.005))
        moved = 0.005 * (load.mean() - load).sign()
        torch.testing.assert_close(made.e_score_correction_bias, before + moved)
        assert not made.load.any()
    assert worst[0] > 2.0
    assert worst[-1] < 1.15


def paper_balance(x: Tensor, weight: Tensor, experts: Tensor, k: int) -> Tensor:
    """V3 TR eq. 17–20 for one sequence x [T, D], alpha left out; in the dtype of x."""
    length, n_experts = len(x), len(weight)
    total = x.new_zeros(())
    scores = torch.sigmoid(x @ weight.T)
    for i in range(n_experts):
        f = n_experts / (k * length) * sum(int(i in row) for row in experts.tolist())
        p = sum(scores[t, i] / scores[t].sum() for t in range(length)) / length
        total = total + f * p
    return total


def test_balance_loss_is_the_papers_averaged_over_sequences():
    made = router(torch.linspace(-0.5, 0.5, 8)).train()
    x = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(5))
    experts, _ = made(x, None)
    expected = [paper_balance(x[b], made.weight, experts[6 * b : 6 * b + 6], k=3) for b in range(3)]
    torch.testing.assert_close(made.balance_loss, torch.stack(expected).mean(), rtol=1e-5, atol=1e-6)


def test_balance_loss_of_even_routing_is_one():
    """All scores equal: every P_i is 1/E, and Σ f_i = E whatever is chosen."""
    made = router().train()
    made(torch.zeros(2, 8, 8), None)
    assert made.balance_loss.item() == pytest.approx(1.0, rel=1e-5)


def test_balance_gradient_equals_finite_differences():
    made = router().double().train()
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    routing: dict[int, Tensor] = {}
    made(x, routing)
    made.balance_loss.backward()
    gradient, step = made.weight.grad.clone(), 1e-6

    def loss() -> float:
        made(x, routing)
        return made.balance_loss.item()

    for row, column in ((0, 0), (3, 5), (7, 2)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                made.weight[row, column] += sign * step
            values.append(loss())
            with torch.no_grad():
                made.weight[row, column] -= sign * step
        assert gradient[row, column].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5, abs=1e-9)


def test_nothing_is_observed_outside_training():
    made = router()
    made(torch.zeros(1, 4, 8), None)
    assert made.balance_loss is None
    assert math.isclose(made.load.sum().item(), 0.0)
