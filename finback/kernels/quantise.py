"""Weights in fewer bits: FP8 in blocks of 128 x 128, int8 by row, int4 by groups of 32 columns; on any device.

FP8 is DeepSeek-V3's own form (V3 TR 3.3; `inference/kernel.py`): value = E4M3 code x `scale_inv` of its block, the last
blocks of a matrix ragged. The other two are symmetric. Every format can be made and read in panels of whole blocks of
rows, which is how large matrices stream through little memory.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

BLOCK = 128
E4M3_MAX = 448.0
_GROUP = 32


class Format(ABC):
    """A matrix [..., R, C] as codes and scales. `suffix` is what the scales' name on disk adds to the matrix's."""

    name: str
    suffix: str
    code_dtype: torch.dtype
    scale_dtype: torch.dtype
    row_block = 1  # rows that share a scale

    @abstractmethod
    def shapes(self, rows: int, cols: int) -> tuple[tuple[int, int], tuple[int, ...]]:
        """Of codes and scales."""

    @abstractmethod
    def quantise(self, w_RC: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of a float matrix."""

    @abstractmethod
    def dequantise(self, codes: Tensor, scale: Tensor, cols: int, dtype: torch.dtype) -> Tensor:
        """The matrix [..., R, cols], each value rounded once, from float32 to `dtype`."""

    def scale_rows(self, rows: slice) -> slice:
        """The scales of these rows, which begin at a multiple of `row_block`."""
        return slice(rows.start // self.row_block, -(-rows.stop // self.row_block))


class Fp8(Format):
    """`power_of_two`: scales are rounded up to powers of two, V3.1's "ue8m0"."""

    name, suffix, row_block = "fp8", "_scale_inv", BLOCK
    code_dtype, scale_dtype = torch.float8_e4m3fn, torch.float32

    def __init__(self, power_of_two: bool = False) -> None:
        self.power_of_two = power_of_two

    def shapes(self, rows: int, cols: int) -> tuple[tuple[int, int], tuple[int, ...]]:
        return (rows, cols), (-(-rows // BLOCK), -(-cols // BLOCK))

    def quantise(self, w_RC: Tensor) -> tuple[Tensor, Tensor]:
        rows, cols = w_RC.shape[-2:]
        padded = torch.nn.functional.pad(w_RC.float(), (0, -cols % BLOCK, 0, -rows % BLOCK))
        amax = padded.abs().unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK)).amax((-3, -1))
        scale = amax.clamp(min=1e-12) / E4M3_MAX
        if self.power_of_two:
            scale = torch.exp2(scale.log2().ceil())
        return (w_RC.float() / _spread(scale, rows, cols)).clamp(-E4M3_MAX, E4M3_MAX).to(self.code_dtype), scale

    def dequantise(self, codes: Tensor, scale: Tensor, cols: int, dtype: torch.dtype) -> Tensor:
        # The code's bits one place into bfloat16's: its value x 2^-120, four times as fast as torch's conversion.
        bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(4).bitwise_and_(-0x7810)
        wide = bits.view(torch.bfloat16).mul_(2.0**120).float()
        return wide.mul_(_spread(scale.float(), *codes.shape[-2:])).to(dtype)


class Int8(Format):
    """One scale a row."""

    name, suffix = "int8", "_scale"
    code_dtype, scale_dtype = torch.int8, torch.float32

    def shapes(self, rows: int, cols: int) -> tuple[tuple[int, int], tuple[int, ...]]:
        return (rows, cols), (rows,)

    def quantise(self, w_RC: Tensor) -> tuple[Tensor, Tensor]:
        scale = w_RC.float().abs().amax(-1).clamp(min=1e-12) / 127
        return (w_RC.float() / scale.unsqueeze(-1)).round_().to(torch.int8), scale

    def dequantise(self, codes: Tensor, scale: Tensor, cols: int, dtype: torch.dtype) -> Tensor:
        return codes.float().mul_(scale.unsqueeze(-1)).to(dtype)


class Int4(Format):
    """Groups of 32 columns, codes -8..7, two to a byte: column j in the low half, j + 16 of its group in the high one.

    A group's scale is the one of several that leaves the least squared error.
    """

    name, suffix = "int4", "_scale"
    code_dtype, scale_dtype = torch.uint8, torch.bfloat16

    def shapes(self, rows: int, cols: int) -> tuple[tuple[int, int], tuple[int, ...]]:
        groups = -(-cols // _GROUP)
        return (rows, groups * _GROUP // 2), (rows, groups)

    def quantise(self, w_RC: Tensor) -> tuple[Tensor, Tensor]:
        grouped = torch.nn.functional.pad(w_RC.float(), (0, -w_RC.shape[-1] % _GROUP)).unflatten(-1, (-1, _GROUP))
        # Signed, so that the largest value itself can be the -8 that has no positive twin.
        largest = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))
        best_scale, best_error = torch.zeros_like(largest), torch.full_like(largest, float("inf"))
        for levels in (-8.0, -7.6, -7.2, -6.8, -8.4, -8.8, 7.0, 7.4):
            scale = (largest / levels).to(self.scale_dtype).float()
            error = (_int4_codes(grouped, scale) * scale - grouped).square().sum(-1, keepdim=True)
            better = error < best_error
            best_scale, best_error = torch.where(better, scale, best_scale), torch.where(better, error, best_error)
        codes = (_int4_codes(grouped, best_scale) + 8).to(torch.uint8)
        low, high = codes.chunk(2, dim=-1)
        return (low | high << 4).flatten(-2), best_scale.squeeze(-1).to(self.scale_dtype)

    def dequantise(self, codes: Tensor, scale: Tensor, cols: int, dtype: torch.dtype) -> Tensor:
        grouped = codes.unflatten(-1, (-1, _GROUP // 2))
        both = torch.cat((grouped & 15, grouped >> 4), dim=-1).float().sub_(8)
        return both.mul_(scale.float().unsqueeze(-1)).flatten(-2)[..., :cols].to(dtype)


FORMATS: dict[str, Format] = {"fp8": Fp8(), "int8": Int8(), "int4": Int4()}


def _int4_codes(grouped: Tensor, scale: Tensor) -> Tensor:
    return (grouped / torch.where(scale == 0, 1.0, scale)).round_().clamp_(-8, 7)


def _spread(scale: Tensor, rows: int, cols: int) -> Tensor:
    """A scale for every number: [..., ceil(R/128), ceil(C/128)] to [..., R, C]."""
    wide = scale.repeat_interleave(BLOCK, dim=-1)[..., :cols]
    return (
        wide.repeat_interleave(BLOCK, dim=-2)[..., :rows, :]
        if rows > BLOCK
        else wide.expand(*wide.shape[:-2], rows, cols)
    )
