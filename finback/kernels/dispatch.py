"""Which version of each hot loop runs. Callers import from here; every version equals `reference`."""

from finback.kernels.attention import attention
from finback.kernels.cross_entropy import cross_entropy
from finback.kernels.experts import expert_ffn, expert_stream
from finback.kernels.norm import rms_norm
from finback.kernels.reference import expert_loop, latent_attention
from finback.kernels.rotary import rotate

__all__ = [
    "attention",
    "cross_entropy",
    "expert_ffn",
    "expert_loop",
    "expert_stream",
    "latent_attention",
    "rms_norm",
    "rotate",
]
