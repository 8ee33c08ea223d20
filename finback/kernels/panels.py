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


def panel_bytes(form: str | None, cols: int) -> int:
    """Bytes of one panel."""
    padded = -(-cols // STEP) * STEP
    if form is None:
        return 2 * PANEL * padded
    if form == "fp8":
        return -(-(PANEL * padded + -(-padded // 128) * 4) // 64) * 64
    return PANEL * padded + 4 * PANEL if form == "int8" else padded // 32 * PANEL * 18


def lay(form: str | None, codes: Tensor, scale: Tensor | None, cols: int, out_PB: Tensor, start: int = 0) -> None:
    """Put rows [R, ...] into the panels `out_PB` [P, panel_bytes], uint8, contiguous within a panel.

    `codes` and `scale` as quantise.Format gives them, for rows start .. start + R - 1 of the matrix; bfloat16 has no
    scale. start is a multiple of 128.
    """
    panels = -(-len(codes) // PANEL)
    out_PB = out_PB[start // PANEL :][:panels]
    rows = (0, 0, 0, panels * PANEL - len(codes))
    padded = -(-cols // STEP) * STEP
    fill = padded - cols
    if form == "int4":
        assert scale is not None
        groups = F.pad(codes, rows, value=0x88).view(panels, PANEL, padded // 32, 4, 4)  # row, group, quad, byte
        parts = out_PB.view(panels, padded // 32, PANEL * 18)
        parts[..., : PANEL * 16].view(panels, -1, 4, PANEL, 4).copy_(groups.permute(0, 2, 3, 1, 4))
        scales = F.pad(scale, rows).view(panels, PANEL, -1).transpose(1, 2)
        parts[..., PANEL * 16 :].view(torch.bfloat16).copy_(scales)
        return
    if form is None:
        pairs = F.pad(codes.view(torch.int16), (0, fill, *rows[2:])).view(torch.int32)
        out_PB.view(torch.int32).view(panels, -1, PANEL).copy_(pairs.view(panels, PANEL, -1).transpose(1, 2))
        return
    assert scale is not None
    body = out_PB[:, : PANEL * padded]
    if form == "fp8":
        pairs = F.pad(codes.view(torch.uint8), (0, fill, *rows[2:])).view(torch.int16)
        target = body.view(torch.int16).view(panels, -1, PANEL)
        target.copy_(pairs.view(panels, PANEL, -1).transpose(1, 2))
        tail = out_PB[:, PANEL * padded :].view(torch.float32)
        tail.zero_()
        tail[:, : scale.shape[1]] = scale.float().repeat_interleave(128 // PANEL, dim=0)[:panels]
        return
    quads = F.pad(codes.view(torch.uint8) ^ 128, (0, fill, *rows[2:]), value=128).view(torch.int32)
    body.view(torch.int32).view(panels, -1, PANEL).copy_(quads.view(panels, PANEL, -1).transpose(1, 2))
    out_PB[:, PANEL * padded :].view(torch.float32).copy_(F.pad(scale, rows[2:]).view(panels, PANEL))


def unlay(form: str | None, panels_PB: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor | None]:
    """Codes and scales back, as `lay` was given them."""
    panels, padded = len(panels_PB), -(-cols // STEP) * STEP
    if form == "int4":
        parts = panels_PB.view(panels, padded // 32, PANEL * 18)
        codes = parts[..., : PANEL * 16].view(panels, -1, 4, PANEL, 4).permute(0, 3, 1, 2, 4).reshape(-1, padded // 2)
        scales = parts[..., PANEL * 16 :].view(torch.bfloat16).transpose(1, 2).reshape(-1, padded // 32)
        return codes[:rows], scales[:rows]
    if form is None:
        pairs = panels_PB.view(torch.int32).view(panels, -1, PANEL).transpose(1, 2).contiguous().view(-1, padded // 2)
        return pairs.view(torch.bfloat16)[:rows, :cols].contiguous(), None
    body = panels_PB[:, : PANEL * padded]
    kind = torch.int16 if form == "fp8" else torch.int32
    words = body.view(kind).unflatten(1, (-1, PANEL)).transpose(1, 2).contiguous().view(panels * PANEL, -1)
    codes = words.view(torch.uint8)[:rows, :cols].contiguous()
    tail = panels_PB[:, PANEL * padded :].view(torch.float32)
    if form == "fp8":
        return codes.view(torch.float8_e4m3fn), tail[:: 128 // PANEL, : -(-cols // 128)].contiguous()
    return (codes ^ 128).view(torch.int8), tail.reshape(-1)[:rows].clone()
