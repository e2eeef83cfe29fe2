"""An audit again: its report from the observations that it saved, and some of these from the models."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stillknows.auditing.audit import audit
from stillknows.auditing.collect import Keys, missing, observe_missing
from stillknows.auditing.evidence import CellKey
from stillknows.auditing.forecast import Forecast
from stillknows.auditing.loader import Loader, observations_file
from stillknows.auditing.plan import AuditConfig, Plan, plan
from stillknows.auditing.request import asked_again
from stillknows.errors import Misfit, UserError
from stillknows.ledger import LEDGER, Ledger
from stillknows.observations import OBSERVATIONS, load_observations
from stillknows.reporting import report as reports
from stillknows.reporting.build import build
from stillknows.reporting.report import JSON
from stillknows.reporting.schema import AuditReport
from stillknows.types import Observations

MOST_NATS = 0.01  # by which the log-probability of a token may differ, as between machines
MOST_TEXTS = 0.02  # share of generated texts that may differ: a tie of two tokens turns out one way or the other


@dataclass(frozen=True)
class ReplayedCell:
    """One cell that was observed again.

    nats: largest difference of a token's log-probability.
    texts: generated texts that differ, of `of`.
    """

    model: str
    variant: str
    split: str
    nats: float
    texts: int
    of: int

    def __str__(self) -> str:
        return (
            f"{self.model}, {self.variant}, {self.split}: {self.nats:.2g} nats, {self.texts} of {self.of} texts differ"
        )


def replay(folder: Path, label: str, model: str, count: int, seed: int) -> list[ReplayedCell]:
    """Make the report of an audit again from its observations, and `count` of these from the models.

    Args:
        label: the audited model's name in the report, which is now read from `model`. The others are read from where
            the audit found them, and so are the data.
        seed: of the sample.

    Raises UserError where models or data are not there, Misfit where the saved observations are not of these models,
    where the report says otherwise than they do, and where observing again gives something else.
    """
    ledger, report = Ledger.read(folder), reports.read(folder)
    request = asked_again(ledger.request, subjects={**ledger.request["subjects"], label: model})
    with tempfile.TemporaryDirectory(prefix="stillknows-") as made:
        copy = Path(made) / "audit"
        shutil.copytree(folder / OBSERVATIONS, copy / OBSERVATIONS)
        shutil.copy(folder / LEDGER, copy / LEDGER)
        planned = plan(request, copy)
        _require_own(planned, copy)
        _require_reported(request, copy, report)
        return list(_observed_again(planned, copy, Path(made) / "again", count, seed))


def _require_own(planned: Plan, folder: Path) -> None:
    """Raise Misfit unless every cell was observed of these models, data and settings, and is there."""
    keys, ledger = Keys(), Ledger.read(folder)
    for model in planned.prepared:
        for variant, splits in missing(model, planned.variants, keys, ledger).items():
            for split in splits:
                file = observations_file(folder, model, variant, split).relative_to(folder)
                raise Misfit(f"{file} was not observed of these models and data by this version")


def _require_reported(request: AuditConfig, folder: Path, report: AuditReport) -> None:
    """Raise Misfit unless the observations give the report."""
    again = build(audit(request, folder), report.repeat.command)
    where = next(_differences(_lasting(report), _lasting(again)), None)
    if where is not None:
        raise Misfit(f"{JSON} says otherwise than the observations: {where}")


def _lasting(report: AuditReport) -> dict[str, Any]:
    """Return what of a report follows from observations and settings, wherever the models lie now."""
    content = {name: part for name, part in report.to_json().items() if name not in ("digest", "repeat")}
    content["subjects"] = [
        {name: part for name, part in subject.items() if name not in ("path", "run")} for subject in content["subjects"]
    ]
    return content


def _differences(one: Any, other: Any, place: str = "") -> Iterator[str]:
    """Yield the places where two JSON values differ."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        for name in one:
            yield from _differences(one[name], other[name], f"{place}.{name}" if place else name)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for i, pair in enumerate(zip(one, other, strict=True)):
            yield from _differences(*pair, f"{place}.{i}")
    elif one != other:
        yield place


def _observed_again(planned: Plan, folder: Path, work: Path, count: int, seed: int) -> Iterator[ReplayedCell]:
    """Observe a sample of the cells again and yield how they compare with those saved in `folder`."""
    keys, ledger = Keys(), Ledger(work)
    todo = {model.label: missing(model, planned.variants, keys, ledger) for model in planned.prepared}
    places = [
        CellKey(m, variant, split)
        for m, variants in todo.items()
        for variant in variants
        for split in variants[variant]
    ]
    drawn = random.Random(seed).sample(places, min(count, len(places)))
    load = Loader(planned.reader, [variant.chain for variant in planned.variants.values()])
    for model in planned.prepared:
        mine = [place for place in drawn if place.model == model.label]
        wanted = {place.variant: [p.split for p in mine if p.variant == place.variant] for place in mine}
        observe_missing(load, model, planned.variants, keys, ledger, wanted, Forecast([]))
        for place in mine:
            files = [observations_file(at, model, place.variant, place.split) for at in (folder, work)]
            yield _compared(place, files)


def _compared(place: CellKey, files: Sequence[Path]) -> ReplayedCell:
    saved, again = (load_observations(file) for file in files)
    if saved is None or again is None:
        raise UserError(f"{files[0]} vanished while it was read", "run it again")
    texts = [pair for pair in zip(_texts(saved), _texts(again), strict=False) if pair[0] != pair[1]]
    cell = ReplayedCell(*place, nats=_nats(saved, again), texts=len(texts), of=len(_texts(saved)))
    if cell.nats > MOST_NATS or cell.texts > MOST_TEXTS * cell.of:
        raise Misfit(f"observed again, {cell}: more than machines differ by")
    return cell


def _nats(one: Observations, other: Observations) -> float:
    """Return the largest difference of a log-probability; infinite where other tokens were scored."""
    rows = [_rows(seen) for seen in (one, other)]
    if [len(row) for row in rows[0]] != [len(row) for row in rows[1]] or one.ids != other.ids:
        return float("inf")
    return float(np.max(np.abs(np.nan_to_num(np.concatenate(rows[0])) - np.nan_to_num(np.concatenate(rows[1])))))


def _rows(seen: Observations) -> list[Any]:
    placebos = [row for answers in seen.placebo_log_probs or () for row in answers]
    return [*(seen.log_probs or ()), *placebos]


def _texts(seen: Observations) -> list[Any]:
    return [*(seen.generations or ()), *(text for texts in seen.samples or () for text in texts or ())]
