"""What this machine can do at most: our own speed means something only beside it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from finback import machine
from finback.kernels import dispatch, measure, native
from finback.kernels.measure import KINDS
from finback.kernels.panels import PANEL, panel_bytes

_LEAST = 3  # repetitions, however little time there is
_WIDTH = 4096  # columns of the matrix
_FILL = 0x3C  # as bytes of any format a number of ordinary size: what is denormal may be slow
_STEPS = 1 << 18  # of a loop in registers: about a millisecond
_MEMORY = 512 << 20


@dataclass(frozen=True)
class Rate:
    """Units a second in the best and in the median repetition: far apart, somebody else uses the machine."""

    best: float
    median: float


@dataclass(frozen=True)
class Limits:
    """Bandwidths in bytes/s, products in FLOP/s, all on the CPU with `threads` threads.

    read: memory larger than the caches, by the native loop, else summed by torch. gemv_bf16: one row times a bfloat16
    matrix of that size, by the call that the model makes: what generating one sequence can reach. matmul: square
    products by torch. path: of the compiled kernels; peaks: what its own instructions multiply in registers, for each
    of measure.KINDS; empty on the path "torch".
    """

    threads: int
    read: Rate
    gemv_bf16: Rate
    matmul_fp32: Rate
    matmul_bf16: Rate
    path: str = "torch"
    peaks: dict[str, Rate] = field(default_factory=dict)

    def bandwidth(self) -> float:
        """Bytes a second from memory: the best that was measured."""
        return max(self.read.best, self.gemv_bf16.best)

    def product(self, kind: str) -> float:
        """FLOP/s of numbers of one of measure.KINDS: the best that was measured, by way of any that can hold them."""
        known = {"fp32": [self.matmul_fp32], "bf16": [self.matmul_bf16]}
        kinds = KINDS[: KINDS.index(kind) + 1]
        rates = [rate for each in kinds for rate in known.get(each, [])]
        return max(rate.best for rate in [*rates, *(self.peaks[each] for each in kinds if each in self.peaks)])


@torch.inference_mode()
def machine_limits(
    seconds: float = 4.0, size: int | None = None, side: int = 2048, done: Callable[[], None] = lambda: None
) -> Limits:
    """Measure in about `seconds` over `size` bytes (None: `memory_size`) and matrices [side, side].

    `done` is called after each of `count_limits` measurements.
    """
    share = seconds / count_limits()
    memory = ordinary_memory(size)

    def timed(work: float, run: Callable[[], object]) -> Rate:
        found = rate(work, run, share)
        done()
        return found

    def peak(kind: str) -> Rate:
        return timed(measure.peak(kind, _STEPS), lambda: measure.peak(kind, _STEPS))

    read, gemv = _bandwidths(memory, timed)
    fp32, bf16 = (_product(side, dtype, timed) for dtype in (torch.float32, torch.bfloat16))
    peaks = {} if native.kernels() is None else {kind: peak(kind) for kind in KINDS}
    return Limits(torch.get_num_threads(), read, gemv, fp32, bf16, native.level(), peaks)


def count_limits() -> int:
    """How many things `machine_limits` measures."""
    return 4 + (0 if native.kernels() is None else len(KINDS))


def memory_size() -> int:
    """Bytes of memory to read: larger than the caches, and no more than a quarter of what is free."""
    wanted, free = max(_MEMORY, 2 * machine.cache()), machine.memory_free()
    return wanted if free is None else min(wanted, free // 4)


def ordinary_memory(size: int | None = None) -> Tensor:
    """About `size` bytes, None: `memory_size`; whole rows of a bfloat16 matrix, and never too few for one panel."""
    row = 2 * _WIDTH
    memory = native.memory(max(PANEL * row, (memory_size() if size is None else size) // row * row))
    return memory.fill_(_FILL)  # untouched, all of it would be the same page of zeros


def matrix_of(memory: Tensor, form: str | None, rows: int | None = None):
    """The memory as a matrix [rows, 4096] in panels (None: as many as there are), its rows and its bytes."""
    each = panel_bytes(form, _WIDTH)
    panels = len(memory) // each if rows is None else min(len(memory) // each, -(-rows // PANEL))
    area = memory[: panels * each].view(panels, each)
    return native.matrix(form, panels * PANEL, _WIDTH, area), panels * PANEL, area.nbytes


def ordinary_rows(rows: int) -> Tensor:
    """[rows, 4096] in bfloat16."""
    return torch.ones(rows, _WIDTH, dtype=torch.bfloat16)


def rate(work: float, run: Callable[[], object], seconds: float) -> Rate:
    """`work` units by the time of `run`, repeated for `seconds` after one run that is not counted."""
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < _LEAST or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return Rate(work / min(times), work / median(times))


Timed = Callable[[float, Callable[[], object]], Rate]


def _bandwidths(memory: Tensor, timed: Timed) -> tuple[Rate, Rate]:
    row = ordinary_rows(1)
    if native.kernels() is None:
        words = memory.view(torch.float32)  # the sum of bfloat16 is bound by its conversion
        weight = memory.view(torch.bfloat16).view(-1, _WIDTH)
        return timed(len(memory), words.sum), timed(len(memory), lambda: dispatch.linear(row, weight))
    matrix, rows, size = matrix_of(memory, None)
    return timed(len(memory), lambda: measure.read(memory)), timed(size, lambda: native.linear(row, matrix, rows))


def _product(side: int, dtype: torch.dtype, timed: Timed) -> Rate:
    a, b = torch.ones(2, side, side, dtype=dtype)
    out = torch.empty_like(a)
    return timed(2 * side**3, lambda: torch.mm(a, b, out=out))
