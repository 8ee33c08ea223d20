"""The suite catches the planted bugs of tests/mutations_*.py, and it is the bug that it catches."""

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mutations import ROOT, copy, everything, plant, run

MUTATIONS = everything()
EACH = pytest.mark.parametrize(
    "mutation", MUTATIONS, ids=lambda m: f"{m.file}: {m.why}".encode("ascii", "ignore").decode()
)


@EACH
def test_the_place_is_there_once(mutation):
    assert (ROOT / "finback" / mutation.file).read_text(encoding="utf-8").count(mutation.old) == 1
    assert mutation.old != mutation.new and mutation.tests and mutation.why


def test_no_bug_is_planted_twice():
    assert len({(mutation.file, mutation.old, mutation.new) for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.check
def test_the_copy_is_what_runs(tmp_path):
    copy(tmp_path)
    code = "import os, finback.errors; print(os.path.abspath(finback.errors.__file__))"
    command, environment = [sys.executable, "-c", code], {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "finback" / "errors.py")


@pytest.mark.check
def test_without_a_bug_all_the_named_tests_pass(tmp_path):
    copy(tmp_path)
    done = run(sorted({test for mutation in MUTATIONS for test in mutation.tests}), tmp_path, limit_s=1200)
    assert done.returncode == 0, done.stdout[-3000:]


def planted(mutation) -> subprocess.CompletedProcess[str]:
    """The named tests' run on a copy with the bug in it."""
    with tempfile.TemporaryDirectory() as name:
        copy(Path(name))
        plant(mutation, Path(name))
        return run(mutation.tests, Path(name))


@pytest.fixture(scope="module")
def runs(request):
    """A run for every bug that was chosen, as many at a time as there are processors."""
    chosen = [i.callspec.params["mutation"] for i in request.session.items if i.name.startswith("test_the_bug_is")]
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    yield {id(mutation): pool.submit(planted, mutation) for mutation in chosen}
    pool.shutdown(cancel_futures=True)


@pytest.mark.check
@EACH
def test_the_bug_is_caught(mutation, runs):
    done = runs[id(mutation)].result()
    assert done.returncode == 1, f"not caught: {mutation.why}\n{done.stdout[-3000:]}{done.stderr[-1000:]}"
