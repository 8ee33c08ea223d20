"""Many rows by AMX tiles: the tiles themselves as Intel defines them, then every weight format by them, bit for bit.

Runs on plain code that stands for the tiles (cpu/amx_model.h), and on the processor's own where it has any.
"""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from native_paths import laid, native_paths, near, rows_of, stored

from finback.errors import UserError
from finback.kernels import native, panels
from finback.kernels.order import fixed_order
from finback.kernels.quantise import FORMATS

TILED = [path for path in native_paths() if path.startswith("amx")]
PATHS = pytest.mark.parametrize("path", TILED)
FORMS = pytest.mark.parametrize("form", panels.FORMS)
LEAST = {None: 8, "fp8": 8, "int8": 8, "int4": 16}  # rows; `least_rows` in cpu/tile.h
BOUND = {None: 2**-8, "fp8": 2**-7.5, "int8": 0.012, "int4": 2**-7.5}  # FP8 and int4 round to bfloat16 twice


@pytest.fixture(autouse=True)
def _best_path_again():
    with torch.no_grad():
        yield
    native.use(None)


def flushed(x):
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x).astype(np.float32)


def fused(x, y, total):
    """x y + total of float32 whose products are exact in float64, rounded once: to odd in float64, then to nearest."""
    product, before = x.astype(np.float64) * y.astype(np.float64), total.astype(np.float64)
    after = before + product
    other = after - before
    error = (before - (after - other)) + (product - other)
    bits = np.where(np.signbit(error) != np.signbit(after), after.view(np.int64) - 1, after.view(np.int64)) | 1
    return flushed(np.where(error == 0, after, bits.view(np.float64)).astype(np.float32))


def numbers(shape, seed, scale) -> torch.Tensor:
    """bfloat16 over many powers of two, with zeros and denormal numbers among them."""
    random = np.random.default_rng(seed)
    values = random.standard_normal(shape) * 2.0 ** random.integers(-scale, scale + 1, shape)
    values[random.random(shape) < 0.05] = 2.0**-130
    values[random.random(shape) < 0.05] = 0
    return torch.from_numpy(values.astype(np.float32)).bfloat16()


def product(module, whole: bool, rows: int, depth: int, a: torch.Tensor, b: torch.Tensor, sums: torch.Tensor):
    sums = sums.clone()
    module.tile_product(whole, rows, depth, a.data_ptr(), b.data_ptr(), sums.data_ptr())
    return sums.numpy()


@PATHS
@pytest.mark.parametrize(("rows", "depth"), [(16, 64), (1, 64), (7, 64), (16, 32), (3, 4)])
@pytest.mark.parametrize("scale", [2, 12, 60])
def test_a_product_of_bfloat16_tiles(path, rows, depth, scale):
    """Intel SDM, TDPBF16PS: two chains of fused sums, of even and of odd columns, then both, then what was there."""
    _, module = native.find(path)
    a, b = numbers((rows, depth // 2), rows, scale), numbers((depth // 4, 16, 2), depth, scale)
    sums = numbers((rows, 16), 3, scale).float()
    x, w = flushed(a.float().numpy()), flushed(b.float().numpy())
    even, odd = np.zeros((rows, 16), np.float32), np.zeros((rows, 16), np.float32)
    for step in range(depth // 4):
        even = fused(x[:, 2 * step, None], w[step, :, 0], even)
        odd = fused(x[:, 2 * step + 1, None], w[step, :, 1], odd)
    wanted = flushed(flushed(sums.numpy()) + flushed(even + odd))
    assert np.array_equal(product(module, False, rows, depth, a, b, sums), wanted)
    assert np.abs(wanted).max() > 0


@PATHS
@pytest.mark.parametrize(("rows", "depth"), [(16, 64), (1, 64), (7, 64), (16, 32), (3, 4)])
def test_a_product_of_int8_tiles(path, rows, depth):
    """Intel SDM, TDPBSUD: bytes with a sign times bytes without one; the sums of 32 bits wrap around."""
    _, module = native.find(path)
    random = np.random.default_rng(rows + depth)
    a = random.integers(-128, 128, (rows, depth), dtype=np.int8)
    b = random.integers(0, 256, (depth // 4, 16, 4), dtype=np.uint8)
    a[0], b[:, 0] = -128, 255
    sums = random.integers(-(2**31), 2**31, (rows, 16), dtype=np.int64)
    sums[0, 0], sums[-1, 1] = -(2**31), 2**31 - 1
    whole = sums + a.astype(np.int64) @ b.astype(np.int64).transpose(0, 2, 1).reshape(depth, 16)
    got = product(module, True, rows, depth, *(torch.from_numpy(each) for each in (a, b, sums.astype(np.int32))))
    assert np.array_equal(got, whole.astype(np.int32))


@PATHS
@FORMS
@pytest.mark.parametrize(("rows", "cols"), [(48, 160), (17, 31), (40, 32), (33, 224)])
def test_every_number_of_rows(path, form, rows, cols):
    """1 to 70 rows: by tiles a row's bits are always the same, in fixed order for all; few rows are AVX-512's."""
    codes, scale, values = stored(form, rows, cols)
    held, x = laid(form, codes, scale, cols), rows_of(70, cols)
    native.use("avx512")
    few = native.linear(x, native.matrix(form, rows, cols, held), rows)
    native.use(path)
    matrix = native.matrix(form, rows, cols, held)
    with fixed_order():
        whole = native.linear(x, matrix, rows)
    near(whole, x.float() @ values.T, BOUND[form])
    for count in range(1, 71):
        part = x[70 - count :].clone()
        with fixed_order():
            assert torch.equal(native.linear(part, matrix, rows), whole[70 - count :])
        wanted = whole if count >= LEAST[form] else few
        assert torch.equal(native.linear(part, matrix, rows), wanted[70 - count :])


@PATHS
@pytest.mark.parametrize("form", ["fp8", "int4"])
@pytest.mark.parametrize(("rows", "cols", "count"), [(48, 160, 33), (300, 514, 40), (1024, 4200, 17)])
def test_packed_weights_are_written_out_as_plain_ones(path, form, rows, cols, count):
    """By tiles FP8 and int4 equal the bfloat16 matrix that Format.dequantise makes of them, bit for bit."""
    native.use(path)
    codes, scale, _ = stored(form, rows, cols)
    plain = FORMATS[form].dequantise(codes, scale, cols, torch.bfloat16)
    packed, dense = laid(form, codes, scale, cols), laid(None, plain, None, cols)
    x = rows_of(count, cols)
    got = native.linear(x, native.matrix(form, rows, cols, packed), rows)
    assert torch.equal(got, native.linear(x, native.matrix(None, rows, cols, dense), rows))


@PATHS
@pytest.mark.parametrize(("rows", "cols", "count"), [(48, 160, 33), (33, 32, 70), (300, 514, 40), (64, 2200, 300)])
def test_int8_by_tiles_is_int8_in_registers(path, rows, cols, count):
    """Whole numbers have one sum, and groups are scaled in the same order: the same bits as AVX-512."""
    codes, scale, _ = stored("int8", rows, cols)
    held, x = laid("int8", codes, scale, cols), rows_of(count, cols)
    got = []
    for each in (path, "avx512"):
        native.use(each)
        got.append(native.linear(x, native.matrix("int8", rows, cols, held), rows))
    assert torch.equal(*got)


@PATHS
@FORMS
def test_rows_and_panels_that_do_not_stay_in_cache_together(path, form):
    """Past HOME bytes of rows (64 of these) and of panels (4 of these) in cpu/tile.h."""
    native.use(path)
    codes, scale, values = stored(form, 144, 4096)
    held, x = laid(form, codes, scale, 4096), rows_of(150, 4096)
    near(native.linear(x, native.matrix(form, 144, 4096, held), 144), x.float() @ values.T, BOUND[form])


@PATHS
def test_the_switch_outlives_a_change_of_paths(path):
    codes, scale, _ = stored(None, 16, 64)
    held, x = laid(None, codes, scale, 64), rows_of(40, 64)
    with fixed_order():
        native.use(path)
        inside = native.linear(x[:1], native.matrix(None, 16, 64, held), 16)
        with fixed_order(False):
            pass
        assert torch.equal(inside, native.linear(x, native.matrix(None, 16, 64, held), 16)[:1])
        assert torch.equal(inside, native.linear(x[:1], native.matrix(None, 16, 64, held), 16))


def test_tiles_that_the_system_refuses(monkeypatch):
    """A path asked for by name fails with the reason, and says what is left."""
    monkeypatch.setattr(native.machine, "cpu_flags", lambda: native.BY_NAME["amx"] | native.LEVELS["avx2"])

    def load(name):
        if name == "finback.kernels._amx":
            raise ImportError("the system does not allow AMX tiles: Operation not permitted")
        return name

    monkeypatch.setattr(native.importlib, "import_module", load)
    assert native.find() == ("avx512", "finback.kernels._avx512")
    with pytest.raises(UserError, match=r"=amx: .*not allow AMX tiles: .*; allowed here: avx512, avx2, torch"):
        native.find("amx")


def test_the_system_is_asked_for_tiles():
    """Where the processor has none, the module that needs them says so instead of failing at the first tile."""
    if not TILED:
        pytest.skip("the module has AVX-512 code in it, which this processor cannot load")
    if find_spec("finback.kernels._amx") is None:
        pytest.skip("not built: the compiler knows no AMX (CMakeLists.txt), or only the sanitized modules are here")
    if "amx_tile" in native.machine.cpu_flags():
        pytest.skip("this processor has tiles: there is nothing to refuse; FINBACK_KERNELS=amx runs the kernels' tests")
    with pytest.raises(ImportError, match=r"the system does not allow AMX tiles: \w+"):
        native.importlib.import_module("finback.kernels._amx")


def test_the_model_of_tiles_is_never_chosen_by_itself():
    assert "amx_model" not in native.supported() and native.find()[0] != "amx_model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native.machine, "cpu_flags", lambda: native.LEVELS["avx2"])
        with pytest.raises(UserError, match="not a path of this processor"):
            native.find("amx_model")
