"""The machine's limits: what is counted, how often, and that rates are what a clock gives. No test judges by time."""

import math
from dataclasses import replace

import pytest
import torch

from finback import machine
from finback.evaluate import calls, limits
from finback.evaluate.limits import Limits, Rate, machine_limits, matrix_of, memory_size, ordinary_memory
from finback.kernels import measure, native
from finback.kernels.panels import FORMS, unlay
from finback.kernels.quantise import FORMATS

BUILT = [path for path in native.supported()[:-1] if path not in native.missing()]
PATHS = pytest.mark.parametrize("path", [*BUILT, "torch"])
NATIVE = pytest.mark.parametrize("path", BUILT)
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _best_path_again():
    yield
    native.use(None)


@pytest.fixture
def counted(monkeypatch):
    """What was timed: (work, what the timed call gave, seconds), in order; every rate is 3 at best and 2."""
    found = []

    def rate(work, run, seconds):
        found.append((work, run(), seconds))
        return Rate(3.0, 2.0)

    monkeypatch.setattr(limits, "rate", rate)
    return found


@PATHS
def test_limits_are_finite_and_ordered(path):
    native.use(path)
    ticks = []
    found = machine_limits(seconds=0, size=MIB, side=64, done=lambda: ticks.append(1))
    assert (found.threads, found.path, len(ticks)) == (torch.get_num_threads(), path, limits.count_limits())
    assert set(found.peaks) == (set() if path == "torch" else set(measure.KINDS))
    for rate in (found.read, found.gemv_bf16, found.matmul_fp32, found.matmul_bf16, *found.peaks.values()):
        assert 0 < rate.median <= rate.best < math.inf


def test_a_rate_is_work_by_time_without_the_first_run(monkeypatch):
    """A clock that the work itself moves on: 100 s at first, then 4, 1, 2, 5."""
    now, costs = [0.0], iter([100.0, 4.0, 1.0, 2.0, 5.0])
    monkeypatch.setattr(limits.time, "perf_counter", lambda: now[0])

    def run() -> None:
        now[0] += next(costs)

    assert limits.rate(12.0, run, seconds=0) == Rate(best=12.0, median=6.0)  # three runs at least
    now[0], costs = 0.0, iter([100.0, 4.0, 1.0, 2.0, 5.0])
    assert limits.rate(12.0, run, seconds=7.5) == Rate(best=12.0, median=4.0)  # until the time is over


@PATHS
def test_what_is_counted(path, counted):
    """Bytes of the memory that is read, and two operations for each product of numbers."""
    native.use(path)
    machine_limits(seconds=2.0, size=3 * MIB, side=10)
    (read, total, share), (size, row, _), (fp32, a, _), (bf16, b, _), *peaks = counted
    assert read == size == 3 * MIB
    number = torch.tensor([0x3C] * 4, dtype=torch.uint8).view(torch.float32).item()
    assert float(total) == pytest.approx(number * 3 * MIB / 4, rel=1e-3)
    half = torch.tensor([0x3C] * 2, dtype=torch.uint8).view(torch.bfloat16).item()
    assert row.shape == (1, 384) and torch.allclose(row.float(), torch.tensor(4096 * half), rtol=2**-8)
    assert fp32 == bf16 == 2000
    assert a.dtype == torch.float32 and b.dtype == torch.bfloat16
    assert (a == 10).all() and (b == 10).all()
    assert [work for work, _, _ in peaks] == [result for _, result, _ in peaks]
    assert {seconds for _, _, seconds in counted} == {2.0 / limits.count_limits()} == {share}


@NATIVE
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("strides", [0, 1, 2, 7, 5000])
def test_reading_takes_every_number_once(path, threads, strides):
    native.use(path)
    values = torch.arange(strides * measure.STRIDE // 4, dtype=torch.float32) % 7 + 1  # every sum is exact
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert measure.read(values.view(torch.uint8)) == values.double().sum()
    finally:
        torch.set_num_threads(before)


@NATIVE
def test_peaks_count_every_thread_and_step(path):
    """A step is some products in all 16 lanes: two operations each, of 1, 2, 4 and 4 numbers a lane."""
    native.use(path)
    chains = {measure.peak(kind, 1) / (2 * 16 * lane) for kind, lane in zip(measure.KINDS, (1, 2, 4, 4), strict=True)}
    [each] = chains
    assert each % torch.get_num_threads() == 0 and each >= 4 * torch.get_num_threads()
    assert all(measure.peak(kind, 50) == 50 * measure.peak(kind, 1) for kind in measure.KINDS)


@NATIVE
@pytest.mark.parametrize("form", FORMS)
def test_the_memory_is_a_matrix_of_every_form(path, form):
    """The product of a row is that with the numbers that the panels hold, and all of them are of ordinary size."""
    native.use(path)
    memory = ordinary_memory(MIB)
    matrix, rows, size = matrix_of(memory, form)
    assert rows % 16 == 0 and MIB - size < size / (rows / 16)
    codes, scale = unlay(form, memory[:size].view(rows // 16, -1), rows, 4096)
    dense = codes if scale is None else FORMATS[form].dequantise(codes, scale, 4096, torch.float32)
    assert dense.float().abs().min() > 1e-9 and dense.float().abs().max() < 1e9
    wanted = dense.float().sum(-1)
    assert torch.allclose(native.linear(limits.ordinary_rows(1), matrix, rows)[0].float(), wanted, rtol=2**-7)
    assert matrix_of(memory, form, 32)[1:] == (32, 2 * size // (rows // 16))


def test_memory_is_larger_than_the_caches_and_fits(monkeypatch):
    for cache, free, wanted in ((0, None, 512), (32, None, 512), (480, None, 960), (32, 1000, 250), (480, 9000, 960)):
        monkeypatch.setattr(machine, "cache", lambda cache=cache: cache * MIB)
        monkeypatch.setattr(machine, "memory_free", lambda free=free: None if free is None else free * MIB)
        assert memory_size() == wanted * MIB
    assert len(ordinary_memory(1)) == 16 * 2 * 4096  # never too little for a panel


def test_the_largest_cache_is_the_one_that_counts(tmp_path):
    assert machine.cache(tmp_path) == 0
    for index, size in enumerate(("32K\n", "1024K\n", "480M\n", "")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size)
    assert machine.cache(tmp_path) == 480 * MIB


def test_the_limit_is_the_best_that_can_hold_the_numbers():
    def made(**peaks: float) -> Limits:
        rates = [Rate(best, 1.0) for best in (20.0, 25.0, 10.0, 40.0)]
        return Limits(2, *rates, "some", {kind: Rate(best, 1.0) for kind, best in peaks.items()})

    assert made().bandwidth() == 25.0
    assert replace(made(), read=Rate(30.0, 1.0)).bandwidth() == 30.0
    assert [made().product(kind) for kind in measure.KINDS] == [10.0, 40.0, 40.0, 40.0]
    native = made(fp32=12.0, bf16=30.0, int8=35.0, int4=80.0)
    assert [native.product(kind) for kind in measure.KINDS] == [12.0, 40.0, 40.0, 80.0]
    assert made(fp32=90.0, bf16=30.0).product("bf16") == 90.0  # bfloat16 may be widened


@PATHS
def test_calls_are_held_to_their_own_limits(path, counted):
    native.use(path)
    ticks = []
    found = calls.report(seconds=3.0, size=MIB, side=10, done=lambda: ticks.append(1))
    assert len(counted) == len(ticks) == calls.count()
    assert sum(seconds for _, _, seconds in counted) == pytest.approx(3.0)
    names = [("torch", "bf16")] + [("native", form or "bf16") for form in FORMS if path != "torch"]
    assert [(call.by, call.form, call.rows) for call in found.calls] == [(*n, rows) for rows in (1, 512) for n in names]
    for call in found.calls:
        assert call.limit == 3.0 and call.share == 1.0
    given = [found.overheads.native, found.overheads.team, found.overheads.barrier]
    assert given == ([None] * 3 if path == "torch" else [Rate(3.0, 2.0)] * 3)


@NATIVE
def test_integers_are_held_to_the_products_of_integers(path, counted, monkeypatch):
    native.use(path)
    monkeypatch.setattr(Limits, "product", lambda self, kind: {"bf16": 6.0, "int8": 12.0, "int4": 24.0}[kind])
    found = calls.report(seconds=0, size=MIB, side=10)
    limit = {(call.by, call.form): call.limit for call in found.calls if call.rows == 512}
    assert limit.pop(("torch", "bf16")) == 6.0
    assert limit == {
        ("native", form): each for form, each in zip(("bf16", "fp8", "int8", "int4"), (6, 6, 12, 24), strict=True)
    }


@NATIVE
def test_the_work_of_a_call(path, counted):
    """Of one row the matrix's bytes; of 512 two operations for each of its numbers and rows."""
    native.use(path)
    calls.report(seconds=0, size=MIB, side=10)
    work = [(work, out) for work, out, _ in counted if isinstance(out, torch.Tensor) and out.ndim == 2][3:]
    for done, out in work:
        rows, cols = out.shape
        least, most = (0.5 * 4096, 2 * 4096) if rows == 1 else (2 * 512 * 4096, 2 * 512 * 4096)
        assert least * cols <= done <= most * cols, out.shape
    assert [len(out) for _, out in work] == [1, 512] + [1] * 4 + [512] * 4
