"""What the calls that models make reach of this machine's limits, and what a call costs before it does anything."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from finback.evaluate import limits as machine
from finback.evaluate.limits import Limits, Rate, Timed, matrix_of, ordinary_rows
from finback.kernels import measure, native
from finback.kernels.panels import FORMS

FEW, MANY = 1, 512
"""Rows of the calls: those of a token that is generated, and of a prompt."""
_SIDE = 4096  # rows of the matrix that MANY rows meet
_TIMES = 1000  # calls, or meetings, that are timed together


@dataclass(frozen=True)
class Call:
    """x [rows, 4096] times a matrix of `form`, by `by`: "native" or "torch".

    Of one row the rate is bytes/s, the matrix larger than the caches, and `limit` the machine's bandwidth; of many
    rows FLOP/s, and `limit` the most that was measured of the numbers that such a matrix is multiplied as.
    """

    by: str
    form: str
    rows: int
    rate: Rate
    limit: float

    @property
    def share(self) -> float:
        """The best rate beside the limit."""
        return self.rate.best / self.limit


@dataclass(frozen=True)
class Overheads:
    """Calls, or meetings, a second. torch: `add` of 8 numbers into a third tensor. None on the path "torch".

    native: a function that does nothing. team: one that opens a team of all threads; barrier: a meeting of the team.
    """

    torch: Rate
    native: Rate | None
    team: Rate | None
    barrier: Rate | None


@dataclass(frozen=True)
class Report:
    """All of it."""

    limits: Limits
    calls: list[Call]
    overheads: Overheads


def count() -> int:
    """How many things `report` measures."""
    return machine.count_limits() + (3 if native.kernels() is None else 2 * len(FORMS) + 2 + 4)


@torch.inference_mode()
def report(
    seconds: float = 10.0, size: int | None = None, side: int = 2048, done: Callable[[], None] = lambda: None
) -> Report:
    """Measure in about `seconds`, as `machine_limits` does; `done` is called after each of `count` measurements."""
    share = seconds / count()
    limits = machine.machine_limits(share * machine.count_limits(), size, side, done)

    def timed(work: float, run: Callable[[], object]) -> Rate:
        found = machine.rate(work, run, share)
        done()
        return found

    memory = machine.ordinary_memory(size)
    calls = [_by_torch(limits, memory, rows, timed) for rows in (FEW, MANY)]
    if native.kernels() is not None:
        calls += [_native(limits, memory, form, rows, timed) for rows in (FEW, MANY) for form in FORMS]
    return Report(limits, sorted(calls, key=lambda call: call.rows), _overheads(timed))


def _by_torch(limits: Limits, memory: Tensor, rows: int, timed: Timed) -> Call:
    x = ordinary_rows(rows)
    weight = memory.view(torch.bfloat16).view(-1, x.shape[1])
    if rows == FEW:
        return Call("torch", "bf16", rows, timed(weight.nbytes, lambda: F.linear(x, weight)), limits.bandwidth())
    weight = weight[:_SIDE]
    found = timed(2 * rows * weight.numel(), lambda: F.linear(x, weight))
    return Call("torch", "bf16", rows, found, limits.product("bf16"))


def _native(limits: Limits, memory: Tensor, form: str | None, rows: int, timed: Timed) -> Call:
    x, name = ordinary_rows(rows), form or "bf16"
    matrix, out, size = matrix_of(memory, form, None if rows == FEW else _SIDE)
    work = size if rows == FEW else 2 * rows * out * x.shape[1]
    limit = limits.bandwidth() if rows == FEW else limits.product("bf16" if name == "fp8" else name)
    return Call("native", name, rows, timed(work, lambda: native.linear(x, matrix, out)), limit)


def _overheads(timed: Timed) -> Overheads:
    a, b, out = torch.ones(3, 8)
    by_torch = timed(_TIMES, lambda: [torch.add(a, b, out=out) for _ in range(_TIMES)])
    if native.kernels() is None:
        return Overheads(by_torch, None, None, None)
    empty = measure.empty()

    def teams() -> None:
        for _ in range(_TIMES):
            measure.meet(0)

    return Overheads(
        by_torch,
        timed(_TIMES, lambda: [empty(0, 0, 0) for _ in range(_TIMES)]),
        timed(_TIMES, teams),
        timed(_TIMES, lambda: measure.meet(_TIMES)),
    )
