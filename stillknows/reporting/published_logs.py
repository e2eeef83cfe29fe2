"""Logs that other projects publish, read into observations, so that the same metrics and figures score them.

Layouts may vary in what the published code has varied. What is needed is checked, with file and item; what is not a
number or text that is scored is left aside. A log's own
scores are read as well, but only to be compared with what is computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stillknows.errors import UserError
from stillknows.reporting.log_values import (
    each,
    kind,
    read_columns,
    read_count,
    read_number,
    read_recorded,
    read_rows,
    read_summary,
    read_text,
    read_values,
)
from stillknows.store import read_json
from stillknows.types import Floats, Observations

ROUGE = ("rougeL", "rougeL_recall", "rouge1", "rouge1_recall")
TOFU_SPLITS = {
    "eval_log_forget.json": "forget",
    "eval_log.json": "retain",
    "eval_real_author_wo_options.json": "real_authors",
    "eval_real_world_wo_options.json": "world_facts",
}
TOFU_AGGREGATED = "eval_log_aggregated.json"
GT, PARAPHRASE = ("avg_gt_loss", "num_token_gt"), ("avg_paraphrased_loss", "num_token_paraphrased")
SUMMED = {"gt_loss": GT[1], "paraphrased_loss": PARAPHRASE[1]}  # sums, beside the number of tokens that they are over
TOFU_RECORDED = ("rougeL_recall", "rouge1_recall", "truth_ratio", "normalized_gt_loss", "gt_loss", "paraphrased_loss")
MUSE_SPLITS = {"forget": ("forget",), "retain": ("retain", "retain2"), "holdout": ("holdout",)}


@dataclass(frozen=True)
class Generations:
    """A log of MUSE's VerbMem or KnowMem: answers and generations. `recorded` are its own scores, [N] each by name,
    `aggregate` its own summary where it has one."""

    seen: Observations
    recorded: Mapping[str, Floats]
    aggregate: Mapping[str, float]


@dataclass(frozen=True)
class Attacks:
    """A log of MUSE's PrivLeak: values[split][attack] is [N], lower for likelier members. `auc` is what it records."""

    values: Mapping[str, Mapping[str, Floats]]
    auc: Mapping[str, float]

    def observations(self, attack: str) -> dict[str, Observations]:
        """Return one made-up token per text whose negative log-probability is the attack's value.

        Its Min-K % score for every k, and its mean log-probability, is then minus the recorded value.
        """
        return {name: _texts(columns[attack]) for name, columns in self.values.items()}


@dataclass(frozen=True)
class TofuLog:
    """TOFU's evaluation logs by split. `recorded[split]` are their own scores, [N] each by name."""

    splits: Mapping[str, Observations]
    recorded: Mapping[str, Mapping[str, Floats]]


def read_muse(path: Path) -> Generations | Attacks:
    """Read a log of MUSE (arXiv 2407.06460): VerbMem or KnowMem, or PrivLeak.

    VerbMem and KnowMem: a list of {gt, response, …} (log.json, or history.json of the first release), or {items,
    aggregate}. PrivLeak: {forget, retain, holdout}, each a list of {"PPL": …, "Min-40%": …} or of such below "ppl",
    alone or as {scores, auc}; or a folder with forget.json, retain.json or retain2.json, and holdout.json.
    """
    if path.is_dir():
        found = {key: path / f"{key}.json" for keys in MUSE_SPLITS.values() for key in keys}
        return _read_attacks(path, {key: read_json(file) for key, file in found.items() if file.is_file()}, {})
    log = read_json(path)
    if isinstance(log, list):
        return _read_generations(path, log, {})
    if isinstance(log, dict) and "items" in log:
        return _read_generations(path, log["items"], log.get("aggregate", {}))
    if isinstance(log, dict) and "scores" in log:
        return _read_attacks(path, log["scores"], log.get("auc", {}))
    if isinstance(log, dict) and log.keys() & {key for keys in MUSE_SPLITS.values() for key in keys}:
        return _read_attacks(path, log, {})
    raise UserError(
        f"{path} is no log of MUSE that can be read",
        "expected a list of {gt, response}, or {forget, retain, holdout} with lists of attack values",
    )


def read_tofu(path: Path) -> TofuLog:
    """Read TOFU's evaluation logs (arXiv 2401.06121): the aggregated file, one task's file, or their folder.

    A log records losses, not tokens: each answer becomes as many tokens as it had (one where that is not recorded),
    all with its mean log-probability.
    """
    tables = _tofu_tables(path)
    splits, recorded = {}, {}
    for name, table in tables.items():
        where = f"{path}, {name}"
        splits[TOFU_SPLITS[name]] = seen = _tofu_split(where, table)
        recorded[TOFU_SPLITS[name]] = {
            key: np.array(_column(where, table, key, seen.ids, read_recorded))
            for key in TOFU_RECORDED
            if key in table and SUMMED.get(key, key) in table
        }
    return TofuLog(splits, recorded)


def _tofu_tables(path: Path) -> dict[str, Any]:
    """Return the tasks' tables by file name, in the order of TOFU_SPLITS."""
    if path.is_dir() and not (path / TOFU_AGGREGATED).is_file():
        tables = {name: read_json(path / name) for name in TOFU_SPLITS if (path / name).is_file()}
    else:
        log = read_json(path / TOFU_AGGREGATED if path.is_dir() else path)
        alone = isinstance(log, dict) and "avg_gt_loss" in log
        tables = {path.name: log} if alone else log
    if isinstance(tables, dict) and (found := {name: tables[name] for name in TOFU_SPLITS if name in tables}):
        return found
    raise UserError(f"{path} holds none of TOFU's evaluation logs", f"expected {', '.join(TOFU_SPLITS)}")


def _tofu_split(where: str, table: Any) -> Observations:
    if not isinstance(table, dict):
        raise UserError(f"{where}: expected a table of columns, got {kind(table)}")
    ids = tuple(_indexed(where, table, "avg_gt_loss"))
    if not ids:
        raise UserError(f"{where}: 'avg_gt_loss' is empty")
    true, paraphrase = (_tokens(where, table, *keys, ids) for keys in (GT, PARAPHRASE))
    losses = _column(where, table, "average_perturb_loss", ids, each(read_number))
    counts = _counts(where, table, "num_token_perturb", ids, [[1] * len(row) for row in losses], each(read_count))
    for i, row, lengths in zip(ids, losses, counts, strict=True):
        if len(row) != len(lengths) or not row:
            raise UserError(f"{where}: item {i} has {len(row)} perturbed losses and {len(lengths)} lengths")
    texts = _column(where, table, "generated_text", ids, _triple)
    prompts, generations, answers = zip(*texts, strict=True)
    return Observations(
        ids=ids,
        facts=ids,
        prompts=prompts,
        answers=answers,
        generations=generations,
        log_probs=true,
        paraphrase_log_probs=paraphrase,
        wrong_log_probs=tuple(
            tuple(np.full(n, -loss) for n, loss in zip(lengths, row, strict=True))
            for row, lengths in zip(losses, counts, strict=True)
        ),
    )


def _tokens(where: str, table: Any, loss: str, length: str, ids: Sequence[str]) -> tuple[Floats, ...]:
    losses = _column(where, table, loss, ids, read_number)
    counts = _counts(where, table, length, ids, [1] * len(ids), read_count)
    return tuple(np.full(n, -mean) for n, mean in zip(counts, losses, strict=True))


def _counts(where: str, table: Any, key: str, ids: Sequence[str], default: list, read: Callable) -> list:
    return _column(where, table, key, ids, read) if key in table else default


def _column(where: str, table: Any, key: str, ids: Sequence[str], read: Callable[[str, Any], Any]) -> list:
    """Return a column's values in the order of `ids`; UserError when it is missing or has other items."""
    column = _indexed(where, table, key)
    if column.keys() != set(ids):
        odd = sorted(column.keys() ^ set(ids))
        raise UserError(f"{where}: {key!r} and 'avg_gt_loss' are not of the same items, such as item {odd[0]}")
    return [read(f"{where}: item {i}, {key!r}", column[i]) for i in ids]


def _indexed(where: str, table: Any, key: str) -> dict[str, Any]:
    """Return a column by item; older logs have lists in the place of tables."""
    if key not in table:
        raise UserError(f"{where}: there is no {key!r}")
    column = table[key]
    if isinstance(column, list):
        return {str(i): value for i, value in enumerate(column)}
    if not isinstance(column, dict):
        raise UserError(f"{where}: {key!r} is {kind(column)}, not a table of items")
    return column


def _read_generations(path: Path, items: Any, aggregate: Any) -> Generations:
    rows = read_rows(str(path), items)
    answers, generations = (tuple(read_values(str(path), rows, key, read_text)) for key in ("gt", "response"))
    recorded = {key: np.array(read_values(str(path), rows, key, read_recorded)) for key in ROUGE if key in rows[0]}
    ids = tuple(str(i) for i in range(len(rows)))
    prompts = tuple(str(row.get("question", row.get("prompt", ""))) for row in rows)
    seen = Observations(ids, ids, prompts, answers, generations=generations)
    return Generations(seen, recorded, read_summary(f"{path}, 'aggregate'", aggregate))


def _read_attacks(path: Path, scores: Any, auc: Any) -> Attacks:
    if not isinstance(scores, dict):
        raise UserError(f"{path}: expected a table of splits, got {kind(scores)}")
    values = {}
    for split, keys in MUSE_SPLITS.items():
        key = next((key for key in keys if key in scores), None)
        if key is None:
            raise UserError(f"{path}: there is no {split!r}", "a PrivLeak log holds forget, retain and holdout")
        where = f"{path}, {key!r}"
        rows = read_rows(where, scores[key])
        if "ppl" in rows[0]:
            rows = read_rows(where, read_values(where, rows, "ppl", lambda _, row: row))
        values[split] = {attack: np.array(column) for attack, column in read_columns(where, rows).items()}
    names = {split: sorted(columns) for split, columns in values.items()}
    if len({tuple(attacks) for attacks in names.values()}) > 1:
        raise UserError(f"{path}: the splits do not have the same attacks: {names}")
    return Attacks(values, read_summary(f"{path}, 'auc'", auc))


def _triple(where: str, value: Any) -> list[str]:
    """Return prompt, generation and answer; what some forks of TOFU's code write behind them is left aside."""
    if isinstance(value, list) and len(value) < 3:
        raise UserError(f"{where} has {len(value)} texts, expected prompt, generation and answer")
    return each(read_text)(where, value[:3] if isinstance(value, list) else value)


def _texts(values: Floats) -> Observations:
    ids = tuple(str(i) for i in range(len(values)))
    blank = ("",) * len(ids)
    return Observations(ids, ids, blank, blank, log_probs=tuple(np.array([-value]) for value in values))
