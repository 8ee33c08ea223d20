"""How a model that cannot be loaded must be refused."""

from pathlib import Path

import pytest

from finback.errors import UserError
from finback.weights import load


def refused(path: Path, *named: str, **options) -> None:
    """`load` raises UserError: one line that holds every text of `named`."""
    with pytest.raises(UserError) as caught:
        load(path, **options)
    for text in named:
        assert text in str(caught.value)
    assert "\n" not in str(caught.value)
