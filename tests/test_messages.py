"""Messages name options as their readers do: Python names in the library, flags on the command line."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import stillknows
from stillknows.cli.terminal import with_flags
from stillknows.errors import UserError

ROOT = Path(stillknows.__file__).parent
REPEATED = ("--overwrite", " --overwrite")  # put behind a command that is shown as it was typed
FLAG = re.compile(r"(^|\s|[`'\"(])--([a-z]|$)")  # at the end of a text: what follows is filled in


def texts(tree: ast.AST) -> Iterator[str]:
    """Yield the texts of a module that may be shown: no docstrings, no sources of plug-ins."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.keyword) and node.arg == "source":
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        yield from texts(node)


@pytest.mark.parametrize("path", [p for p in sorted(ROOT.rglob("*.py")) if "cli" not in p.relative_to(ROOT).parts])
def test_the_library_names_no_flags(path: Path) -> None:
    assert [
        text
        for text in texts(ast.parse(path.read_text(encoding="utf-8")))
        if FLAG.search(text) and text not in REPEATED
    ] == []


def test_the_command_line_shows_flags() -> None:
    assert with_flags("add `overwrite`, or set `max_steps`") == "add --overwrite, or set --steps"
    assert with_flags("give one with `controls`") == "give one with --control"
    assert with_flags("see `stillknows list`; `nothing`, `models_` and overwrite stay") == (
        "see `stillknows list`; `nothing`, `models_` and overwrite stay"
    )


def test_one_message_reads_well_in_both(cli: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lower `epochs`, or set `max_steps`"):
        stillknows.unlearn(tmp_path, "world", epochs=1e9)
    ran = cli("unlearn", tmp_path, "--benchmark", "world", "--epochs", 1e9, "--out", tmp_path / "out")
    assert (ran.code, "lower --epochs, or set --steps" in ran.err) == (2, True), ran.err
