"""A progress bar for the long parts, on a terminal only: a log file gets the summaries that the callers print."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def bar(label: str, total: int, *, in_bytes: bool = False, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Show a bar of `total` units (bytes where `in_bytes`) on stderr; yields the function that advances it."""
    if not shown or not sys.stderr.isatty():
        yield lambda _: None
        return
    count = DownloadColumn() if in_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda amount: progress.update(task, advance=amount)
