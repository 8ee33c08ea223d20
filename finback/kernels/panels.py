"""Matrices in the order that native kernels read them: panels of 16 rows, one after the other (docs/kernels.md).

In a panel the numbers that one instruction multiplies lie together: two neighbouring columns of 16 rows in bfloat16 and
FP8, four in int8. A panel carries its scales, so that reading it is reading forwards. Columns are filled up with zeros
to a multiple of 32, rows to one of 16. Codes and scales are those of kernels/quantise.py; nothing is rounded again.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

PANEL, STEP = 16, 32
FORMS = (None, "fp8", "int8", "int4")  # as `Form` in cpu/common.h
"""Names of quantise.FORMATS, and None for bfloat16."""


ZERO: dict[str | None, int] = {"int8": 128, "int4": 0x88}
"""The byte of zeros, where it is not 0: weights are stored without a sign."""


def padded(cols: int) -> int:
    """Columns, filled up."""
    return -(-cols // STEP) * STEP


def row_bytes(form: str | None, cols: int) -> int:
    """Bytes of a row's codes, filled up."""
    return {None: 2 * padded(cols), "int4": padded(cols) // 2}.get(form, padded(cols))


def panel_bytes(form: str | None, cols: int) -> int:
    """Bytes of one panel."""
    codes = PANEL * row_bytes(form, cols)
    if form == "fp8":
        return -(-(codes + -(-padded(cols) // 128) * 4) // 64) * 64
    return codes + {None: 0, "int8": 4 * PANEL, "int4": padded(cols) // 32 * 2 * PANEL}[form]


def lay(form: str | None, codes: Tensor, scale: Tensor | None, cols: int, out_PB: Tensor, start: int = 0) -> None:
    """Put rows [R, ...] into the panels `out_PB` [P, panel_bytes], uint8, contiguous within a panel.

    `codes` and `scale` as quantise.Format gives them, for rows start .. start + R - 1 of the matrix; bfloat16 has no
    scale. start is a multiple of 128.
    """
    out_PB = out_PB[start // PANEL :][: -(-len(codes) // PANEL)]
    _lay_words(form, codes, cols, out_PB)
    lay_scales(form, scale, padded(cols), out_PB)


def lay_scales(form: str | None, scale: Tensor | None, padded: int, out_PB: Tensor) -> None:
    """The scales alone, of as many rows as `out_PB` has panels for."""
    panels = len(out_PB)
    if scale is None:
        return
    if form == "fp8":
        tail = out_PB[:, PANEL * padded :].view(torch.float32)
        tail.zero_()
        tail[:, : scale.shape[1]] = scale.float().repeat_interleave(128 // PANEL, dim=0)[:panels]
        return
    scale = F.pad(scale, (*[0] * (2 * scale.dim() - 1), panels * PANEL - len(scale)))
    if form == "int8":
        out_PB[:, PANEL * padded :].view(torch.float32).copy_(scale.view(panels, PANEL))
    else:
        parts = out_PB.view(panels, padded // 32, PANEL * 18)[..., PANEL * 16 :]
        parts.view(torch.bfloat16).copy_(scale.view(panels, PANEL, -1).transpose(1, 2))


def _lay_words(form: str | None, codes: Tensor, cols: int, out_PB: Tensor) -> None:
    """The codes alone: what one instruction multiplies is a word, and a panel has the words of its 16 rows in turn."""
    kind = torch.int16 if form == "fp8" else torch.int32
    width, rows = row_bytes(form, cols), codes.view(torch.uint8)
    if form == "int8":
        rows = rows ^ 128
    rows = F.pad(rows, (0, width - rows.shape[1], 0, len(out_PB) * PANEL - len(rows)), value=ZERO.get(form, 0))
    words = rows.view(kind).view(len(out_PB), PANEL, -1).transpose(1, 2)
    if form == "int4":
        parts = out_PB.view(len(out_PB), -1, PANEL * 18)[..., : PANEL * 16]
        parts.view(kind).unflatten(-1, (4, PANEL)).copy_(words.unflatten(1, (-1, 4)))
    else:
        out_PB[:, : PANEL * width].view(kind).unflatten(1, (-1, PANEL)).copy_(words)


def unlay(form: str | None, panels_PB: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor | None]:
    """Codes and scales back, as `lay` was given them."""
    panels, width = len(panels_PB), padded(cols)
    if form == "int4":
        parts = panels_PB.view(panels, width // 32, PANEL * 18)
        codes = parts[..., : PANEL * 16].view(panels, -1, 4, PANEL, 4).permute(0, 3, 1, 2, 4).reshape(-1, width // 2)
        scales = parts[..., PANEL * 16 :].view(torch.bfloat16).transpose(1, 2).reshape(-1, width // 32)
        return codes[:rows], scales[:rows]
    if form is None:
        pairs = panels_PB.view(torch.int32).view(panels, -1, PANEL).transpose(1, 2).contiguous().view(-1, width // 2)
        return pairs.view(torch.bfloat16)[:rows, :cols].contiguous(), None
    body = panels_PB[:, : PANEL * width]
    kind = torch.int16 if form == "fp8" else torch.int32
    words = body.view(kind).unflatten(1, (-1, PANEL)).transpose(1, 2).contiguous().view(panels * PANEL, -1)
    codes = words.view(torch.uint8)[:rows, :cols].contiguous()
    tail = panels_PB[:, PANEL * width :].view(torch.float32)
    if form == "fp8":
        return codes.view(torch.float8_e4m3fn), tail[:: 128 // PANEL, : -(-cols // 128)].contiguous()
    return (codes ^ 128).view(torch.int8), tail.reshape(-1)[:rows].clone()
