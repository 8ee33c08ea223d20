"""What this machine can do at most: our own speed means something only beside it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

_LEAST = 3  # repetitions, however little time there is
_WIDTH = 4096  # columns of the matrix


@dataclass(frozen=True)
class Rate:
    """Units a second in the best and in the median repetition: far apart, somebody else uses the machine."""

    best: float
    median: float


@dataclass(frozen=True)
class Limits:
    """Bandwidths in bytes/s, products in FLOP/s, all on the CPU with `threads` threads.

    read: summing memory larger than the caches. gemv_bf16: one row times a bfloat16 matrix of that size, by the call
    that the model makes: what generating one sequence can reach. matmul: square products.
    """

    threads: int
    read: Rate
    gemv_bf16: Rate
    matmul_fp32: Rate
    matmul_bf16: Rate


@torch.inference_mode()
def machine_limits(seconds: float = 4.0, size: int = 512 << 20, side: int = 2048) -> Limits:
    """Measure in about `seconds` over `size` bytes and matrices [side, side]."""
    share = seconds / 4
    return Limits(
        torch.get_num_threads(),
        *_bandwidths(size, share),
        _product(side, torch.float32, share),
        _product(side, torch.bfloat16, share),
    )


def _bandwidths(size: int, seconds: float) -> tuple[Rate, Rate]:
    weight = torch.ones(max(1, size // (2 * _WIDTH)), _WIDTH, dtype=torch.bfloat16)
    words = weight.view(torch.float32)  # the sum of bfloat16 is bound by its conversion
    row = torch.ones(1, _WIDTH, dtype=torch.bfloat16)
    moved = weight.numel() * weight.itemsize
    return _rate(moved, words.sum, seconds), _rate(moved, lambda: torch.nn.functional.linear(row, weight), seconds)


def _product(side: int, dtype: torch.dtype, seconds: float) -> Rate:
    a, b = torch.ones(2, side, side, dtype=dtype)
    out = torch.empty_like(a)
    return _rate(2 * side**3, lambda: torch.mm(a, b, out=out), seconds)


def _rate(work: float, run: Callable[[], object], seconds: float) -> Rate:
    """`work` units by the time of `run`, repeated for `seconds` after one run that is not counted."""
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < _LEAST or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return Rate(work / min(times), work / median(times))
