"""Rotary positions, with the two ways the family stretches them: YaRN and Llama 3.1's.

V3 TR 4.3; V2 TR 3.1.4; DeepSeek-V3 `inference/model.py`. YaRN has two parts, slower frequencies and a larger softmax
scale, and both apply only to a model whose context was extended: `max_position_embeddings` greater than
`original_max_position_embeddings`.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from finback.model.config import Config, Llama3Scaling, RopeScaling


def _magnitude(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(config: Config) -> float:
    """(numbers of a head's query)^-1/2, times m(factor, mscale_all_dim)² where YaRN is on."""
    scale, scaling = config.query_dim**-0.5, config.active_scaling
    if isinstance(scaling, RopeScaling):
        return scale * _magnitude(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale


def correction_range(scaling: RopeScaling, rope_dim: int, theta: float) -> tuple[int, int]:
    """The first and last frequency index of YaRN's ramp: (10, 23) for V3."""

    def index(rotations: float) -> float:
        length = scaling.original_max_position_embeddings
        return rope_dim * math.log(length / (2 * math.pi * rotations)) / (2 * math.log(theta))

    low, high = math.floor(index(scaling.beta_fast)), math.ceil(index(scaling.beta_slow))
    return max(low, 0), min(high, rope_dim - 1)


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # kept: it may be used in training later
def inverse_frequencies(config: Config) -> Tensor:
    """Turn per position of each of the rope_dim / 2 pairs, in radians; float32 [rope_dim / 2]."""
    dim = config.rope_dim
    inverse = 1.0 / config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    scaling = config.active_scaling
    if scaling is None:
        return inverse
    if isinstance(scaling, Llama3Scaling):
        return _llama3(scaling, inverse)
    low, high = correction_range(scaling, dim, config.rope_theta)
    steps = torch.arange(dim // 2, dtype=torch.float32)
    ramp = ((steps - low) / max(high - low, 0.001)).clamp(0, 1)
    return inverse * (1 - ramp) + inverse / scaling.factor * ramp


def _llama3(scaling: Llama3Scaling, inverse: Tensor) -> Tensor:
    """Pairs that turn less than low_freq_factor times in the original context are slowed, fast ones are kept."""
    turns = scaling.original_max_position_embeddings * inverse / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return inverse * kept + inverse / scaling.factor * (1 - kept)


def rotation(config: Config, positions_BT: Tensor) -> Tensor:
    """Every pair's turn as a complex number (its angle; its length is YaRN's cos/sin factor), [B, T, rope_dim / 2]."""
    angles = positions_BT.float().unsqueeze(-1) * inverse_frequencies(config).to(positions_BT.device)
    scaling = config.active_scaling
    length = 1.0
    if isinstance(scaling, RopeScaling):
        length = _magnitude(scaling.factor, scaling.mscale) / _magnitude(scaling.factor, scaling.mscale_all_dim)
    return torch.polar(torch.full_like(angles, length), angles)
