"""The only modules that multiply by a weight matrix: `Linear` and `Experts` (and the gather of `Embedding`)."""

import torch
from torch import Tensor, nn

from finback.kernels import dispatch
from finback.model.weight import DenseWeight, Weight


class Linear(nn.Module):
    """y = x Wᵀ (+ bias, which only Qwen2's queries, keys and values have). W is [out_features, in_features]."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight: Weight = DenseWeight(out_features, in_features)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.weight.linear(x)
        return out if self.bias is None else out + self.bias


class Experts(nn.Module):
    """All routed experts of a layer, stacked: gate+up [E, 2F, D] (gate rows first) and down [E, D, F]."""

    def __init__(self, n_experts: int, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_up: Weight = DenseWeight(n_experts, 2 * width, hidden_size, parts=2)
        self.down: Weight = DenseWeight(n_experts, hidden_size, width)

    def forward(self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Sum over k of weights[n, k] · expert(experts[n, k])(x[n]); returns [N, D]."""
        gate_up, down = self.gate_up, self.down
        if gate_up.form is not None or down.form is not None:
            return dispatch.expert_loop(x_ND, gate_up.linear, down.linear, experts_NK, weights_NK)
        if isinstance(gate_up, DenseWeight) and isinstance(down, DenseWeight):
            return dispatch.expert_ffn(x_ND, gate_up.value, down.value, experts_NK, weights_NK)
        return dispatch.expert_stream(x_ND, gate_up.linear, down.linear, gate_up.shape[0], experts_NK, weights_NK)


class MLP(nn.Module):
    """SwiGLU feed-forward: down(silu(gate(x)) · up(x))."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, width)
        self.up_proj = Linear(hidden_size, width)
        self.down_proj = Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(dispatch.swiglu(self.gate_proj(x), self.up_proj(x)))


class RMSNorm(nn.Module):
    """x / rms(x) · weight, computed in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, added: Tensor | None = None, both: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Normed x; with `both` the pair of x + added (None adds nothing) and that normed."""
        if both:
            return dispatch.add_norm(x, added, self.weight, self.eps)
        return dispatch.rms_norm(x, self.weight, self.eps)
