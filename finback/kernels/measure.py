"""The loops of the compiled kernels with nothing in their way: what a machine can do at most.

Each of these runs on all threads of torch, and needs a path other than "torch" (native.level).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from finback.kernels import native
from finback.kernels.panels import FORMS

STRIDE = 512
"""Bytes that `read` takes at a time."""
KINDS = ("fp32", "bf16", "int8", "int4")
"""Numbers that have products of their own. What is in FP8 is multiplied as bfloat16."""


def read(memory: Tensor) -> float:
    """Bytes, contiguous, a multiple of STRIDE, read once: their sum as float32 numbers."""
    assert memory.is_contiguous() and memory.nbytes % STRIDE == 0
    return _module().read(memory.data_ptr(), memory.nbytes // 4, torch.get_num_threads())


def peak(kind: str, steps: int) -> int:
    """Products in registers, of one of KINDS; how many operations they were, a multiplication and an addition two."""
    if kind == "fp32":
        return _module().float_peak(steps, torch.get_num_threads())
    return _module().peak(FORMS.index(None if kind == "bf16" else kind), steps, torch.get_num_threads())


def meet(barriers: int) -> None:
    """A call that opens a team of threads, which meet so many times with no work between."""
    _module().meet(barriers, torch.get_num_threads())


def empty() -> Callable[[int, int, int], None]:
    """A native function that does nothing with an address, a size and a count."""
    return _module().empty


def _module():
    module = native.kernels()
    assert module is not None, "no compiled kernels"
    return module
