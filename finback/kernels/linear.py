"""x Wᵀ. For one or two rows of bfloat16 torch's own matrix-vector product reads memory twice as fast as oneDNN's here.

Measured on AVX-512: 115 against 230 us for 1024 x 1536 out of memory, 27 against 14 GB/s (LOG.md, the engine).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

FEW = 2
_WIDE = torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] times weight [out, in]ᵀ."""
    if x.dtype == torch.bfloat16 and x.numel() <= FEW * x.shape[-1] and _free(x, weight):
        before = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)
        try:
            return F.linear(x, weight)
        finally:
            torch._C._set_mkldnn_enabled(before)
    return F.linear(x, weight)


def _free(x: Tensor, weight: Tensor) -> bool:
    """Whether nothing but speed depends on the way: no gradient, no autocast, the CPU, a dtype in common."""
    plain = weight.dtype == x.dtype and x.device.type == "cpu" and _WIDE
    return plain and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
