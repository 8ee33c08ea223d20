"""Which version of each hot loop runs. Callers import from here; every version equals `reference`.

What takes whole blocks of a model on weights in panels is compiled: kernels/native.py, called by model/fused.py.
"""

from finback.kernels.attention import attention
from finback.kernels.cross_entropy import cross_entropy
from finback.kernels.heads import keys_values
from finback.kernels.latent import latent_attention, per_head
from finback.kernels.linear import linear
from finback.kernels.norm import add_norm, rms_norm
from finback.kernels.order import expert_ffn, expert_loop, expert_stream, fixed_order
from finback.kernels.rotary import rotate
from finback.kernels.scores import scores
from finback.kernels.swiglu import swiglu

__all__ = [
    "add_norm",
    "attention",
    "cross_entropy",
    "expert_ffn",
    "expert_loop",
    "expert_stream",
    "fixed_order",
    "keys_values",
    "latent_attention",
    "linear",
    "per_head",
    "rms_norm",
    "rotate",
    "scores",
    "swiglu",
]
