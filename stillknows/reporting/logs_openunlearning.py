"""Logs of OpenUnlearning (arXiv 2506.12618), read into tables by metric and into observations.

A log is one table per metric, {"agg_value": …, "value_by_index": {"0": {…}}}; an attack has two, "forget" and
"holdout". Any item and any value may be null. Keys of the log's own are left aside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stillknows.errors import NotMeasured, UserError
from stillknows.reporting.log_values import is_number, kind, read_number, read_recorded, read_text
from stillknows.store import read_json
from stillknows.types import Floats, Observations

SPLITS = {"forget": "forget", "retain": "retain", "ra": "real_authors", "wf": "world_facts"}
SIDES = ("forget", "holdout")  # of an attack
SCORED = ("avg_loss", "prob", "score", "generation", "ground_truth")  # what items hold that is made into numbers
EVAL, SUMMARY = "_EVAL.json", "_SUMMARY.json"


@dataclass(frozen=True)
class LogTable:
    """One metric of a log: what it holds of each item (None where that is null), and the log's own number or None."""

    items: Mapping[str, Mapping[str, Any] | None]
    aggregate: float | None

    @property
    def null(self) -> list[str]:
        """The items that hold null in the place of something that is scored."""
        return [i for i, item in self.items.items() if item is None or _has_null(item)]

    def holds(self, key: str) -> bool:
        return any(item is not None and key in item for item in self.items.values())


@dataclass(frozen=True)
class Log:
    """The tables of a log by metric; those of an attack are called "mia_….forget" and "mia_….holdout"."""

    file: Path
    tables: Mapping[str, LogTable]

    @property
    def metrics(self) -> list[str]:
        """The names of all tables but the two sides of attacks."""
        return [name for name in self.tables if name.rpartition(".")[0] not in self.tables]

    def column(self, name: str, key: str, read: Callable[[str, Any], Any] = read_number) -> dict[str, tuple | None]:
        """Return what a table's items hold under a key: a tuple of one or several values, None where that is null."""
        return {i: self._cell(name, i, item, key, read) for i, item in self.tables[name].items.items()}

    def _cell(self, name: str, i: str, item: Mapping[str, Any] | None, key: str, read: Callable) -> tuple | None:
        where = f"{self.file}, {name!r}: item {i}"
        if item is None:
            return None
        if key not in item:
            raise UserError(f"{where} has no {key!r}")
        values = item[key] if isinstance(item[key], list) else [item[key]]
        if not values:
            raise UserError(f"{where}, {key!r} is an empty list")
        return None if None in values else tuple(read(f"{where}, {key!r}", value) for value in values)


def _has_null(item: Mapping[str, Any]) -> bool:
    values = [item[key] for key in SCORED if key in item]
    return any(value is None or (isinstance(value, list) and None in value) for value in values)


def read(path: Path) -> Log:
    """Read TOFU_EVAL.json or MUSE_EVAL.json, or the folder that holds one.

    TOFU_SUMMARY.json and MUSE_SUMMARY.json hold no items: the log beside them is read, with the summary's numbers in
    the place of its own. Raises UserError that names file, metric and item; keys of the log's own are left aside.
    """
    file = _file(path)
    log = read_json(file)
    if not isinstance(log, dict) or not log:
        raise UserError(f"{file} is no log of OpenUnlearning: {kind(log)}", "expected a table of metrics")
    if not any(isinstance(value, dict) for value in log.values()):
        return _beside(file, log)
    tables = dict(_tables(file, log))
    if not tables:
        raise UserError(f"{file} is no log of OpenUnlearning", "expected metrics with agg_value and value_by_index")
    return Log(file, tables)


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = sorted(path.glob(f"*{EVAL}"))
    if len(found) != 1:
        several = ", ".join(file.name for file in found) or "none"
        raise UserError(f"{path} holds {several} of TOFU_EVAL.json and MUSE_EVAL.json", "name the file")
    return found[0]


def _beside(summary: Path, numbers: Mapping[str, Any]) -> Log:
    """Return the log that a summary was made of, with the summary's numbers."""
    whole = summary.with_name(summary.name.replace(SUMMARY, EVAL))
    if whole == summary or not whole.is_file():
        wanted = whole.name if whole != summary else "TOFU_EVAL.json or MUSE_EVAL.json"
        raise UserError(f"{summary} holds numbers without items: nothing can be computed from it", f"give {wanted}")
    log = read(whole)
    told = {name: _aggregate(summary, name, value) for name, value in numbers.items()}
    kept = {name: LogTable(table.items, told[name]) for name, table in log.tables.items() if name in told}
    return Log(whole, {**log.tables, **kept})


def _tables(file: Path, log: Mapping[str, Any]) -> Iterator[tuple[str, LogTable]]:
    for name, value in log.items():
        if not isinstance(value, dict):
            continue
        sides = SIDES if all(isinstance(value.get(side), dict) for side in SIDES) else ()
        for side in sides:
            yield f"{name}.{side}", LogTable(_items(file, f"{name}.{side}", value[side]), None)
        if sides or "agg_value" in value or "value_by_index" in value:
            aggregate = value.get("agg_value", value.get("auc"))
            yield name, LogTable(_items(file, name, value), _aggregate(file, name, aggregate))


def _items(file: Path, name: str, table: Mapping[str, Any]) -> Mapping[str, Any]:
    items = table.get("value_by_index", {})
    if not isinstance(items, dict):
        raise UserError(f"{file}, {name!r}: 'value_by_index' is {kind(items)}, not a table of items")
    for i, item in items.items():
        if item is not None and not isinstance(item, dict):
            raise UserError(f"{file}, {name!r}: item {i} is {kind(item)}, not a table of values")
    return items


def _aggregate(file: Path, name: str, value: Any) -> float | None:
    return read_recorded(f"{file}, {name!r}: 'agg_value'", value) if is_number(value) else None


def splits(log: Log) -> dict[str, Observations]:
    """Return TOFU's splits, as far as the log holds them."""
    return {name: _observations(log, prefix) for prefix, name in SPLITS.items() if f"{prefix}_Q_A_Prob" in log.tables}


def _observations(log: Log, prefix: str) -> Observations:
    """Return a split of TOFU as observations: one made-up token per answer, whose loss is the recorded mean."""
    kinds = {key: f"{prefix}_Q_A_{key}" for key in ("Prob", "PARA_Prob", "PERT_Prob", "ROUGE")}
    found = {key: name for key, name in kinds.items() if name in log.tables and log.tables[name].items}
    ids = tuple(dict.fromkeys(i for name in found.values() for i in log.tables[name].items))

    def losses(key: str) -> list[Floats] | None:
        if key not in found or not log.tables[found[key]].holds("avg_loss"):
            return None
        column = log.column(found[key], "avg_loss")
        return [-np.array(column.get(i) or (np.nan,), dtype=np.float64) for i in ids]

    true, paraphrase, wrong = (losses(key) for key in ("Prob", "PARA_Prob", "PERT_Prob"))
    if prefix in ("ra", "wf"):
        paraphrase = [np.array([]) for _ in ids]  # the true answer itself stands in its place
    texts = log.column(found["ROUGE"], "generation", read_text) if "ROUGE" in found else None
    truths = log.column(found["ROUGE"], "ground_truth", read_text) if "ROUGE" in found else {}
    return Observations(
        ids=ids,
        facts=ids,
        prompts=("",) * len(ids),
        answers=tuple((truths.get(i) or ("",))[0] for i in ids),
        log_probs=_averaged(true),
        paraphrase_log_probs=_averaged(paraphrase),
        wrong_log_probs=None if wrong is None else tuple(tuple(np.array([x]) for x in row) for row in wrong),
        generations=None if texts is None else tuple((texts.get(i) or (None,))[0] for i in ids),
    )


def _averaged(rows: list[Floats] | None) -> tuple[Floats, ...] | None:
    """Return one token per item, also where a question has several answers; none where there is none."""
    return None if rows is None else tuple(np.array([float(row.mean())]) if row.size else row for row in rows)


def attack(log: Log, name: str) -> dict[str, Observations]:
    """Return what an attack gives "forget" and "holdout" items: one made-up token whose loss is the recorded score."""
    found = {}
    for side in SIDES:
        column = {i: row for i, row in log.column(f"{name}.{side}", "score").items() if row is not None}
        if not column:
            raise NotMeasured(f"the log holds no score of {side} items")
        blank = ("",) * len(column)
        losses = tuple(np.array([-sum(row) / len(row)]) for row in column.values())
        found[side] = Observations((*column,), (*column,), blank, blank, log_probs=losses)
    return found
