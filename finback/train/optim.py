"""AdamW and Muon, the course of the learning rate, and which parameter is whose."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from finback.model import Model
from finback.train.recipe import Optimizer as Settings

# The quintic of Keller Jordan's Muon, as in torch.optim.Muon.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5


def learning_rate(settings: Settings, step: int, steps: int) -> float:
    """The share of `lr` that step 0..steps-1 uses: up to 1, level, then down to exactly `final` at the last step."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    falling = min(math.ceil(settings.decay_share * steps), steps - settings.warmup)
    progress = max(0.0, (step + 1 - (steps - falling)) / falling)
    if settings.decay == "constant":
        return 1.0
    shape = 1 - progress if settings.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return settings.final + (1 - settings.final) * shape


@torch.no_grad()
def orthogonalise(stack_GMN: Tensor) -> Tensor:
    """The nearest (roughly) orthogonal matrix of each matrix of a stack, by Newton–Schulz in bfloat16.

    The same iteration as torch.optim.Muon's, over all matrices at once. Singular values end within about 0.7..1.2.
    """
    tall = stack_GMN.shape[-2] > stack_GMN.shape[-1]
    x = stack_GMN.bfloat16()
    x = x.mT.contiguous() if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(_STEPS):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
        x = torch.baddbmm(x, gram, x, beta=_A)
    return x.mT if tall else x


def matrices(name: str, value: Tensor) -> Tensor:
    """A parameter as the stack [G, m, n] of the matrices it is made of.

    Stacked experts are one matrix each; gate and up, which share a tensor, are two, as in the checkpoint's layout.
    """
    if name.endswith("experts.gate_up.value"):
        experts, rows, columns = value.shape
        return value.view(2 * experts, rows // 2, columns)
    return value if value.dim() == 3 else value.unsqueeze(0)


class Muon(torch.optim.Optimizer):
    """Momentum whose every matrix is orthogonalised; equal to torch.optim.Muon on each matrix alone.

    The update has the size of AdamW's (`match_rms_adamw`: 0.2 x sqrt(max(m, n))). Matrices of one shape are one batch.
    Source: Jordan 2024; Liu et al. 2025 (arXiv 2502.16982).
    """

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], lr: float, momentum: float, weight_decay: float
    ) -> None:
        named = list(named)
        self._names = {parameter: name for name, parameter in named}
        super().__init__([p for _, p in named], {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        assert closure is None, "a closure is not supported"
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(parameters, group["lr"], group["momentum"], group["weight_decay"])

    def _update(self, parameters: list[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        grads = [p.grad for p in parameters if p.grad is not None]
        for p in parameters:
            self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        updates = torch._foreach_lerp(grads, buffers, momentum)  # Nesterov
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        shapes: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for parameter, update in zip(parameters, updates, strict=True):
            name = self._names[parameter]  # type: ignore[index]
            pair = matrices(name, parameter), matrices(name, update)
            _, rows, columns = pair[0].shape
            shapes.setdefault((rows, columns), []).append(pair)
        for shape, pairs in shapes.items():
            stack = orthogonalise(torch.cat([update.bfloat16() for _, update in pairs]))
            pieces = stack.split([len(values) for values, _ in pairs])
            for (values, _), piece in zip(pairs, pieces, strict=True):
                values.add_(piece, alpha=-lr * 0.2 * math.sqrt(max(shape)))


class Optimizers:
    """The optimisers of a stage as one: Muon, where chosen, for hidden matrices and experts; AdamW for the rest.

    The rest: embedding, head, router and everything one-dimensional. What is one-dimensional has no weight decay.
    """

    def __init__(self, model: Model, settings: Settings) -> None:
        self._settings = settings
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        hidden = {n: p for p, n in self._names.items() if settings.kind == "muon" and _is_hidden(n, p)}
        rest = [p for p, n in self._names.items() if n not in hidden]
        groups = [
            {"params": [p for p in rest if p.dim() > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in rest if p.dim() == 1], "weight_decay": 0.0},
        ]
        rate, (first, second) = settings.adamw_lr or settings.lr, settings.betas
        adamw = torch.optim.AdamW(groups, lr=rate, betas=(first, second), eps=settings.eps, fused=True)
        self._all: list[tuple[torch.optim.Optimizer, float]] = [(adamw, rate)]
        if hidden:
            muon = Muon(hidden.items(), settings.lr, settings.momentum, settings.weight_decay)
            self._all.append((muon, settings.lr))
        self._parameters = list(self._names)

    def clip(self) -> Tensor:
        """Scale the gradients down to the norm `clip` (0: never); returns their norm before.

        Where the norm is not finite they stay as they are, so that the guard can see which one is to blame.
        """
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if self._settings.clip and torch.isfinite(norm):
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._settings.clip, norm)
        return norm

    def step(self, share: float) -> None:
        """One update with `share` of every learning rate; gradients are gone afterwards."""
        for optimizer, rate in self._all:
            for group in optimizer.param_groups:
                group["lr"] = rate * share
            optimizer.step()
            optimizer.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """The state as "PARAMETER/NAME" -> tensor."""
        return {
            f"{self._names[parameter]}/{key}": value  # type: ignore[index]
            for optimizer, _ in self._all
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `tensors` gave."""
        states: dict[str, dict[str, Any]] = {}
        for name, value in tensors.items():
            parameter, _, key = name.rpartition("/")
            states.setdefault(parameter, {})[key] = value
        for optimizer, _ in self._all:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if self._names[parameter] in states:
                        optimizer.state[parameter] = states[self._names[parameter]]


def _is_hidden(name: str, parameter: Tensor) -> bool:
    outside = ("embed_tokens.weight", "lm_head.weight.value", "mlp.gate.weight")
    return parameter.dim() > 1 and not name.endswith(outside)
