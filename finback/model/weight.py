"""The one place a weight matrix lives: dense, or packed into fewer bits, behind the same calls."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finback.kernels import dispatch, native, panels
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

    def indices(self, expert: int | None = None) -> list[Index]:
        """Of all matrices of a stack, or of one expert's; of the one there is."""
        if len(self.shape) == 2:
            return [()]
        experts = range(self.shape[0]) if expert is None else [expert]
        return [(each, part) for each in experts for part in range(self.parts)]

    @abstractmethod
    def dense(self) -> Tensor:
        """The whole matrix, or stack, as an ordinary tensor."""

    @abstractmethod
    def linear(self, x: Tensor, expert: int | None = None) -> Tensor:
        """x Wᵀ, of one matrix or of one expert's: [..., in] to [..., parts · out]."""

    def pieces(self) -> Iterator[tuple[Index, dict[str, Tensor]]]:
        """Every single matrix with its `piece`."""
        return ((index, self.piece(index)) for index in self.indices())

    @abstractmethod
    def piece(self, index: Index) -> dict[str, Tensor]:
        """One matrix as the tensors it is stored in, by what their names on disk add: views, where it lies so."""

    def stored(self) -> dict[str, Tensor]:
        """The same of any matrix on the meta device: types and shapes alone."""
        rows, cols = self.shape[-2] // self.parts, self.shape[-1]
        if self.form is None:
            return {"": torch.empty(rows, cols, dtype=self.dtype, device="meta")}
        types, shapes = (self.form.code_dtype, self.form.scale_dtype), self.form.shapes(rows, cols)
        made = (torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in zip(shapes, types, strict=True))
        return dict(zip(("", self.form.suffix), made, strict=True))

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

    def piece(self, index: Index) -> dict[str, Tensor]:
        matrix = self.value.data
        return {"": matrix[index[0]].chunk(self.parts)[index[1]] if index else matrix}

    def stored(self) -> dict[str, Tensor]:
        return {"": torch.empty_like(self.piece(self.indices()[0])[""], device="meta")}

    def fill(self, index: Index, start: int, values_RC: Tensor) -> None:
        self.piece(index)[""][start : start + len(values_RC)].copy_(values_RC)


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
        panel = 128 if x[..., 0].numel() <= 16 else 1024  # few rows: stay in cache; many: fewer, larger products
        outs = []
        for index in self.indices(expert):
            codes, scale = self.codes[index], self.scale[index]
            for start in range(0, self.rows, panel):
                rows = slice(start, min(start + panel, self.rows))
                here = codes[rows], scale[self.form.scale_rows(rows)]
                outs.append(F.linear(x, self.form.dequantise(*here, self.cols, x.dtype)))
        return torch.cat(outs, dim=-1)

    def piece(self, index: Index) -> dict[str, Tensor]:
        return {"": self.codes[index], self.form.suffix: self.scale[index]}

    def fill(self, index: Index, start: int, values_RC: Tensor) -> None:
        rows = slice(start, start + len(values_RC))
        codes, scale = self.form.quantise(values_RC)
        self.codes[index][rows].copy_(codes)
        self.scale[index][self.form.scale_rows(rows)].copy_(scale)


class PanelWeight(Weight):
    """The numbers of a bfloat16 or packed weight, in the order that native kernels read them; without gradients.

    panels: [panels, bytes], of a stack [E, panels, bytes]. The parts of a stack's matrices lie panel by panel by turns,
    so that one pass has a number of the gate and of the up projection together.
    """

    panels: Tensor

    def __init__(self, like: Weight, place: Tensor | None = None) -> None:
        """The numbers of `like`, or room for them where it is on the meta device.

        `place`: the panels' memory, where it is shared; new where None.
        """
        super().__init__()
        self.form, self.shape, self.parts, self.dtype = like.form, like.shape, like.parts, torch.bfloat16
        self.name = None if like.form is None else like.form.name
        self.rows, self.cols = self.shape[-2] // self.parts, self.shape[-1]
        self.register_buffer("panels", native.memory(*self.area(like)) if place is None else place)
        for index, tensors in like.pieces():
            if not tensors[""].is_meta:
                self.lay(index, 0, *tensors.values())

    @staticmethod
    def area(like: Weight) -> tuple[int, ...]:
        """The shape of the bytes that the numbers of `like` take."""
        each = -(-like.shape[-2] // like.parts // panels.PANEL)
        form = None if like.form is None else like.form.name
        return (*like.shape[:-2], like.parts * each, panels.panel_bytes(form, like.shape[-1]))

    def _place(self, index: Index) -> Tensor:
        """The panels of one matrix, a view."""
        return self.panels if not index else self.panels[index[0]][index[1] :: self.parts]

    def matrix(self, index: Index = ()):
        """One matrix as native kernels take it."""
        return native.matrix(self.name, self.rows, self.cols, self._place(index))

    def dense(self) -> Tensor:
        if len(self.shape) == 2:
            return self._dense(())
        return torch.stack([torch.cat([self._dense((e, p)) for p in range(self.parts)]) for e in range(self.shape[0])])

    def linear(self, x: Tensor, expert: int | None = None) -> Tensor:
        indices = self.indices(expert)
        if x.dtype != self.dtype:
            return F.linear(x, torch.cat([self._dense(index) for index in indices]).to(x.dtype))
        out = [native.linear(x, self.matrix(index), self.rows) for index in indices]
        return out[0] if len(out) == 1 else torch.cat(out, dim=-1)

    def piece(self, index: Index) -> dict[str, Tensor]:
        codes, scale = panels.unlay(self.name, self._place(index).contiguous(), self.rows, self.cols)
        return {"": codes} if self.form is None or scale is None else {"": codes, self.form.suffix: scale}

    def fill(self, index: Index, start: int, values_RC: Tensor) -> None:
        self.lay(index, start, *((values_RC.bfloat16(),) if self.form is None else self.form.quantise(values_RC)))

    def lay(self, index: Index, start: int, codes: Tensor, scale: Tensor | None = None) -> None:
        """Store rows start .. start + len(codes) - 1 of one matrix as they are; start is a multiple of 128."""
        native.lay(self.name, codes, scale, self.cols, self._place(index), start)

    def _dense(self, index: Index) -> Tensor:
        codes, scale = panels.unlay(self.name, self._place(index).contiguous(), self.rows, self.cols)
        if self.form is None or scale is None:
            return codes
        return self.form.dequantise(codes, scale, self.cols, self.dtype)
