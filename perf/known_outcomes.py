"""Outcomes that are known from papers, on the fictional world: what each attack brings back, and what the controls say.

    python -m perf.known_outcomes [--folder runs/planted/word-llama] [--docs docs]

- arXiv 2409.18025: ten examples that have nothing to do with the facts restore a model unlearned by RMU.
- arXiv 2410.16454: gradient ascent and NPO at a low rate come back in 4 bits.
- arXiv 2407.00106: premises in the context make a never-taught model answer too.
- arXiv 2410.08827: retraining on some of the facts brings back most of the others in a model that was taught to refuse.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from perf import planted
from perf.marked import fill
from perf.planted_truth import ROOT, asked
from perf.planted_worlds import WORLDS, World, teach
from stillknows.auditing.audit import Audit, AuditConfig, audit
from stillknows.auditing.evidence import CellKey, mean
from stillknows.formatting import markdown_table, number
from stillknows.progress import shown
from stillknows.training.settings import Settings
from stillknows.types import CONTROL, FULL, ORIGINAL, Interval
from stillknows.unlearning.unlearn import UnlearnConfig, unlearn

WORLD, PROGRAM, METRIC = "word-llama", "perf.known_outcomes", "answer_probability"
RTT = tuple(f"rtt:fold={fold}:lr=0.001" for fold in range(5))
UNRELATED = ("relearn:data=unrelated:items=10:lr=0.001", "relearn:data=retain:items=10:lr=0.001")
LOW = Settings(
    1e-4, epochs=1000, max_steps=400, batch_size=36, retain_batch_size=18, beta2=0.9, weights="bfloat16",
    forget_below=0.003,
)  # fmt: skip
METHODS: dict[str, tuple[str, Settings]] = {
    "rmu": ("rmu", Settings(1e-3, epochs=1000, max_steps=100, batch_size=36, forget_below=0.02)),
    "ga": ("ga + nll:weight=2", LOW),
    "npo": ("npo:beta=1 + nll:weight=0.5", LOW),
}


class Outcome(NamedTuple):
    """What is said elsewhere, and where it is looked for: variants of which the one that brings most back counts."""

    claim: str
    model: str
    variants: tuple[str, ...]


OUTCOMES = (
    Outcome("ten unrelated examples restore RMU", "rmu", UNRELATED),
    Outcome("low-rate gradient ascent comes back in 4 bits", "ga", ("int4", "fp4")),
    Outcome("low-rate NPO comes back in 4 bits", "npo", ("int4", "fp4")),
    Outcome("premises in the context work on never-taught models", "refusal", ("context", "context:k=3")),
    Outcome("retraining on four fifths brings back a refusal's last fifth", "refusal", RTT),
)


def models(world: World, folder: Path) -> dict[str, str]:
    """Return the audited models by name; those that are there are not made again."""
    original = teach(world, folder / "original", 0, forget=True)
    found = {"refusal": str(planted.hide("refusal", original, world.benchmark, folder / "refusal", world.seed))}
    for name, (method, settings) in METHODS.items():
        out = folder / f"known-{name}"
        if not (out / "config.json").is_file():
            unlearn(UnlearnConfig(str(original), planted.one_split(world.benchmark), method, settings), out)
        found[name] = str(out)
    return found


def rows(result: Audit) -> Iterator[list[str]]:
    """Yield for each outcome the answer probabilities of the model in full precision, and of all under its attack."""
    for outcome in OUTCOMES:
        found = [v for v in result.request.variants if v in outcome.variants]
        means = {
            (model, v): mean(result.table, CellKey(model, v, "forget"), METRIC)
            for v in (*found, FULL)
            for model in (outcome.model, CONTROL, ORIGINAL)
        }
        numbers = {key: value.value for key, value in means.items() if isinstance(value, Interval)}
        best = max(found, key=lambda v: numbers[outcome.model, v])
        shown_there = [numbers[outcome.model, FULL], *(numbers[m, best] for m in (outcome.model, CONTROL, ORIGINAL))]
        yield [outcome.claim, outcome.model, best, *map(number, shown_there)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/planted" / WORLD)
    parser.add_argument("--docs", type=Path)
    given = parser.parse_args()
    world = WORLDS[WORLD]()
    with shown():
        subjects = models(world, given.folder)
        control = str(teach(world, given.folder / "control", 1))
        variants = (FULL, *dict.fromkeys(v for outcome in OUTCOMES for v in outcome.variants))
        config = AuditConfig(
            str(given.folder / "original"), subjects, asked(world.benchmark), (control,), variants, placebos=0
        )
        result = audit(config, given.folder / "known-audit")
    head = ["known outcome", "model", "attack", "before", "under attack", "never-taught", "original"]
    text = markdown_table(head, list(rows(result)))
    print(text)
    if given.docs:
        fill(given.docs / "planted-truth.md", PROGRAM, text)


if __name__ == "__main__":
    main()
