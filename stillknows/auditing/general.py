"""General utility of the models of an audit under each format: measured by tasks of lm-evaluation-harness, or read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from stillknows.auditing import harness
from stillknows.auditing.loader import OBSERVATIONS_VERSION, Loader, observations_file
from stillknows.auditing.plan import AuditConfig
from stillknows.auditing.prepared import Prepared
from stillknows.ledger import Ledger
from stillknows.model.encoding import CHAT
from stillknows.progress import progress
from stillknows.store import digest, write_sealed
from stillknows.types import Cell, Interval
from stillknows.variants.variant import Variant

TASKS = "tasks"  # in the place of a split's name: the file of general utility


def general(
    load: Loader,
    model: Prepared,
    variants: Mapping[str, Variant],
    suite: harness.Suite,
    request: AuditConfig,
    ledger: Ledger,
) -> Iterator[Cell]:
    """Yield general utility under each format, with the task in the place of a split."""
    chat = request.benchmark.template == CHAT
    asked = suite.identity, request.task_limit, harness.BATCH_SIZE, harness.SEED, chat
    with progress(f"general tasks on {model.label}", len(variants)) as advance:
        for variant, form in variants.items():
            path = observations_file(ledger.folder, model, variant, TASKS).with_suffix(".json")
            cache = digest(OBSERVATIONS_VERSION, model.fingerprint, form.identity, asked, *model.beside)
            results = _read_results(ledger.recall(path, cache))
            if results is None:
                subject = load(model)
                with form.applied(subject.model):
                    results = harness.measure(
                        subject.model, subject.tokenizer, suite, limit=request.task_limit, chat=chat
                    )
                write_sealed(path, {"key": cache, "results": [_saved(*result) for result in results.items()]})
                ledger.add(path)
            for (task, metric), result in results.items():
                yield Cell(model.label, variant, task, metric, result)
            advance(1, variant)


def _saved(place: tuple[str, str], result: Interval | str) -> dict[str, Any]:
    """Return one result of a task as JSON-able data, with null for a bound that is infinite."""
    found = dict(zip(("task", "metric"), place, strict=True))
    if isinstance(result, str):
        return found | {"not_measured": result}
    return found | {name: value if math.isfinite(value) else None for name, value in result._asdict().items()}


def _read_results(saved: dict[str, Any] | None) -> harness.Results | None:
    """Return the results of tasks that were saved; None when there are none."""
    return None if saved is None else {(row["task"], row["metric"]): _result(row) for row in saved["results"]}


def _result(row: Mapping[str, Any]) -> Interval | str:
    if "not_measured" in row:
        return row["not_measured"]
    low, high = (
        infinity if row[bound] is None else row[bound] for bound, infinity in (("low", -math.inf), ("high", math.inf))
    )
    return Interval(row["value"], low, high, row["n"])
