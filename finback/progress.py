"""Progress bars on stderr, for people: where that is no terminal there is nothing, and rich is not even imported."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Bar:
    """Counts towards a total. This one shows nothing."""

    def advance(self, n: float = 1, **fields: object) -> None:
        """Move on by `n`; `fields` (`loss=1.2345, tokens_per_s=8100`) replace those shown before, by name."""


class _RichBar(Bar):
    def __init__(self, progress: Any, task: Any) -> None:
        self._progress, self._task = progress, task
        self._fields: dict[str, str] = {}

    def advance(self, n: float = 1, **fields: object) -> None:
        self._fields |= {name.replace("_per_", "/").replace("_", " "): _show(value) for name, value in fields.items()}
        shown = "  ".join(f"{name} {value}" for name, value in self._fields.items())
        self._progress.update(self._task, advance=n, fields=shown)


@contextmanager
def bar(
    total: float | None, description: str, done: float = 0, *, in_bytes: bool = False, per_second: float = 10
) -> Iterator[Bar]:
    """A bar with the time that remains; `done` of `total` (None: unknown) is behind us already.

    `in_bytes`: what is counted are bytes, shown as sizes and a speed. `per_second`: how often it is drawn.
    """
    if not sys.stderr.isatty():
        yield Bar()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        *((DownloadColumn(binary_units=True), TransferSpeedColumn()) if in_bytes else (MofNCompleteColumn(),)),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[fields]}", markup=False),
    ]
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=per_second) as progress:
        task = progress.add_task(description, total=total, fields="")
        progress.update(task, completed=done)
        yield _RichBar(progress, task)


def _show(value: object) -> str:
    """A number in few characters: 4 significant digits, or whole thousands."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
