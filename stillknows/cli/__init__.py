"""The command line. Heavy imports happen inside the commands, so that --help answers at once."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import signal
import sys
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from stillknows.cli import building, certifying, comparing, importing, judging, listing
from stillknows.cli.shards import shards
from stillknows.cli.terminal import app, print_out, with_flags
from stillknows.errors import UserError, is_disk_full, is_out_of_memory
from stillknows.progress import log, shown

# modules whose commands join the program as they are imported
COMMANDS = (building, importing, judging, certifying, comparing, listing)
app.add_typer(shards, name="shards")


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    plugin: Annotated[
        list[Path] | None, typer.Option(help="Python file with plug-ins of your own, which is run: repeat it.")
    ] = None,
) -> None:
    if version:
        from stillknows import __version__

        print_out(__version__)
        raise typer.Exit
    if plugin:
        from stillknows.registry import load_file

        for path in plugin:
            load_file(path)
    if context.invoked_subcommand is None:
        print_out(context.get_help())


STOPPED = "stopped. What was finished is kept: to go on, repeat the command (unlearn: add --resume)"
DISK_FULL = (
    "the disk is full; nothing was half-written\n"
    "  free some space, then repeat the command (unlearn: add --resume) to go on from what was saved"
)
OUT_OF_MEMORY = (
    "out of memory\n"
    "  use a machine with more of it or a smaller model, end what else runs there, or, where --device cuda is full, "
    "take --device cpu; for unlearn, lower --batch-size or raise --accumulate"
)
INTERRUPTED, TERMINATED = 130, 143  # 128 and the number of the signal
PLAIN = {"−": "-", "–": "-", "…": "...", "≤": "<=", "≥": ">=", "∞": "inf", "’": "'", "“": '"', "”": '"'}


@shown(with_flags)
def main() -> None:
    """Run the command line; every way out is a message and an exit code, never a traceback for bad input."""
    _print_what_can_be_printed()
    try:
        with _terminable():
            code = app(prog_name="stillknows", standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except _Terminated:
        _fail(STOPPED, TERMINATED)
    except Exception as error:
        _fail(_explain(error), getattr(error, "exit_code", 2))
    if code == INTERRUPTED:  # typer turns Ctrl-C into this code without a word
        _fail(STOPPED, INTERRUPTED)
    sys.exit(code or 0)


def _print_what_can_be_printed() -> None:
    """Let letters that a terminal's encoding lacks be written in others instead of ending the program."""

    def others(error: UnicodeError) -> tuple[str, int]:
        if not isinstance(error, UnicodeEncodeError):
            raise error
        lacking = error.object[error.start : error.end]
        return "".join(PLAIN.get(c) or c.encode("unicode_escape").decode() for c in lacking), error.end

    codecs.register_error("stillknows", others)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="stillknows")


class _Terminated(BaseException):
    """The program was asked to end by SIGTERM, as batch systems and containers do."""


@contextlib.contextmanager
def _terminable() -> Generator[None]:
    """Let SIGTERM end the block as Ctrl-C does: what is half-written is removed, what is finished stays."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may say what signals do
        yield
        return

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would interrupt the clearing up
        raise _Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _explain(error: Exception) -> str:
    """Say in words what a user can mend; anything else is a fault of the program and is raised again."""
    text = str(error)
    if isinstance(error, UserError):
        return with_flags(text)
    if hasattr(error, "format_message"):  # what typer finds wrong with the arguments
        context = getattr(error, "ctx", None)
        return f"{error.format_message()}\n  {context.command_path if context else 'stillknows'} --help"  # type: ignore[attr-defined]
    if is_disk_full(error):
        return DISK_FULL
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    raise error


def _fail(message: str, code: int) -> NoReturn:
    if "--json" in sys.argv:
        print_out(json.dumps({"error": message}))
    log(f"stillknows: {message}")
    sys.exit(code)
