"""The whole model's gradient against finite differences, in float64."""

import torch
from tiny_model import tiny, tiny_model, tokens
from torch import Tensor
from torch.nn import functional as F

from finback.model import RopeScaling


def test_directional_derivative_of_all_three_losses():
    """Every hand-written backward at once: next token, token after it, balance; routing replayed, as it is constant."""
    yarn = RopeScaling(40, 8, mscale=1.0, mscale_all_dim=0.5)
    config = tiny(num_nextn_predict_layers=1, n_group=4, topk_group=2, rope_scaling=yarn, max_position_embeddings=320)
    model = tiny_model(config).double().train()
    ids, routing = tokens(2, 10), {}
    positions = torch.tensor([[*range(10)], [*range(6), *range(4)]])

    def loss() -> Tensor:
        hidden = model.decoder(ids, positions=positions, routing=routing)
        main = F.cross_entropy(model.decoder.logits(hidden)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        embeds = model.decoder.embed_tokens(ids[:, 1:])
        (mtp,) = model.mtp.values()
        after = model.decoder.logits(mtp(hidden[:, :-1], embeds, positions=positions[:, :-1], routing=routing))
        balance = sum(router.balance_loss for _, router in model.routers())
        return main + 0.3 * F.cross_entropy(after[:, :-1].flatten(0, 1), ids[:, 2:].flatten()) + 0.1 * balance

    start = loss()
    assert start.dtype == torch.float64
    start.backward()
    generator, step = torch.Generator().manual_seed(0), 1e-6
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        expected = (parameter.grad * direction).sum()
        with torch.no_grad():
            parameter += step * direction
            above = loss()
            parameter -= 2 * step * direction
            below = loss()
            parameter += step * direction
        difference = (above - below) / (2 * step)
        assert abs(difference - expected) <= 1e-6 * max(1.0, abs(expected)), name
