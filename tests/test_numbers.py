"""The map of published numbers names only what exists: specs that bind, tests that are there, commands that parse."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from stillknows import registry
from stillknows.cli import app
from stillknows.kinds import Kind, PluginRole

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "numbers.md").read_text()
KINDS: dict[str, tuple[Kind, PluginRole | None]] = {
    **{"model metric": ("metric", "model"), "metric": ("metric", "example"), "benchmark": ("benchmark", None)},
    **{"format": ("transform", "deployment"), "retain objective": ("objective", "retain")},
}
SPECS = sorted(set(re.findall(rf"\b({'|'.join(KINDS)}) `([^`]+)`", PAGE)))
COMMANDS = sorted(set(re.findall(r"`stillknows ([^`]+)`", PAGE)))


@pytest.mark.parametrize(("noun", "spec"), SPECS)
def test_every_spec_binds(noun: str, spec: str) -> None:
    kind, role = KINDS[noun]
    assert registry.bind(kind, spec, role).plugin.noun == noun


@pytest.mark.parametrize("noun", ["metric", "model metric", "benchmark"])
def test_everything_that_measures_a_published_number_is_on_the_page(noun: str) -> None:
    """All but what is this project's own."""
    own = {"metric": {"entropy", "refusal_rate"}, "model metric": set(), "benchmark": {"jsonl", "world"}}
    named = {spec.partition(":")[0] for found, spec in SPECS if found == noun}
    assert named >= registry.plugins(*KINDS[noun]).keys() - own[noun]


def test_every_test_that_the_page_names_compares_with_published_logs() -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert named
    for name in named:
        assert re.search(rf"@pytest\.mark\.gold\n(@[^\n]*\n|[ \]\)][^\n]*\n)*def {name}\(", tests), name


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_has_these_options(line: str) -> None:
    name, *words = line.split()
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    options = {option for parameter in commands[name].params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options
