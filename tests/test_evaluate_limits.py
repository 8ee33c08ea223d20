"""The machine's limits: what is counted, how often, and that rates are what a clock gives. No test judges by time."""

import math

import torch

from finback.evaluate import limits
from finback.evaluate.limits import Rate, machine_limits


def test_limits_are_finite_and_ordered():
    found = machine_limits(seconds=0, size=1 << 20, side=64)
    assert found.threads == torch.get_num_threads()
    for rate in (found.read, found.gemv_bf16, found.matmul_fp32, found.matmul_bf16):
        assert 0 < rate.median <= rate.best < math.inf


def test_a_rate_is_work_by_time_without_the_first_run(monkeypatch):
    """A clock that the work itself moves on: 100 s at first, then 4, 1, 2, 5."""
    now, costs = [0.0], iter([100.0, 4.0, 1.0, 2.0, 5.0])
    monkeypatch.setattr(limits.time, "perf_counter", lambda: now[0])

    def run() -> None:
        now[0] += next(costs)

    assert limits._rate(12.0, run, seconds=0) == Rate(best=12.0, median=6.0)  # three runs at least
    now[0], costs = 0.0, iter([100.0, 4.0, 1.0, 2.0, 5.0])
    assert limits._rate(12.0, run, seconds=7.5) == Rate(best=12.0, median=4.0)  # until the time is over


def test_what_is_counted(monkeypatch):
    """Bytes of the memory that is read, and two operations for each product of numbers."""
    counted = []

    def rate(work, run, seconds):
        counted.append((work, seconds))
        return run()

    monkeypatch.setattr(limits, "_rate", rate)
    found = machine_limits(seconds=2.0, size=3 << 20, side=10)
    assert counted == [(3 << 20, 0.5), (3 << 20, 0.5), (2000, 0.5), (2000, 0.5)]
    assert found.gemv_bf16.shape == (1, 384) and (found.gemv_bf16 == 4096).all()
    assert found.matmul_fp32.dtype == torch.float32 and found.matmul_bf16.dtype == torch.bfloat16
    assert (found.matmul_fp32 == 10).all() and (found.matmul_bf16 == 10).all()
