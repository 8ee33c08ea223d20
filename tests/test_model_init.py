"""The paper's initialisation: every matrix normal with 0.006, norms 1, correction biases 0."""

import pytest
import torch
from tiny_model import tiny

from finback.model import Config, Model


def initialised(seed: int = 0, **changes) -> Model:
    model = Model(tiny(num_nextn_predict_layers=1, hidden_size=64, **changes))
    model.init_weights(seed)
    return model


def test_the_default_is_the_papers():
    assert Config().initializer_range == 0.006


def test_every_matrix_has_the_papers_deviation_and_every_norm_is_one():
    matrices = []
    for name, parameter in initialised().named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        assert abs(parameter.mean()) < 0.006 * 5 / parameter.numel() ** 0.5, name
        assert parameter.std().item() == pytest.approx(0.006, rel=5 / parameter.numel() ** 0.5), name
        matrices.append(parameter.flatten())
    assert torch.cat(matrices).std().item() == pytest.approx(0.006, rel=0.01)


def test_another_deviation_is_followed():
    model = initialised(initializer_range=0.5)
    assert model.decoder.lm_head.weight.dense().std().item() == pytest.approx(0.5, rel=0.1)


def test_the_seed_decides():
    one, same, other = (initialised(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["decoder.lm_head.weight.value"], other["decoder.lm_head.weight.value"])


def test_balancing_starts_from_zero_even_after_training():
    model = initialised()
    for _, router in model.routers():
        router.e_score_correction_bias += 3
        router.load += 3
    model.init_weights(0)
    for _, router in model.routers():
        assert not router.e_score_correction_bias.any()
        assert not router.load.any()
    assert len(list(model.routers())) == 3
