"""Progress on standard error: a bar in a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from stillknows.formatting import for_terminal, one_line

LINE_SECONDS = 5.0

Advance = Callable[..., None]  # advance(amount=1, note="")


def say(text: str) -> None:
    """Print one line of what is going on."""
    print(for_terminal(text), file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(label: str, total: int) -> Iterator[Advance]:
    """Show that `total` units of work are under way; the block calls what it gets once per unit."""
    if total == 0:
        yield lambda amount=1, note="": None
    elif sys.stderr.isatty():
        with _bar(label, total) as advance:
            yield advance
    else:
        yield _lines(label, total)


@contextlib.contextmanager
def _bar(label: str, total: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    label_column = TextColumn("{task.description}", style="progress.description", markup=False)
    columns = (label_column, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    notes = TextColumn("{task.fields[note]}", markup=False)
    with Progress(*columns, notes, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(one_line(label), total=total, note="")
        yield lambda amount=1, note="": bar.update(task, advance=amount, note=one_line(note))


def _lines(label: str, total: int) -> Advance:
    done, last = 0, time.monotonic()

    def advance(amount: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += amount
        if time.monotonic() - last >= LINE_SECONDS:
            last = time.monotonic()
            say(f"  {label}: {done}/{total} {note}".rstrip())

    return advance
