"""The compliance annex: what published opinions and codes name, beside what an audit ran. No legal finding.

annex.toml is the whole table; this module only looks up which of its rows an audit did.
"""

from __future__ import annotations

import contextlib
import functools
import tomllib
from collections.abc import Iterator
from importlib.resources import files
from typing import Any, Literal

from stillknows.errors import UserError
from stillknows.registry import plugins
from stillknows.reporting.parts import Part
from stillknows.reporting.schema import AuditReport, Measured
from stillknows.specs import chained, parse
from stillknows.types import FULL, SUITE

TABLE = "annex.toml"
NOTICE = "What was run, beside what opinions and codes name. This is no legal finding."
Status = Literal["done", "not run", "not applicable"]


class AnnexRow(Part):
    """One thing that an opinion or a code names."""

    source: str
    about: str
    status: Status
    by: tuple[str, ...]
    """What in the audit did it, as annex.toml names it."""
    reason: str
    """Why it does not apply; "" where it does."""


def annex(report: AuditReport) -> tuple[AnnexRow, ...]:
    """Return every row of annex.toml with whether the audit did it."""
    held = set(_held(report))
    return tuple(_row(row, held) for row in table())


@functools.cache
def table() -> tuple[dict[str, Any], ...]:
    """Return the rows of annex.toml."""
    return tuple(tomllib.loads(files("stillknows.reporting").joinpath(TABLE).read_text(encoding="utf-8"))["rows"])


def _row(row: dict[str, Any], held: set[str]) -> AnnexRow:
    reason = row.get("not_applicable", "")
    by = tuple(entry for entry in row.get("done_by", ()) if entry in held)
    status: Status = "not applicable" if reason else "done" if by else "not run"
    return AnnexRow(source=row["source"], about=row["about"], status=status, by=by, reason=reason)


def _held(report: AuditReport) -> Iterator[str]:
    """Yield what an audit holds, in the words of annex.toml."""
    known = plugins("transform")
    for name in (name for variant in report.variants for name in _names(variant)):
        if name in known and name != FULL:
            kind = "attack" if known[name].role == "attack" else "format"
            yield from (f"{kind}:{name}", f"{kind}:*")
    yield from (f"metric:{name}" for metric in report.metrics for name in _names(metric))
    cells = [cell for subject in report.audited for cell in subject.cells if isinstance(cell, Measured)]
    yield from (f"figure:{part}" for cell in cells if cell.split == SUITE for part in cell.metric.split("."))
    if any(subject.facts for subject in report.audited):
        yield "placebos"
    if report.has_control:
        yield "control"


def _names(spec: str) -> set[str]:
    """Return the names in a chain; none for what is no chain, as a report of others may hold."""
    with contextlib.suppress(UserError):
        return {parse(link).name for link in chained(spec)}
    return set()
