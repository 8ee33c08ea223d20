"""What `finback doctor` says of the compiled kernels, on processors, builds and settings that are given."""

import sys
from types import ModuleType

import pytest

from finback import doctor, machine
from finback.kernels import native

ZEN4 = set().union(*native.LEVELS.values()) | {"sse2"}
HASWELL = native.LEVELS["avx2"] | {"sse2"}
LEVELS = {"avx512": native.LEVELS["avx512"], "avx2": native.LEVELS["avx2"]}


@pytest.fixture
def examined(monkeypatch):
    """What the doctor says of a processor with `flags`, kernels `built` for some paths, and FINBACK_KERNELS."""

    def run(flags: set[str], built: tuple[str, ...] = (), forced: str | None = None, broken: tuple[str, ...] = ()):
        monkeypatch.setattr(native, "LEVELS", LEVELS)
        monkeypatch.setattr(machine, "cpu_flags", lambda: flags)
        monkeypatch.delenv(native.VARIABLE, raising=False)
        if forced is not None:
            monkeypatch.setenv(native.VARIABLE, forced)

        def load(name: str) -> ModuleType:
            path = name.removeprefix("finback.kernels._")
            assert path in LEVELS
            if path in broken:
                raise ImportError("libgomp.so.1: cannot open shared object file")
            if path not in built:
                raise ModuleNotFoundError(name)
            return ModuleType(name)

        monkeypatch.setattr(native.importlib, "import_module", load)
        facts = doctor.examine()
        return facts, [line for line in facts["advice"] if "ernels" in line or "KERNELS" in line or "AVX2" in line]

    return run


def test_the_best_path_that_is_built_runs_and_nothing_is_advised(examined):
    for flags, best in ((ZEN4, "avx512"), (HASWELL, "avx2")):
        facts, advice = examined(flags, built=("avx512", "avx2"))
        assert (facts["kernels"], facts["kernels_missing"], advice) == (best, [], [])
        assert facts["kernels_possible"][0] == best and facts["kernels_possible"][-1] == "torch"


def test_kernels_that_were_not_built_say_how_to_build_them(examined):
    facts, [line] = examined(ZEN4)
    assert facts["kernels"] == "torch"
    assert facts["kernels_missing"] == ["avx512: not built", "avx2: not built"]
    for word in (
        "absent",
        "avx512",
        "avx2",
        "compiler",
        "--force-reinstall",
        "--no-binary",
        "FINBACK_REQUIRE_NATIVE=1",
    ):
        assert word in line
    assert "torch takes their place" in line


def test_only_what_is_better_than_the_path_that_runs_is_missed(examined):
    facts, [line] = examined(ZEN4, built=("avx2",))
    assert facts["kernels"] == "avx2"
    assert "(avx512: not built)" in line and "avx2 takes their place" in line
    assert examined(ZEN4, built=("avx512",))[1] == []


def test_kernels_that_do_not_load_say_why(examined):
    facts, [line] = examined(HASWELL, broken=("avx2",))
    assert facts["kernels"] == "torch"
    assert "avx2: libgomp.so.1: cannot open shared object file" in line


@pytest.mark.parametrize(("forced", "runs"), [("avx2", "avx2"), ("torch", "torch")])
def test_a_lower_path_that_is_forced_is_named(examined, forced, runs):
    facts, [line] = examined(ZEN4, built=("avx512", "avx2"), forced=forced)
    assert (facts["kernels"], facts["kernels_forced"]) == (runs, forced)
    assert f"FINBACK_KERNELS={forced}" in line and "avx512" in line and "unset" in line
    assert examined(ZEN4, built=("avx512", "avx2"), forced="avx512")[1] == []


@pytest.mark.parametrize(("flags", "forced"), [(HASWELL, "avx512"), (HASWELL, "sse9"), (ZEN4, "avx512")])
def test_a_forced_path_that_cannot_run_is_advice_and_no_error(examined, flags, forced):
    facts, lines = examined(flags, built=("avx2",), forced=forced)
    assert facts["kernels"] is None
    assert f"FINBACK_KERNELS={forced} cannot be taken here: unset it, or set one of avx2, torch" in lines


def test_a_processor_without_a_path_is_told_so(examined):
    facts, lines = examined({"sse2"})
    assert (facts["kernels"], facts["kernels_possible"], facts["kernels_missing"]) == ("torch", ["torch"], [])
    assert any("neither AVX-512 BF16 nor AVX2" in line for line in lines)
    assert not any("compiler" in line for line in lines)


def test_without_torch_nothing_is_said_of_kernels(monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: (_ for _ in ()).throw(doctor.PackageNotFoundError(name)))
    found = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "torch" else found(name))
    monkeypatch.setitem(sys.modules, "finback.kernels.native", None)  # importing it would fail
    facts = doctor.examine()
    assert facts["kernels"] is None and facts["kernels_possible"] == []
    assert any("PyTorch is missing" in line for line in facts["advice"])
    assert not any("ernels" in line for line in facts["advice"])
