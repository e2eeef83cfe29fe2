"""The command line is thin over the Python functions: it parses, calls one, and shows what comes back."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

import stillknows as sk
from stillknows.cli.terminal import app

ROOT = Path(sk.__file__).parent
COMMANDS = (
    "unlearn",
    "control",
    "tune",
    "quantize",
    "import",
    "fetch",
    "audit",
    "compare",
    "history",
    "explain",
    "diagnose",
    "score",
    "demo",
    "meta",
    "certify",
    "verify",
)
FUNCTIONS = {"meta": "validate_metrics", "import": "import_model"}  # where the command has another name


def command(name: str) -> Any:
    return typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]


def arguments(name: str) -> list[str]:
    """Return what a command cannot do without, and nothing else."""
    needed = []
    for parameter in command(name).params:
        if parameter.required:
            needed += [parameter.opts[0]] if parameter.opts[0].startswith("--") else []
            needed += ["lr=1e-6..1e-4" if parameter.name == "search" else "x"]
    return needed


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What the Python functions are called with; they return nothing that could be shown."""
    calls: list[Any] = []

    def record(*args: Any, **options: Any) -> Any:
        calls.append((args, options))
        raise typer.Exit

    for name in COMMANDS:
        monkeypatch.setattr(sk, FUNCTIONS.get(name, name), record, raising=False)
    return calls


def optional() -> Iterator[tuple[str, str, str]]:
    """Yield every option that has a default, with the default as it is typed."""
    for name in COMMANDS:
        for parameter in command(name).params:
            if not parameter.required and parameter.default not in (None, False) and not parameter.is_flag:
                yield name, parameter.opts[0], str(parameter.default)


@pytest.mark.parametrize(("name", "flag", "default"), list(optional()))
def test_a_default_that_is_typed_out_is_as_one_that_is_left_out(
    name: str, flag: str, default: str, called: list[Any]
) -> None:
    for options in ([], [flag, default]):
        app([name, *arguments(name), *options], prog_name="stillknows", standalone_mode=False)
    for _, given in called:
        given.pop("command", None)
    assert len(called) == 2
    assert called[0] == called[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_defaults_of_a_command_are_those_of_its_function(name: str, called: list[Any]) -> None:
    app([name, *arguments(name)], prog_name="stillknows", standalone_mode=False)
    from stillknows.api import certifying, comparing, experimenting, judging, making
    from stillknows.training.settings import Settings

    functions = vars(making) | vars(judging) | vars(certifying) | vars(comparing) | vars(experimenting)
    parameters = dict(inspect.signature(functions[FUNCTIONS.get(name, name)]).parameters)
    parameters |= inspect.signature(Settings).parameters
    [(_, given)] = called
    own = {"out", "command", "lr", "epochs"}  # results of commands have a place; rate and length may be found
    own |= {"batch_size"} if name == "control" else set()  # its recipe is the original's
    differing = {
        option: value
        for option, value in given.items()
        if option not in own and (value or parameters[option].default) and value != parameters[option].default
    }
    required = {p.name for p in command(name).params if p.required}
    assert differing.keys() - required - {"policy"} == set()


def test_flags_have_one_python_name_each() -> None:
    found: dict[str, set[str]] = {}
    for name, parameters in ((name, command(name).params) for name in COMMANDS):
        for parameter in parameters:
            assert parameter.name is not None, name
            found.setdefault(parameter.name, set()).add(parameter.opts[0])
    assert {name: flags for name, flags in found.items() if len({f for f in flags if f.startswith("--")}) > 1} == {}


@pytest.mark.parametrize("path", sorted(p for where in ("cli", "api") for p in (ROOT / where).glob("*.py")))
def test_commands_and_functions_are_short(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    spans = {n.name: (n.end_lineno or 0) - n.lineno + 1 for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    assert {name: lines for name, lines in spans.items() if lines > 60} == {}


def test_what_a_command_shows_is_what_the_function_returns(monkeypatch: pytest.MonkeyPatch, cli: Any) -> None:
    found = SimpleNamespace(to_json=lambda: {"cells": []}, warnings=("one",), notes=("two",))
    monkeypatch.setattr(sk, "score", lambda *_, **__: found, raising=False)
    ran = cli("score", "x", "--json")
    assert ran == (0, '{"cells": []}\n', "warning: one\nnote: two\n")
