"""The native kernels' tests under the address and undefined-behaviour sanitizers, on all paths that run here."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mutations import ROOT, copy
from native_paths import native_paths

from finback import machine

TESTS = (
    "test_kernels_native.py",
    "test_kernels_amx.py",
    "test_kernels_train_attention.py",
    "test_kernels_train_experts.py",
    "test_kernels_train_rows.py",
)
LIMIT_S = 1800


def output(*command: str | Path, **options) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout.strip()


def library(name: str) -> str:
    return str(Path(output("c++", f"-print-file-name={name}")).resolve())


def cmake() -> str:
    found = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert found is not None, "cmake comes with the test extra"
    return found


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> Path:
    """A copy of package and tests whose kernels are built with sanitizers."""
    if shutil.which("c++") is None:
        assert not os.environ.get("FINBACK_REQUIRE_NATIVE"), "no C++ compiler where native kernels are required"
        pytest.skip("no C++ compiler: no native kernels were built here either, so there is nothing to sanitize")
    target, build = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("build")
    copy(target)
    for module in (target / "finback" / "kernels").glob("_*.so"):
        module.unlink()
    place = output(sys.executable, "-m", "nanobind", "--cmake_dir")
    found = (f"-DPython_EXECUTABLE={sys.executable}", f"-Dnanobind_DIR={place}")
    output(cmake(), "-S", ROOT, "-B", build, "-DFINBACK_SANITIZE=ON", *found)
    output(
        cmake(),
        "--build",
        build,
        "--parallel",
        str(machine.cpus()),
        "--target",
        *(f"_{path}" for path in native_paths()),
    )
    for module in build.glob("_*.so"):
        shutil.copy(module, target / "finback" / "kernels")
    return target


def run(target: Path, *command: str) -> tuple[int, str]:
    """Exit code; what was printed, then what the sanitizers reported."""
    report = target / "report"
    log = f"log_path={report}:halt_on_error=1"
    # Fresh memory is all ones, which no format has for a number: what is read before it is written shows in results.
    memory = "detect_leaks=0:verify_asan_link_order=0:malloc_fill_byte=255:max_malloc_fill_size=268435456"
    environment = {
        **os.environ,
        "PYTHONPATH": str(target),
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        "ASAN_OPTIONS": f"{memory}:{log}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:{log}",
        "OMP_NUM_THREADS": "2",
        "PYTEST_ADDOPTS": "",
    }
    done = subprocess.run(
        [sys.executable, *command],
        cwd=target,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
    )
    reports = "".join(path.read_text(errors="replace") for path in target.glob("report.*"))
    for path in target.glob("report.*"):
        path.unlink()
    return done.returncode, done.stdout[-6000:] + reports


@pytest.mark.check
def test_the_kernels_keep_to_their_memory(sanitized):
    options = ("-x", "-p", "no:cacheprovider", "--hypothesis-profile=mutation")
    code, said = run(sanitized, "-m", "pytest", *options, *(f"tests/{test}" for test in TESTS))
    assert code == 0 and "Sanitizer" not in said and "runtime error" not in said, said
    assert " passed" in said and "no tests ran" not in said


@pytest.mark.check
def test_a_write_past_the_end_is_reported(sanitized):
    """The sanitizers are at work: a row of results one number short of what a kernel is told."""
    code, said = run(
        sanitized,
        "-c",
        "import torch; from finback.kernels import native, panels\n"
        "module, held = native.kernels(), torch.zeros(1, panels.panel_bytes(None, 32), dtype=torch.uint8)\n"
        "x, out = torch.zeros(2, 32).bfloat16(), torch.zeros(2 * 16 - 1).bfloat16()\n"
        "module.linear(native.matrix(None, 16, 32, held), x.data_ptr(), 2, 0, out.data_ptr(), False, 1)",
    )
    assert code != 0 and "ERROR: AddressSanitizer" in said and "WRITE of size 32" in said, said
