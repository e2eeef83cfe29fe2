"""What all commands share: the program they belong to, common options, and how results are shown."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from stillknows import defaults
from stillknows.errors import UserError
from stillknows.formatting import for_terminal
from stillknows.progress import log

if TYPE_CHECKING:
    from stillknows.types import Benchmark

app = typer.Typer(
    name="stillknows",
    help="Unlearn knowledge from a language model, then find out whether the model still knows it.",
    epilog="Start with: `stillknows demo`",
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

CHOICE = "<choice>"  # the help's text names the choices: as a type they would leave it no room in 80 columns
COUNT = "<int>"
OPTION = re.compile(r"`([a-z_0-9]+)`")

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for the results.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace results that the folder holds.")]
Template = Annotated[
    str | None,
    typer.Option("--template", help='Frame of a question, with "{prompt}"; or "chat" for the tokenizer\'s own.'),
]
Refusals = Annotated[
    Path | None,
    typer.Option(
        "--refusals",
        help="Text file of answers that give nothing away, one on each line, for methods such as idk and dpo; "
        "without it the benchmark's, or built-in ones.",
    ),
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, …")]

BenchmarkSpec = Annotated[
    str,
    typer.Option(
        "--benchmark",
        help="What to forget and what to retain: jsonl:forget=FILE,retain=FILE for files of your own, "
        "tofu:forget10, …: see `stillknows list benchmarks`.",
    ),
]
Data = Annotated[str | None, typer.Option("--data", help="Folder with the benchmark's files, instead of the hub.")]
LongItems = Annotated[
    Literal["error", "truncate"],
    typer.Option(
        "--long-items",
        metavar=CHOICE,
        help="What to do with items longer than the context: error or truncate.",
    ),
]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Load pickled weights (they can run code).")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]


def examples(*lines: str) -> str:
    """Return the end of a command's help: commands to type."""
    return "**Examples**\n\n" + "\n\n".join(f"`{line}`" for line in lines)


def listed(names: str) -> str:
    """Return names joined by commas as the help shows them: where a line may end, so that none is cut off."""
    return names.replace(",", ", ")


METRICS = listed(defaults.METRICS)


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


def chosen_benchmark(spec: str, data: str | None, template: str | None, refusals: Path | None = None) -> Benchmark:
    """Return the benchmark that --benchmark, --data, --template and --refusals name."""
    from stillknows.registry import bind

    bound = bind("benchmark", spec)
    if data and "data" not in bound.options:
        raise UserError(f"--data does not apply to the benchmark {bound.plugin.name}", "leave it out")
    benchmark = bind("benchmark", bound.respelled(data=data))() if data else bound()
    benchmark = replace(benchmark, template=template) if template else benchmark
    if refusals is None:
        return benchmark
    from stillknows.benchmarks.files import read_refusals

    return replace(benchmark, refusals=read_refusals(refusals))


def with_flags(text: str) -> str:
    """Return a message of the library, which names options as Python does, in backticks, with the flags for them."""
    return OPTION.sub(lambda found: _flags().get(found[1], found[0]), text)


@functools.cache
def _flags() -> dict[str, str]:
    """Return the flag of every option of any command, by its Python name; one name has the same flag everywhere."""
    commands, flags = [typer.main.get_command(app)], {}
    while commands:
        command = commands.pop()
        commands += getattr(command, "commands", {}).values()
        flags |= {p.name: p.opts[0] for p in command.params if p.name and p.opts[0].startswith("--")}
    return flags


def command_line() -> str:
    """Return the command that is being run, as a shell takes it."""
    return shlex.join(["stillknows", *sys.argv[1:]])
