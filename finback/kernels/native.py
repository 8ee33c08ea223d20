"""The compiled kernels of this machine, if there are any: found once, by what the processor says it can do.

FINBACK_KERNELS forces a path: amx, avx512, avx2, or torch for none. Addresses are taken here, in measure.py, in
model/fused.py and in the files of what training does natively (attention, experts, norm, swiglu, rotary, heads, scores,
cross_entropy), and nowhere else; whoever calls keeps the tensors alive.
"""

import importlib
import mmap
import os
from contextlib import suppress
from types import ModuleType

import torch
from torch import Tensor

from finback import machine
from finback.errors import UserError
from finback.kernels import panels
from finback.kernels.panels import FORMS, PANEL

VARIABLE = "FINBACK_KERNELS"
_AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16"}
LEVELS = {"avx512": _AVX512, "avx2": {"avx2", "fma", "f16c"}}
"""What each path needs of the processor, the best first."""
_ALONE = 8 << 20
"""Bytes that one thread lays out: those of a load come in smaller pieces, several at once."""

BY_NAME = {"amx": {*_AVX512, "amx_tile", "amx_bf16", "amx_int8"}, "amx_model": _AVX512}
"""The same of paths that are taken when named, never by themselves: AMX, until it has run on a processor that has it,
and its instructions in plain code, for tests."""


def supported() -> list[str]:
    """The paths that this processor can take, the best first; "torch" is always the last."""
    flags = machine.cpu_flags()
    return [level for level, needed in LEVELS.items() if needed <= flags] + ["torch"]


def find(level: str | None = None) -> tuple[str, ModuleType | None]:
    """The path `level`, or the best that is built and that this processor can take; "torch" has no module.

    Raises UserError for a path that is none, cannot be taken here or was not built.
    """
    possible = supported()
    named = level in BY_NAME and BY_NAME[level] <= machine.cpu_flags()
    if level is not None and level not in possible and not named:
        raise UserError(f"{VARIABLE}={level}: not a path of this processor; allowed here: {', '.join(possible)}")
    for each in [level] if level else possible:
        if each == "torch":
            break
        try:
            return each, importlib.import_module(f"finback.kernels._{each}")
        except ModuleNotFoundError:
            if level is not None:
                raise UserError(f"{VARIABLE}={level}: these kernels were not built; finback doctor says why") from None
        except ImportError as error:  # the system refuses what the processor has
            if level is not None:
                allowed = ", ".join(name for name in possible if name != level)
                raise UserError(f"{VARIABLE}={level}: {error}; allowed here: {allowed}") from None
    return "torch", None


def missing() -> dict[str, str]:
    """The paths that this processor can take and that cannot be loaded, the best first, and why not."""
    found = {}
    for each in supported()[:-1]:
        try:
            importlib.import_module(f"finback.kernels._{each}")
        except ModuleNotFoundError:
            found[each] = "not built"
        except ImportError as error:
            found[each] = str(error)
    return found


_level: tuple[str, ModuleType | None] | None = None
_fixed = False


def kernels() -> ModuleType | None:
    """The module that runs here, None where plain torch computes everything."""
    return _found()[1]


def level() -> str:
    """The path that runs here: a key of LEVELS or BY_NAME, or "torch"."""
    return _found()[0]


def use(name: str | None) -> None:
    """Take the path `name` from now on, the best for None. What is laid out already stays as it is."""
    global _level
    _level = find(name)
    _tell()


def fix_order(on: bool) -> None:
    """Whether the order of a row's sums is the same however many rows there are; order.fixed_order sets it."""
    global _fixed
    _fixed = on
    _tell()


def _found() -> tuple[str, ModuleType | None]:
    global _level
    if _level is None:
        _level = find(os.environ.get(VARIABLE) or None)
        _tell()
    return _level


def _tell() -> None:
    """A module has a switch of its own: few and many rows are other kernels, and it says which products are which."""
    if _level is not None and _level[1] is not None:
        _level[1].fixed_order(_fixed)


def taking(*tensors: Tensor) -> ModuleType | None:
    """The module, if there is one and it takes such tensors: on the CPU, float32 or bfloat16, each by itself."""
    dtypes = (torch.float32, torch.bfloat16)
    return kernels() if all(x.dtype in dtypes and x.device.type == "cpu" for x in tensors) else None


def training(*tensors: Tensor) -> ModuleType | None:
    """The same where gradients may be asked for; without them nothing changes from what engines compare with."""
    return taking(*tensors) if torch.is_grad_enabled() else None


def rows(x: Tensor) -> Tensor:
    """x [..., D] as [N, D] whose rows are dense and as far apart as `stride(0)` says; copied only if they are not."""
    x_ND = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
    return x_ND if x_ND.stride(-1) == 1 else x_ND.contiguous()


def address(x_ND: Tensor | None) -> tuple[int, int]:
    """Of `rows`: where they begin and how many numbers one is from the next."""
    return (0, 0) if x_ND is None else (x_ND.data_ptr(), x_ND.stride(0))


def matrix(form: str | None, rows: int, cols: int, panels: Tensor):
    """A matrix as kernels take it; `panels` [P, bytes] as kernels/panels.py lays them out, at any distance."""
    module = kernels()
    assert module is not None and panels.stride(-1) == 1 and len(panels) * PANEL >= rows
    assert panels.shape[-1] == module.panel_bytes(FORMS.index(form), cols)
    return module.Pack(FORMS.index(form), rows, cols, panels.data_ptr(), panels.stride(0))


def lay(form: str | None, codes: Tensor, scale: Tensor | None, cols: int, out_PB: Tensor, start: int = 0) -> None:
    """As `panels.lay`, at the speed of memory."""
    if (module := kernels()) is None:
        return panels.lay(form, codes, scale, cols, out_PB, start)
    padded, codes = panels.padded(cols), codes.contiguous()
    out_PB = out_PB[start // PANEL :][: -(-len(codes) // PANEL)]
    word = 2 if form == "fp8" else 4
    count = panels.row_bytes(form, cols) // word
    chunk, chunk_bytes = (4, PANEL * 18) if form == "int4" else (count, 0)
    zero, flip = panels.ZERO.get(form, 0), 128 if form == "int8" else 0
    module.lay(
        *(codes.data_ptr(), len(codes), codes.nbytes // len(codes), word, count, chunk, chunk_bytes, zero, flip),
        *(out_PB.data_ptr(), out_PB.stride(0), torch.get_num_threads() if codes.nbytes > _ALONE else 1),
    )
    panels.lay_scales(form, scale, padded, out_PB)


def linear(x: Tensor, weight, rows: int) -> Tensor:
    """x [..., in] times a `matrix` of `rows` rows, transposed: [..., rows], bfloat16 both."""
    module = kernels()
    assert module is not None and x.dtype == torch.bfloat16
    x = x.contiguous()
    out = torch.empty(*x.shape[:-1], rows, dtype=x.dtype)
    count = x.numel() // x.shape[-1]
    module.linear(weight, x.data_ptr(), count, 0, out.data_ptr(), False, torch.get_num_threads())
    return out


def memory(*shape: int) -> Tensor:
    """Zeroed bytes in huge pages where the system has them: a matrix is read through far fewer translations."""
    size = 1
    for each in shape:
        size *= each
    if size < 1 << 21 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=torch.uint8)
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory gets no huge pages
    with suppress(OSError):  # a kernel without them
        area.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(area, dtype=torch.uint8).view(shape)
