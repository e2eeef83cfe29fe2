"""What the library says while it works: the standard logger "stillknows", and bars.

Nothing is written to standard output. `shown` is how the command line shows the log; a Python program that wants to
see more than warnings configures the logger as any other, or uses `shown` too.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Generator

from stillknows.formatting import duration, for_terminal, one_line

LOGGER = logging.getLogger("stillknows")
LINE_SECONDS = 5.0

Advance = Callable[..., None]  # advance(amount=1, note="")


def log(text: str) -> None:
    """Log a line of what is going on."""
    LOGGER.info("%s", text)


def warn(text: str) -> None:
    """Log what a user has to know, and may want to change."""
    LOGGER.warning("%s", text)


class _StandardError(logging.Handler):
    """Prints messages on whatever is the standard error stream by then, and nothing that steers a terminal."""

    def __init__(self, worded: Callable[[str], str]) -> None:
        super().__init__()
        self.worded = worded

    def emit(self, record: logging.LogRecord) -> None:
        print(for_terminal(self.worded(record.getMessage())), file=sys.stderr, flush=True)


@contextlib.contextmanager
def shown(worded: Callable[[str], str] = str) -> Generator[None]:
    """Show the log on standard error while the block runs, with bars where that is a terminal.

    Args:
        worded: gives a message the words that its readers know.
    """
    handler, level, propagate = _StandardError(worded), LOGGER.level, LOGGER.propagate
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
        LOGGER.propagate = propagate


@contextlib.contextmanager
def progress(label: str, total: int) -> Generator[Advance]:
    """Show that `total` units of work are under way, if the log is; the block calls what it gets once per unit."""
    if total == 0 or not LOGGER.isEnabledFor(logging.INFO):
        yield _nothing
    elif sys.stderr.isatty():
        with _bar(label, total) as advance:
            yield advance
    else:
        yield _lines(label, total)


def _nothing(amount: int = 1, note: str = "") -> None:
    """Show nothing."""


@contextlib.contextmanager
def _bar(label: str, total: int) -> Generator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    label_column = TextColumn("{task.description}", style="progress.description", markup=False)
    columns = (label_column, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    notes = TextColumn("{task.fields[note]}", markup=False)
    with Progress(*columns, notes, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(one_line(label), total=total, note="")

        def advance(amount: int = 1, note: str = "") -> None:
            bar.update(task, advance=amount, note=one_line(note))

        yield advance


def _lines(label: str, total: int) -> Advance:
    done, own, start = 0, 0, time.monotonic()
    last = start

    def advance(amount: int = 1, note: str = "") -> None:
        nonlocal done, own, last
        done, own = done + amount, own + (amount == 1)  # what is there from an earlier run comes in one piece
        if amount and time.monotonic() - last >= LINE_SECONDS:
            last = time.monotonic()
            left = (last - start) / max(1, own) * (total - done)
            rest = f", {duration(left)} for the rest" if done < total else ""
            log(f"  {label}: {done}/{total} {note}".rstrip() + rest)

    return advance
