"""How cached entries are stored: as they are, or the latent in 8 bits with a scale for every group of numbers.

An entry is what one token leaves in one layer: [latent | roped key], or [keys | values] of plain attention, all of it
"latent" with no roped key. The 8-bit layout is that of DeepSeek's own FP8 cache (FlashMLA: 512 E4M3 codes, 4 float32
scales, 64 bfloat16 of roped key: 656 bytes for V3): a row is [codes | float32 scales | bfloat16 roped key]. The roped
key stays wide because its rotation carries the position. Bounds of the error are in the classes' docstrings.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from finback.errors import UserError
from finback.kernels.quantise import E4M3_MAX
from finback.kernels.tiles import tiles

GROUP = 128
_TINY = 1e-12  # a group that is all zeros still needs a scale to divide by
_ALIGN = 4  # rows, and the scales inside them, are read as float32


class CacheFormat(ABC):
    """One entry's layout. latent, rope: numbers of each part. group: numbers that may share a scale (a head's size for
    plain attention). width: numbers an entry; width_bytes: bytes a row, a multiple of 4."""

    name: str
    width_bytes: int

    def __init__(self, latent: int, rope: int, group: int = GROUP) -> None:
        assert latent > 0 and rope >= 0 and group > 0, f"{latent} + {rope} in groups of {group}"
        self.latent, self.rope, self.width = latent, rope, latent + rope

    @abstractmethod
    def pack(self, entry_NC: Tensor, out_NB: Tensor | None = None) -> Tensor:
        """Rows of bytes [..., width_bytes], uint8, of entries [..., width] in any float dtype; in `out_NB` if given."""

    @abstractmethod
    def unpack(self, bytes_NB: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Entries [..., width] of rows of bytes; each value is rounded once, from float32 to `dtype`.

        Rows need a stride, and a first byte, at a multiple of 4. May be a view of `bytes_NB`: do not write to it.
        """


class _Plain(CacheFormat):
    dtype: torch.dtype

    def __init__(self, latent: int, rope: int, group: int = GROUP) -> None:
        super().__init__(latent, rope, group)
        self.width_bytes = _aligned(self.width * self.dtype.itemsize)

    def pack(self, entry_NC: Tensor, out_NB: Tensor | None = None) -> Tensor:
        out_NB = _rows(self, entry_NC, out_NB)
        self._numbers(out_NB).copy_(entry_NC)
        return out_NB

    def unpack(self, bytes_NB: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._numbers(bytes_NB).to(dtype)

    def _numbers(self, bytes_NB: Tensor) -> Tensor:
        return bytes_NB[..., : self.width * self.dtype.itemsize].view(self.dtype)


class Float32(_Plain):
    """Exact for float32."""

    name, dtype = "float32", torch.float32


class BFloat16(_Plain):
    """|x - x'| <= 2^-8 |x|, and subnormal numbers to 2^-134."""

    name, dtype = "bfloat16", torch.bfloat16


class _Grouped(CacheFormat):
    """The latent in groups of equal size, the last one filled up with zeros where they do not divide it.

    Zeros stay zeros. A group with NaN or infinity in it reads as such numbers, all of it: it has no scale.
    """

    limit: float  # the code of a group's largest number
    code_dtype: torch.dtype

    def __init__(self, latent: int, rope: int, group: int = GROUP) -> None:
        super().__init__(latent, rope, group)
        groups = -(-latent // group)
        self._grouped = (groups, -(-latent // groups))
        self._filled = groups * self._grouped[1]
        self._scales = _aligned(self._filled)
        self._rope = self._scales + 4 * groups
        self.width_bytes = _aligned(self._rope + 2 * rope)

    @abstractmethod
    def _round(self, scaled: Tensor) -> Tensor:
        """Numbers within -limit .. limit to what a copy to `code_dtype` must see; may work in place."""

    @abstractmethod
    def _decode(self, codes: Tensor) -> tuple[Tensor, float]:
        """Codes (int8) to numbers in any dtype, and what they are to be multiplied by."""

    def pack(self, entry_NC: Tensor, out_NB: Tensor | None = None) -> Tensor:
        out_NB = _rows(self, entry_NC, out_NB)
        latent = entry_NC[..., : self.latent].float()
        if self._filled > self.latent:
            latent = torch.nn.functional.pad(latent, (0, self._filled - self.latent))
        grouped = latent.unflatten(-1, self._grouped)
        scale = grouped.abs().amax(-1).clamp_(min=_TINY).div_(self.limit)
        codes = out_NB[..., : self._filled].view(self.code_dtype).unflatten(-1, self._grouped)
        codes.copy_(self._round(grouped / scale.unsqueeze(-1)))
        out_NB[..., self._scales : self._rope].view(torch.float32).copy_(scale)
        self._roped(out_NB).copy_(entry_NC[..., self.latent :])
        return out_NB

    def unpack(self, bytes_NB: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        out_NC = torch.empty(*bytes_NB.shape[:-1], self.width, dtype=dtype, device=bytes_NB.device)
        rows_NB, rows_NC = bytes_NB.flatten(0, -2), out_NC.view(-1, self.width)
        for rows in tiles(rows_NC):
            self._unpack(rows_NB[rows], rows_NC[rows])
        return out_NC

    def _unpack(self, bytes_NB: Tensor, out_NC: Tensor) -> None:
        numbers, factor = self._decode(bytes_NB[:, : self._filled].view(torch.int8))
        numbers = numbers.unflatten(-1, self._grouped)
        scale = bytes_NB[:, self._scales : self._rope].view(torch.float32).mul(factor).unsqueeze(-1)
        if self._filled == self.latent and out_NC.dtype == torch.float32:  # nothing between the codes and the result
            out_NC[:, : self.latent].unflatten(-1, self._grouped).copy_(numbers).mul_(scale)
        else:
            out_NC[:, : self.latent] = numbers.float().mul_(scale).flatten(-2)[:, : self.latent]
        out_NC[:, self.latent :] = self._roped(bytes_NB)

    def _roped(self, bytes_NB: Tensor) -> Tensor:
        return bytes_NB[..., self._rope : self._rope + 2 * self.rope].view(torch.bfloat16)


class Int8(_Grouped):
    """|x - x'| <= scale / 2 with scale = max |x| of the group / 127, up to float32's rounding (2^-16 of a scale)."""

    name, limit, code_dtype = "int8", 127.0, torch.int8

    def _round(self, scaled: Tensor) -> Tensor:
        return scaled.round_()

    def _decode(self, codes: Tensor) -> tuple[Tensor, float]:
        return codes, 1.0


class Fp8(_Grouped):
    """E4M3: |x - x'| <= 2^-4 |x|, for small ones 2^-10 scale, scale = max |x| of the group / 448 (rounding as int8)."""

    name, limit, code_dtype = "fp8", E4M3_MAX, torch.float8_e4m3fn

    def _round(self, scaled: Tensor) -> Tensor:
        return scaled

    def _decode(self, codes: Tensor) -> tuple[Tensor, float]:
        # Sign and the other bits one exponent bit apart are a float16: value x 2^-8, five times as fast as torch's way.
        return codes.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-0x4080).view(torch.float16), 256.0


CACHE_FORMATS: dict[str, type[CacheFormat]] = {kind.name: kind for kind in (Float32, BFloat16, Int8, Fp8)}


def cache_format(name: str, latent: int, rope: int, group: int = GROUP) -> CacheFormat:
    """The format `name` for entries of this shape. Raises UserError for a name that is none of CACHE_FORMATS."""
    if name not in CACHE_FORMATS:
        raise UserError(f"cache format {name!r}: must be one of {', '.join(CACHE_FORMATS)}")
    return CACHE_FORMATS[name](latent, rope, group)


def bytes_per_token(name: str, latent: int, rope: int, layers: int, group: int = GROUP) -> int:
    """Bytes that one token takes in all layers: 61 x 656 = 40,016 for V3 in fp8, 70,272 in bfloat16."""
    return layers * cache_format(name, latent, rope, group).width_bytes


def _aligned(count: int) -> int:
    return -(-count // _ALIGN) * _ALIGN


def _rows(layout: CacheFormat, entry_NC: Tensor, out_NB: Tensor | None) -> Tensor:
    """Where to pack: the caller's bytes, or new ones, zero where nothing is written (equal entries give equal rows)."""
    shape = (*entry_NC.shape[:-1], layout.width_bytes)
    if out_NB is None:
        return torch.zeros(shape, dtype=torch.uint8, device=entry_NC.device)
    assert out_NB.shape == shape and out_NB.dtype == torch.uint8, f"{out_NB.dtype} {tuple(out_NB.shape)} for {shape}"
    return out_NB
