"""Requests to unlearn that follow one another: each starts where the one before ended, and its record says so.

A record holds the digest of the record before it, so that a chain of runs shows whether one was changed afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stillknows.checksums import file_digest
from stillknows.errors import UserError, blamed_on
from stillknows.model import run_record
from stillknows.store import RECORD, digest
from stillknows.training.loop import FitResult
from stillknows.types import Benchmark, Example

SUMMED = ("seconds", "tokens", "forward_tokens", "flops")  # of loop.FitResult


@dataclass(frozen=True)
class RequestHistory:
    """The requests before one: what it has to know of them, from the record of the latest.

    original: fingerprint of the model before the first. requests: what is kept of each, in order. total: their costs.
    """

    original: str
    requests: tuple[dict[str, Any], ...] = ()
    total: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SUMMED, 0))

    def require_compatible(self, benchmark: Benchmark) -> None:
        """Raise UserError when something that an earlier request removed would now be kept.

        Items are recognised by question and answer together, through hashes: records hold none of them in words.
        """
        gone = {item: number for number, request in enumerate(self.requests, 1) for item in request["forgotten"]}
        for split in (*benchmark.training, *benchmark.splits):
            if split.role in ("forget", "member"):
                continue
            back = [(e.id, gone[item_digest(e)]) for e in split.examples if item_digest(e) in gone]
            if back:
                raise UserError(
                    f"{len(back)} items of the {split.name} split were forgotten by an earlier request, the first: "
                    f"{back[0][0]!r} by request {back[0][1]}",
                    "training on them would teach them again; remove them",
                )

    def record(self, benchmark: Benchmark, outcome: FitResult) -> dict[str, Any]:
        """Return the part of a run's record that makes it a link of the chain."""
        spent = outcome.to_json()
        return {
            "number": len(self.requests) + 1,
            "original": self.original,
            "earlier": list(self.requests),
            "forgotten": sorted({item_digest(e) for s in _to_forget(benchmark) for e in s.examples}),
            "total": {name: self.total[name] + spent[name] for name in SUMMED},
        }


def follow(folder: Path, original: str, name: str) -> RequestHistory:
    """Return the requests that led to a run's checkpoint.

    Args:
        original: fingerprint of the model that the new request names as its base, called `name`.

    Raises UserError for a folder without a record of this kind and for a run that began with another model.
    """
    record = run_record.read(folder)
    if record is None or "request" not in record:
        raise UserError(
            f"{folder} holds no unlearning run that another could follow: its {RECORD} is missing or no record of one",
            "run `stillknows unlearn` first",
        )
    with blamed_on(f"{folder / RECORD} is not as `stillknows unlearn` wrote it", "repeat that run"):
        request = record["request"]
        if request["original"] != original:
            raise UserError(
                f"{folder} was unlearned from another model than {name}",
                f"name the model that the first request began with: {record['model']}",
            )
        latest = {
            "benchmark": record["benchmark"],
            "method": record["method"],
            "forgotten": request["forgotten"],
            "record": file_digest(folder / RECORD),
        }
        earlier = (*request["earlier"], latest)
        for one in earlier:
            frozenset(one["forgotten"])  # digests, by which items are looked up
        return RequestHistory(original, earlier, {name: float(request["total"][name]) for name in SUMMED})


def _to_forget(benchmark: Benchmark):
    return (split for split in (*benchmark.training, *benchmark.splits) if split.role == "forget")


def item_digest(example: Example) -> str:
    """Return what a question and its answer are recognised by where they must not be written down.

    Whoever can guess both can check the guess.
    """
    return digest(example.prompt, example.answer)
