"""The terms of the training loss, each with its own denominator over the whole step.

A step may be cut into parts whose gradients add up. Every cross-entropy is therefore divided by the number of targets
of the whole step, counted before, and never by a part's: the gradient does not depend on how the step was cut.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from finback.kernels import dispatch
from finback.kernels.reference import IGNORED
from finback.model import Model
from finback.train.data import Batch
from finback.train.recipe import Stage


@dataclass(frozen=True)
class Terms:
    """One part's share of the step's loss: `total` carries the graph, the others are for the log, unscaled."""

    total: Tensor
    next_token: Tensor
    mtp: Tensor
    balance: Tensor


def denominators(batch: Batch, depth: int) -> list[int]:
    """The number of targets at offsets 1 (the next token) to 1 + depth (those of MTP), at least 1 each."""
    return [max(1, int((batch.targets(offset) != IGNORED).sum())) for offset in range(1, depth + 2)]


def compute(model: Model, part: Batch, counts: list[int], parts: int, stage: Stage) -> Terms:
    """Next-token, MTP and balance losses of one part, from one forward pass of a model in training mode.

    total = L_next + mtp_lambda / D x Σ L_mtp (V3 TR eq. 24–25) + balance_alpha x Σ over layers of L_bal (eq. 17).
    """
    sequence, positions = part.sequence, part.positions_BT
    hidden_BTD = model.decoder(part.ids_BW[:, :sequence], positions=positions)
    next_token = _cross_entropy(model, hidden_BTD, part.targets(1)) / counts[0]
    mtp = torch.zeros_like(next_token)
    modules = list(model.mtp.values()) if stage.mtp_lambda else []
    for depth, module in enumerate(modules, start=1):
        embeds_BTD = model.decoder.embed_tokens(part.ids_BW[:, depth : depth + sequence])
        hidden_BTD = module(hidden_BTD, embeds_BTD, positions=positions)
        mtp = mtp + _cross_entropy(model, hidden_BTD, part.targets(1 + depth)) / (counts[depth] * len(modules))
    balance = _balance(model, bool(modules), next_token) / parts
    total = next_token + stage.mtp_lambda * mtp + stage.balance_alpha * balance
    return Terms(total, next_token.detach(), mtp.detach(), balance.detach())


def _cross_entropy(model: Model, hidden_BTD: Tensor, targets_BT: Tensor) -> Tensor:
    """The sum over all targets that are not IGNORED."""
    return dispatch.cross_entropy(hidden_BTD.flatten(0, 1), model.decoder.lm_head.weight.dense(), targets_BT.flatten())


def _balance(model: Model, with_mtp: bool, like: Tensor) -> Tensor:
    """Σ over the layers that ran; each is a mean over the part's rows."""
    total = torch.zeros_like(like)
    for name, router in model.routers():
        if with_mtp or not name.startswith("mtp."):
            assert router.balance_loss is not None, f"{name} did not run in training mode"
            total = total + router.balance_loss
    return total


@torch.no_grad()
def update_biases(model: Model, gamma: float) -> float:
    """Move every correction bias by gamma against the load of the whole step, and forget the load.

    V3 TR 2.1.2: + for experts below the mean, - above. Returns the worst router's ratio of largest to mean load.
    """
    worst = 0.0
    for _, router in model.routers():
        mean = router.load.mean()
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias += gamma * torch.sign(mean - router.load)
        worst = max(worst, float(router.load.max() / mean.clamp(min=1e-9)))
        router.load.zero_()
    return worst
