"""Progress on anything that takes longer than a moment: on stderr, and silent where that is no terminal."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Bar(Protocol):
    """A bar that is being shown."""

    def advance(self, n: float = 1, **fields: object) -> None:
        """Move on by `n`; `fields` (loss=0.52, …) are shown behind the bar until the next call names others."""


class _Shown:
    def __init__(self, progress: Any, task: Any) -> None:
        self._progress, self._task = progress, task

    def advance(self, n: float = 1, **fields: object) -> None:
        text = " ".join(f"{name} {value}" for name, value in fields.items())
        self._progress.update(self._task, advance=n, **({"fields": text} if fields else {}))


@contextmanager
def bar(total: float, description: str, done: float = 0) -> Iterator[Bar]:
    """Show a bar with the time that remains while the block runs; `done` of `total` is behind us already."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[fields]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield _Shown(progress, progress.add_task(description, total=total, completed=done, fields=""))
