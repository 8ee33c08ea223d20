"""One order of sums whatever else is computed: what makes results equal bit for bit in any batch.

The caller gives every pass the same number of rows (engine/batch.py, `tile`). Then only the mixture is left, where how
many rows an expert sees would depend on the others: in fixed order every chosen expert sees all of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from finback.kernels import experts, native, reference
from finback.kernels.reference import Product

_fixed = False


@contextmanager
def fixed_order(on: bool = True) -> Iterator[None]:
    """Within it the order of sums depends on the number of rows alone; in native kernels not even on that."""
    before = _fixed
    _fix(on)
    try:
        yield
    finally:
        _fix(before)


def _fix(on: bool) -> None:
    global _fixed
    _fixed = on
    native.fix_order(on)


def expert_ffn(x_ND: Tensor, gate_up: Tensor, down: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """As `reference.expert_ffn`."""
    if not _fixed:
        return experts.expert_ffn(x_ND, gate_up, down, experts_NK, weights_NK)

    def product(stack: Tensor) -> Product:
        return lambda x, expert: F.linear(x, stack[expert])

    return _all_rows(x_ND, product(gate_up), product(down), experts_NK, weights_NK)


def expert_loop(x_ND: Tensor, gate_up: Product, down: Product, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """As `reference.expert_loop`."""
    loop = _all_rows if _fixed else reference.expert_loop
    return loop(x_ND, gate_up, down, experts_NK, weights_NK)


def expert_stream(
    x_ND: Tensor, gate_up: Product, down: Product, n_experts: int, experts_NK: Tensor, weights_NK: Tensor
) -> Tensor:
    """As `reference.expert_ffn`, its products given as functions of (rows, expert)."""
    if _fixed:
        return _all_rows(x_ND, gate_up, down, experts_NK, weights_NK)
    return experts.expert_stream(x_ND, gate_up, down, n_experts, experts_NK, weights_NK)


def _all_rows(x_ND: Tensor, gate_up: Product, down: Product, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
    out_ND = torch.zeros_like(x_ND)
    for expert in experts_NK.unique().tolist():
        token, choice = (experts_NK == expert).nonzero(as_tuple=True)
        gate, up = gate_up(x_ND, expert).chunk(2, dim=-1)
        result = down(F.silu(gate) * up, expert)[token]
        out_ND.index_add_(0, token, (result * weights_NK[token, choice, None]).type_as(out_ND))
    return out_ND
