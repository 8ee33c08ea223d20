"""Which paths of the native kernels can be tested here, and matrices to test them with."""

import os

import torch

from finback import machine
from finback.kernels import native, panels
from finback.kernels.quantise import FORMATS


def native_paths() -> list[str]:
    """Every path that this processor takes by itself, AMX in plain code, and the path that the environment names."""
    own = [level for level in native.supported() if level != "torch"]
    model = ["amx_model"] if native.BY_NAME["amx_model"] <= machine.cpu_flags() else []
    named = os.environ.get(native.VARIABLE, "torch")
    return own + model + ([] if named in ("torch", *own, *model) else [named])


def stored(form: str | None, rows: int, cols: int, seed: int = 0):
    """Codes, scales, and the float32 numbers that they stand for."""
    values = 0.1 * torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    if form is None:
        return values.bfloat16(), None, values.bfloat16().float()
    codes, scale = FORMATS[form].quantise(values)
    return codes, scale, FORMATS[form].dequantise(codes, scale, cols, torch.float32)


def laid(form: str | None, codes, scale, cols: int) -> torch.Tensor:
    out = torch.full((-(-len(codes) // panels.PANEL), panels.panel_bytes(form, cols)), 99, dtype=torch.uint8)
    panels.lay(form, codes, scale, cols, out)
    return out


def rows_of(count: int, cols: int) -> torch.Tensor:
    return torch.randn(count, cols, generator=torch.Generator().manual_seed(count)).bfloat16()


def near(got: torch.Tensor, wanted: torch.Tensor, bound: float) -> None:
    assert torch.isfinite(got).all()
    assert (got.float() - wanted.float()).norm() <= bound * wanted.float().norm()
