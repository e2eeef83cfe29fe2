"""Quantized weights as files of other projects hold them: one file format per module, packed and unpacked.

What is unpacked is, bit by bit, what was packed: a writer checks each matrix, and tests compare with the projects' own
readers. Importing the folder imports none of these projects.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import NamedTuple

from stillknows.errors import UserError
from stillknows.lazy import Tensor


class Kept(NamedTuple):
    """One matrix in a file: its codes, its storage type and what else is kept of it; see compress.Stored."""

    codes_OI: Tensor
    type: str
    parts: Mapping[str, Tensor]


def library(name: str) -> ModuleType:
    """Import a module of a package that only files need; UserError with what to type where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0].replace("_", "-")
        raise UserError(
            f"{package}, which reads and writes this kind of file, is not installed ({error})",
            "pip install 'stillknows[export]'",
        ) from error
