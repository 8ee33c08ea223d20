"""Starting costs nothing: what is heavy is imported by the command that needs it."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "transformers", "pydantic", "tokenizers", "safetensors")


@pytest.mark.parametrize(
    "code",
    [
        "import finback",
        "import finback.cli",
        "import finback.tasks",
        "from typer.testing import CliRunner; from finback.cli import app; r = CliRunner().invoke(app, ['--help']);"
        "assert r.exit_code == 0 and 'doctor' in r.stdout",
    ],
)
def test_nothing_heavy_is_imported(code):
    check = f"import sys; found = [m for m in {HEAVY} if m in sys.modules]; assert not found, found"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_package_offers_what_it_promises():
    import finback

    for name in finback.__all__:
        assert getattr(finback, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        finback.nothing  # noqa: B018
