"""AdamW and Muon: each matrix is treated as torch.optim.Muon treats it alone; the learning rate follows its course."""

import math
from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import tiny, tiny_model

from finback.train.optim import Muon, Optimizers, learning_rate, matrices, orthogonalise
from finback.train.recipe import Optimizer

SHAPES = {
    "tall.weight.value": (24, 8),
    "wide.weight.value": (8, 24),
    "square.weight.value": (12, 12),
    "mlp.experts.gate_up.value": (5, 16, 20),
    "mlp.experts.down.value": (5, 20, 8),
    "other.experts.down.value": (3, 20, 8),
}


def separate(name: str, value: torch.Tensor) -> list[torch.Tensor]:
    """The matrices of the paper's layout, written out: one per expert, gate and up apart."""
    if value.dim() == 2:
        return [value.clone()]
    pieces = []
    for expert in range(value.shape[0]):
        if "gate_up" in name:
            half = value.shape[1] // 2
            pieces += [value[expert, :half].clone(), value[expert, half:].clone()]
        else:
            pieces.append(value[expert].clone())
    return pieces


def test_muon_equals_torchs_muon_on_every_matrix_alone():
    generator = torch.Generator().manual_seed(0)
    ours = {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
    theirs = {name: [torch.nn.Parameter(m) for m in separate(name, p.detach())] for name, p in ours.items()}
    settings = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.1}
    muon = Muon(ours.items(), **settings)
    reference = torch.optim.Muon(chain(*theirs.values()), adjust_lr_fn="match_rms_adamw", **settings)
    for _ in range(4):
        for name, parameter in ours.items():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            for matrix, grad in zip(theirs[name], separate(name, parameter.grad), strict=True):
                matrix.grad = grad
        before = {name: parameter.detach().clone() for name, parameter in ours.items()}
        muon.step()
        reference.step()
        for name, parameter in ours.items():
            moved = (parameter.detach() - before[name]).norm()
            expected = torch.stack([m.detach() for m in theirs[name]])
            got = torch.stack(separate(name, parameter.detach()))
            # Both iterate in bfloat16; a wrong scale, axis or grouping is off by the size of the step itself.
            assert (got - expected).norm() < 0.02 * moved, name


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 40), (2, 40, 8)])
def test_orthogonalised_matrices_have_singular_values_near_one_and_the_same_directions(shape):
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    left, _, right = torch.linalg.svd(stack, full_matrices=False)
    got = orthogonalise(stack).float()
    values = (left.mT @ got @ right.mT).diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.3 and values.max() < 1.4  # Jordan 2024: about 0.7 to 1.2 for all but tiny values


def test_an_expert_without_tokens_only_decays():
    parameter = torch.nn.Parameter(torch.ones(2, 4, 4))
    parameter.grad = torch.stack((torch.zeros(4, 4), torch.randn(4, 4)))
    Muon([("experts.down.value", parameter)], lr=0.1, momentum=0.9, weight_decay=0.5).step()
    assert torch.allclose(parameter[0], torch.full((4, 4), 0.95))
    assert torch.isfinite(parameter).all() and not torch.allclose(parameter[1], parameter[0])


def test_matrices_of_gate_up_are_gate_and_up_of_each_expert():
    value = torch.arange(2 * 6 * 4).view(2, 6, 4)
    stack = matrices("decoder.layers.1.mlp.experts.gate_up.value", value)
    assert [m.tolist() for m in stack] == [m.tolist() for m in separate("gate_up", value)]


def muon_names(optimizers: Optimizers, model) -> set[str]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[p] for opt, _ in optimizers._all if isinstance(opt, Muon) for g in opt.param_groups for p in g["params"]
    }


def test_muon_takes_hidden_matrices_and_experts_and_nothing_else():
    model = tiny_model(tiny(num_nextn_predict_layers=1))
    got = muon_names(Optimizers(model, Optimizer(kind="muon", lr=0.1)), model)
    assert {"decoder.layers.1.mlp.experts.gate_up.value", "decoder.layers.0.self_attn.o_proj.weight.value"} <= got
    assert "mtp.3.eh_proj.weight.value" in got
    for name, parameter in model.named_parameters():
        outside = any(part in name for part in ("embed_tokens", "lm_head", "norm", "mlp.gate.weight"))
        assert (name in got) == (not outside), name
        assert outside or parameter.dim() > 1


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_moves_by_the_learning_rate_and_norms_do_not_decay(kind):
    model = tiny_model(tiny())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers = Optimizers(model, Optimizer(kind=kind, lr=0.1, weight_decay=0.5))
    optimizers.step(0.5)
    for name, parameter in model.named_parameters():
        factor = 1.0 if parameter.dim() == 1 else 1 - 0.1 * 0.5 * 0.5
        torch.testing.assert_close(parameter.detach(), before[name] * factor, msg=name)
        assert parameter.grad is None


def test_adamw_lr_is_for_what_muon_leaves():
    model = tiny_model(tiny())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    Optimizers(model, Optimizer(kind="muon", lr=0.1, adamw_lr=0.01, weight_decay=1.0)).step(1.0)
    state = dict(model.named_parameters())
    head, output = "decoder.lm_head.weight.value", "decoder.layers.0.self_attn.o_proj.weight.value"
    torch.testing.assert_close(state[head].detach(), before[head] * 0.99)
    torch.testing.assert_close(state[output].detach(), before[output] * 0.9)


def test_clipping_scales_all_gradients_to_the_limit_and_0_never_does():
    model = tiny_model(tiny())
    for clip, expected in ((1.0, 1.0), (0.0, None)):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        size = math.sqrt(sum(p.numel() for p in model.parameters()))
        norm = float(Optimizers(model, Optimizer(lr=0.1, clip=clip)).clip())
        after = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
        assert norm == pytest.approx(size, rel=1e-4)
        assert after == pytest.approx(expected or size, rel=1e-4)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_loaded_state_continues_bit_for_bit(kind):
    settings = Optimizer(kind=kind, lr=0.01)

    def steps(model, optimizers, seeds):
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizers.step(1.0)

    whole, parted = tiny_model(tiny()), tiny_model(tiny())
    steps(whole, Optimizers(whole, settings), range(4))
    first = Optimizers(parted, settings)
    steps(parted, first, range(2))
    second = Optimizers(parted, settings)
    second.load({name: value.clone() for name, value in first.tensors().items()})
    steps(parted, second, range(2, 4))
    for a, b in zip(whole.parameters(), parted.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_rate_of_v3_warms_up_linearly_stays_and_falls_as_a_cosine():
    settings = Optimizer(lr=1.0, warmup=4, decay="cosine", decay_share=0.5, final=0.1)
    rates = [learning_rate(settings, step, 20) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:10] == [1.0] * 6
    assert rates[14] == pytest.approx(0.1 + 0.9 * 0.5)
    assert rates[-1] == pytest.approx(0.1)


@given(
    steps=st.integers(1, 60),
    warm=st.floats(0, 0.99),
    decay=st.sampled_from(["constant", "linear", "cosine"]),
    share=st.floats(0.01, 1),
    final=st.floats(0, 1),
)
def test_the_rate_rises_then_never_rises_and_ends_at_its_final_share(steps, warm, decay, share, final):
    warmup = int(warm * steps)
    settings = Optimizer(lr=1.0, warmup=warmup, decay=decay, decay_share=share, final=final)
    rates = [learning_rate(settings, step, steps) for step in range(steps)]
    assert rates[:warmup] == [(n + 1) / warmup for n in range(warmup)]
    rest = rates[warmup:]
    assert all(before >= after - 1e-12 for before, after in pairwise(rest))
    assert rest[-1] == pytest.approx(1.0 if decay == "constant" else final, abs=1e-9)
