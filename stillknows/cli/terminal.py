"""What all commands share: the program they belong to, common options, and how results are shown."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import sys
from typing import Any

import typer

from stillknows.formatting import for_terminal
from stillknows.progress import log

app = typer.Typer(
    name="stillknows",
    help="Unlearn knowledge from a language model, then find out whether the model still knows it.",
    epilog="Start with: `stillknows demo`",
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

OPTION = re.compile(r"`([a-z_0-9]+)`")


def examples(*lines: str) -> str:
    """Return the end of a command's help: commands to type."""
    return "**Examples**\n\n" + "\n\n".join(f"`{line}`" for line in lines)


def show(result: Any, as_json: bool, text: str, hint: str = "") -> None:
    """Print a result on standard output, as JSON or as text; what to do next goes to standard error."""
    print_out(json.dumps(result) if as_json else text)  # in ASCII, which every terminal can show and none obeys
    if hint and not as_json:
        log(hint)


def print_out(text: str) -> None:
    """Print on standard output, without codes that steer a terminal.

    A reader that has gone away, as in `| head`, is no error.
    """
    try:
        print(for_terminal(text), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def with_flags(text: str) -> str:
    """Return a message of the library, which names options as Python does, in backticks, with the flags for them."""
    return OPTION.sub(lambda found: _flags().get(found[1], found[0]), text)


@functools.cache
def _flags() -> dict[str, str]:
    """Return the flag of every option of any command, by its Python name; one name has the same flag everywhere."""
    commands: list[Any] = [typer.main.get_command(app)]
    flags: dict[str, str] = {}
    while commands:
        command = commands.pop()
        commands += getattr(command, "commands", {}).values()
        flags |= {p.name: p.opts[0] for p in command.params if p.name and p.opts[0].startswith("--")}
    return flags


def command_line() -> str:
    """Return the command that is being run, as a shell takes it."""
    return shlex.join(["stillknows", *sys.argv[1:]])
