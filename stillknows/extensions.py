"""Plug-ins of others: packages with the entry point `stillknows.plugins`, and files. Importing them registers them."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import sys
import traceback
from importlib.metadata import EntryPoint
from pathlib import Path

from stillknows.errors import UserError

GROUP = "stillknows.plugins"


@functools.cache
def packages() -> tuple[EntryPoint, ...]:
    """Return the entry points of installed packages that bring plug-ins."""
    return tuple(importlib.metadata.entry_points(group=GROUP))


def load_package(entry: EntryPoint) -> None:
    """Import what an entry point names. Raises UserError for one that is broken."""
    package = entry.dist.name if entry.dist else entry.value
    try:
        entry.load()
    except (Exception, SystemExit) as error:  # code of others fails in its own ways
        said = f"the plug-ins of {package} cannot be loaded: {_said(error)}"
        raise UserError(said, f"update it or remove it: pip uninstall {package}") from error


def load_file(path: Path) -> None:
    """Run a Python file. Raises UserError for one that is missing or broken."""
    if not path.is_file():
        raise UserError(f"no file {path}", "give a Python file with plug-ins")
    spec = importlib.util.spec_from_file_location(f"stillknows_plugin_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no Python file", "give one that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there for the module that they are made in
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # which would end the command with a code that means a verdict
        del sys.modules[spec.name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        place = f"{path}, line {lines[-1]}" if lines else str(path)
        raise UserError(f"{place}: {_said(error)}", "mend the file, or leave it out") from error


def _said(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
