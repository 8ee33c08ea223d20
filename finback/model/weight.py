"""The one place a weight matrix lives: dense, or packed into fewer bits, behind the same calls."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finback.kernels import dispatch
from finback.kernels.quantise import Format

Index = tuple[int, ...]
"""Which matrix of a stack: () where there is one, else (expert, part)."""


class Weight(nn.Module, ABC):
    """A matrix [out, in], or a stack [E, parts · out, in] of them, in some storage form.

    `parts` matrices (an expert's gate and up) lie one below the other in the same rows. Where it is packed, `form` says
    how, and `dtype` what it stands for.
    """

    shape: tuple[int, ...]
    parts: int
    form: Format | None = None
    dtype: torch.dtype

    @abstractmethod
    def dense(self) -> Tensor:
        """The whole matrix, or stack, as an ordinary tensor."""

    @abstractmethod
    def linear(self, x: Tensor, expert: int | None = None) -> Tensor:
        """x Wᵀ, of one matrix or of one expert's: [..., in] to [..., parts · out]."""

    @abstractmethod
    def pieces(self) -> Iterator[tuple[Index, dict[str, Tensor]]]:
        """Every single matrix as the tensors it is stored in, by what their names on disk add: views."""

    @abstractmethod
    def fill(self, index: Index, start: int, values_RC: Tensor) -> None:
        """Store float rows start .. start + R - 1 of one matrix; start is a multiple of 128."""


class DenseWeight(Weight):
    """A plain parameter of any floating dtype."""

    def __init__(self, *shape: int, parts: int = 1) -> None:
        super().__init__()
        self.shape, self.parts = shape, parts
        self.value = nn.Parameter(torch.empty(*shape))

    def dense(self) -> Tensor:
        return self.value

    def linear(self, x: Tensor, expert: int | None = None) -> Tensor:
        return dispatch.linear(x, self.value if expert is None else self.value[expert])

    def pieces(self) -> Iterator[tuple[Index, dict[str, Tensor]]]:
        if len(self.shape) == 2:
            yield (), {"": self.value.data}
            return
        for expert, matrix in enumerate(self.value.data):
            yield from (((expert, part), {"": piece}) for part, piece in enumerate(matrix.chunk(self.parts)))

    def fill(self, index: Index, start: int, values_RC: Tensor) -> None:
        matrix = self.value.data
        if index:
            matrix = matrix[index[0]].chunk(self.parts)[index[1]]
        matrix[start : start + len(values_RC)].copy_(values_RC)


class PackedWeight(Weight):
    """Codes and scales of `form`; products dequantise a panel of rows at a time, so no dense copy ever stands."""

    form: Format
    codes: Tensor
    scale: Tensor

    def __init__(self, form: Format, like: Weight, dtype: torch.dtype) -> None:
        super().__init__()
        self.form, self.shape, self.parts, self.dtype = form, like.shape, like.parts, dtype
        self.rows, self.cols = self.shape[-2] // self.parts, self.shape[-1]
        codes, scale = form.shapes(self.rows, self.cols)
        stack = () if len(self.shape) == 2 else (self.shape[0], self.parts)
        self.register_buffer("codes", torch.empty(*stack, *codes, dtype=form.code_dtype))
        self.register_buffer("scale", torch.empty(*stack, *scale, dtype=form.scale_dtype))

    def dense(self) -> Tensor:
        whole = self.form.dequantise(self.codes, self.scale, self.cols, self.dtype)
        return whole.view(self.shape)

    def linear(self, x: Tensor, expert: int | None = None) -> Tensor:
        matrices = [()] if expert is None else [(expert, part) for part in range(self.parts)]
        panel = 128 if x[..., 0].numel() <= 16 else 1024  # few rows: stay in cache; many: fewer, larger products
        outs = []
        for index in matrices:
            codes, scale = self.codes[index], self.scale[index]
            for start in range(0, self.rows, panel):
                rows = slice(start, min(start + panel, self.rows))
                here = codes[rows], scale[self.form.scale_rows(rows)]
                outs.append(F.linear(x, self.form.dequantise(*here, self.cols, x.dtype)))
        return torch.cat(outs, dim=-1)

    def pieces(self) -> Iterator[tuple[Index, dict[str, Tensor]]]:
        stack: list[Index] = [()]
        if len(self.shape) == 3:
            stack = [(expert, part) for expert in range(self.shape[0]) for part in range(self.parts)]
        yield from ((index, {"": self.codes[index], self.form.suffix: self.scale[index]}) for index in stack)

    def fill(self, index: Index, start: int, values_RC: Tensor) -> None:
        rows = slice(start, start + len(values_RC))
        codes, scale = self.form.quantise(values_RC)
        self.codes[index][rows].copy_(codes)
        self.scale[index][self.form.scale_rows(rows)].copy_(scale)
