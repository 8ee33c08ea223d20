"""Which dtype a computation runs in."""

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The autocast dtype where autocast is on, else the tensor's own: what a matrix product of torch would take."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def wide_dtype(x: Tensor) -> torch.dtype:
    """float32; float64 where x already is, which finite differences and enumerations need."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """x in its `wide_dtype`."""
    return x.to(wide_dtype(x))
