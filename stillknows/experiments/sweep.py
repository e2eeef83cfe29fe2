"""A study: an original is unlearned in many ways, everything is audited in the same formats, the numbers become rows.

What is finished is not made again, so a study can be interrupted, and grows run by run.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from stillknows.auditing import audit
from stillknows.formatting import number
from stillknows.model import modelfiles
from stillknows.progress import log
from stillknows.reporting import report
from stillknows.reporting.build import build
from stillknows.store import build_once
from stillknows.training.settings import Settings
from stillknows.types import Benchmark, Split
from stillknows.unlearning import unlearn

KEPT_SAMPLE = 96  # retained questions that are measured
DIGITS = 4  # significant, of every number that is kept
Json = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One unlearning run; `name` is that of its folder and its label in audits. Runs differ by what they say."""

    name: str
    method: str
    settings: Settings


def sample(split: Split, count: int = KEPT_SAMPLE) -> Split:
    """Return a split with at most `count` of its examples, at even distances: enough to measure what is kept."""
    step = max(1, len(split.examples) // count)
    return replace(split, examples=split.examples[::step][:count])


def unlearn_once(run: Run, original: Path, benchmark: Benchmark, folder: Path, *, device: str = "cpu") -> Path:
    """Return the folder of the unlearned model, which is made unless it is there from the same run."""
    request = unlearn.UnlearnConfig(str(original), benchmark, run.method, run.settings, device=device)
    plan = [modelfiles.fingerprint(original), asdict(benchmark), run.method, chosen(run.settings)]
    with build_once(folder, plan) as unmade:
        if unmade:
            log(f"{run.name}: {run.method}")
            unlearn.unlearn(request, unmade, overwrite=True)
    return folder


def chosen(settings: Settings) -> Json:
    """Return the settings that differ from their defaults: a new setting makes no finished run another one."""
    defaults = {f.name: f.default for f in fields(settings) if f.default is not MISSING}
    return {name: value for name, value in asdict(settings).items() if name not in defaults or defaults[name] != value}


def audited(request: audit.AuditConfig, subjects: Mapping[str, Path], out: Path, command: str) -> Json:
    """Audit these models into `out` and return the report, which lies there too; what was seen before is read again."""
    request = replace(request, subjects={name: str(folder) for name, folder in subjects.items()})
    return report.write(build(audit.audit(request, out), command), out).to_json()


def rows(result: Json, wanted: Collection[tuple[str, str]], extra: Json) -> list[Json]:
    """Return one row for each model of a report: its name, its run, and the wanted numbers in every format.

    Args:
        wanted: (split, metric) pairs; a row holds [value, lower bound, upper bound] of each under "split metric" by
            format, or the reason why there is none.
        extra: entries that all rows get, such as the seed.
    """
    return [
        extra | {"model": subject["name"], "run": _run(subject["run"]), "cells": _cells(subject["cells"], wanted)}
        for subject in result["subjects"]
    ]


def _run(record: Json | None) -> Json | None:
    """Return what a table needs of an unlearning run's record; None for a model that was not unlearned here."""
    if record is None or "method" not in record:
        return None
    fit = record["fit"]
    return {
        "method": record["method"],
        "settings": chosen(Settings(**record["settings"])),
        "steps": fit["steps"],
        "stopped": fit["stopped"],
        "seconds": rounded(fit["seconds"]),
    }


def _cells(cells: Sequence[Json], wanted: Collection[tuple[str, str]]) -> Json:
    found: Json = {}
    for cell in cells:
        if (cell["split"], cell["metric"]) in wanted:
            numbers = [rounded(cell[name]) for name in ("value", "low", "high")] if "value" in cell else None
            place = found.setdefault(f"{cell['split']} {cell['metric']}", {})
            place[cell["variant"]] = numbers or cell["not_measured"]
    return found


def rounded(value: float | None) -> float | None:
    """Return a number with DIGITS significant digits, None for None."""
    return None if value is None else float(f"{value:.{DIGITS}g}")


def value(row: Json, place: str, variant: str) -> float | None:
    """Return a row's number at "split metric" in a format; None where it was not measured."""
    found = row["cells"].get(place, {}).get(variant)
    return found[0] if isinstance(found, list) else None


def spread(values: Collection[float | None], digits: int = 2) -> str:
    """Return the mean of what was measured with the lowest and the highest, "–" for nothing."""
    found = [v for v in values if v is not None]
    if not found:
        return "–"
    mean, low, high = (number(v, digits=digits) for v in (statistics.mean(found), min(found), max(found)))
    return mean if low == high else f"{mean} ({low} to {high})"
