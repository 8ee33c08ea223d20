"""Keys and values of latent attention, keys built natively in one pass over memory, both their gradients in another.

Values stay where they are: attention takes them as a part of wider rows.
"""

from typing import Any

import torch
from torch import Tensor

from finback.kernels import native, reference


def keys_values(expanded: Tensor, shared: Tensor, own: int) -> tuple[Tensor, Tensor]:
    """As `reference.keys_values`."""
    if native.training(expanded) is None:
        return reference.keys_values(expanded, shared, own)
    return _KeysValues.apply(expanded, shared.type_as(expanded), own)


def _dense(x_BTHd: Tensor) -> Tensor:
    """[tokens, heads, ·] whose last numbers lie side by side; copied only if they do not."""
    x_NHd = x_BTHd.flatten(0, 1)
    return x_NHd if x_NHd.stride(-1) == 1 else x_NHd.contiguous()


def _address(x_NHd: Tensor) -> tuple[int, int, int]:
    return x_NHd.data_ptr(), x_NHd.stride(0), x_NHd.stride(1)


class _KeysValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, expanded: Tensor, shared: Tensor, own: int) -> tuple[Tensor, Tensor]:
        batch, tokens, heads, both = expanded.shape
        turned = shared.shape[-1]
        ctx.module, ctx.sizes = native.kernels(), (batch * tokens, heads, own, turned, both - own)
        key = expanded.new_empty(batch, tokens, heads, own + turned)
        expanded_NHd, shared_NR = _dense(expanded), native.rows(shared)
        parts = (*_address(expanded_NHd), *native.address(shared_NR), key.data_ptr())
        ctx.module.keys(*ctx.sizes[:4], expanded.dtype == torch.float32, *parts, torch.get_num_threads())
        return key, expanded[..., own:]

    @staticmethod
    def backward(ctx: Any, d_key: Tensor, d_value: Tensor) -> tuple[Tensor, Tensor, None]:
        _, heads, own, turned, width = ctx.sizes
        d_expanded = d_key.new_empty(*d_key.shape[:2], heads, own + width)
        d_shared = d_key.new_empty(*d_key.shape[:2], turned)
        key_NHd, value_NHd = _dense(d_key), _dense(d_value)
        parts = (*_address(key_NHd), *_address(value_NHd), d_expanded.data_ptr(), d_shared.data_ptr())
        ctx.module.keys_backward(*ctx.sizes, d_key.dtype == torch.float32, *parts, torch.get_num_threads())
        return d_expanded, d_shared, None
