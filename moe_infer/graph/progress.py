"""What is shown while something takes long: a bar for bytes, a line for steps."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bytes_bar(wanted: bool | None, title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error; gives the function to call with bytes done.

    Args:
        wanted: None: if standard error is a terminal.
        title: what is being done.
        total: bytes.
    """
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda n: bar.advance(task, n)


@contextmanager
def status(wanted: bool | None) -> Iterator[Callable[[str], None]]:
    """A line on standard error; gives the function to call with what is being done.

    Args:
        wanted: None: if standard error is a terminal.
    """
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield lambda _: None
        return
    from rich.console import Console

    with Console(stderr=True).status("") as line:
        yield lambda text: line.update(text)
