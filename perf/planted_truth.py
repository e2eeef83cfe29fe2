"""Planted truth: models that hide in known ways, and models that never knew, audited by a plan of variants.

    python -m perf.planted_truth [WORLD …] [--plan standard] [--folder runs/planted] [--docs docs]

Makes the models of each world that are not there yet, audits them by `quick` and what that does not expose by the plan,
and writes tables into docs/planted-truth.md, the misses included: which variants expose which model, and what `explain`
calls what it hides. What is finished is not
made again.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from perf import planted
from perf.marked import fill
from perf.planted_worlds import WORLDS, World, never_taught, teach
from stillknows import defaults
from stillknows.auditing.audit import AuditConfig, audit
from stillknows.experiments import sweep
from stillknows.formatting import markdown_table
from stillknows.progress import shown
from stillknows.reporting.build import build
from stillknows.reporting.residue import residues
from stillknows.reporting.schema import ReportSubject
from stillknows.store import write_json
from stillknows.types import FULL, UNDEFENDED, Benchmark

ROOT = Path(__file__).parents[1]
PAGE, PROGRAM = ROOT / "docs/planted-truth.md", "perf.planted_truth"
PLACEBOS = 24  # of each fact: with fewer than 19 none is named
KEPT = 40  # questions to retain that are asked
MOST = 4  # variants that a row names
QUICK = "quick"
NEVER = ("absent", "open")  # what is left in a model that never knew


class Result(NamedTuple):
    """What an audit says of one model.

    expected: the kinds of residue that are right. full: the verdict in full precision. exposing: the variants that find
    it to know. kinds: what `explain` names, the likeliest first.
    """

    world: str
    model: str
    expected: tuple[str, ...]
    full: str
    verdict: str
    exposing: tuple[str, ...]
    kinds: tuple[str, ...]

    @property
    def is_never_taught(self) -> bool:
        return self.expected == NEVER

    @property
    def is_exposed(self) -> bool:
        """Whether the audit finds it to know, hidden or not."""
        return self.verdict in ("HIDDEN", "STILL KNOWS")

    @property
    def right(self) -> bool:
        return self.kinds[:1] != () and self.kinds[0] in self.expected


def asked(benchmark: Benchmark) -> Benchmark:
    """Return what is asked: one wording of each fact, and enough of what is kept; placebos come from everything."""
    splits = [split for split in benchmark.splits if split.name in ("forget", "retain")]
    parts = tuple(sweep.sample(split, KEPT) if split.role == "retain" else split for split in splits)
    return replace(benchmark, splits=parts, training=benchmark.splits)


def models_of(world: World, folder: Path, original: Path) -> dict[str, tuple[Path, tuple[str, ...]]]:
    """Return the models of a world with the kinds of residue that are right; those that are there stay."""
    ways = {name: way for name, way in planted.WAYS.items() if way.fits(world.made.tokens)}
    made: dict[str, tuple[Path, tuple[str, ...]]] = {
        n: (planted.hide(n, original, world.benchmark, folder / n, world.seed), (ways[n].kind,)) for n in ways
    }
    return made | {name: (path, NEVER) for name, path in never_taught(world, folder).items()}


def results(world: World, folder: Path, plan: str) -> list[Result]:
    """Make and audit all models of a world: first by `quick`, then those that it does not expose by the plan.

    The plan holds all of `quick`, so that it exposes them too. Models and observations that are there are read.
    """
    original, control = teach(world, folder / "original", 0, forget=True), teach(world, folder / "control", 1)
    models = models_of(world, folder, original)
    config = AuditConfig(str(original), {}, asked(world.benchmark), (str(control),), QUICK, placebos=PLACEBOS)

    def audited(names: Iterable[str], variants: str) -> dict[str, Result]:
        subjects = {name: str(models[name][0]) for name in names}
        report = build(audit(replace(config, subjects=subjects, variants=variants), folder / "audit"), PROGRAM)
        write_json(folder / f"{variants}-report.json", report.to_json())
        found = residues(report)
        kinds = {name: [residue.kind for residue in found if residue.model == name] for name in subjects}
        return {s.name: result_of(world.name, s, models[s.name][1], kinds[s.name]) for s in report.audited}

    first = audited(models, QUICK)
    rest = [name for name, result in first.items() if not result.is_exposed]
    return list((first | (audited(rest, plan) if rest and plan != QUICK else {})).values())


def result_of(world: str, subject: ReportSubject, expected: Sequence[str], kinds: Sequence[str]) -> Result:
    """Return what a report says of one model."""
    return Result(
        world, subject.name, tuple(expected), subject.variants[FULL], subject.verdict, exposing(subject), tuple(kinds)
    )


def exposing(subject: ReportSubject) -> tuple[str, ...]:
    """Return the variants that find a model to know, full precision left out."""
    known = [v for v, name in subject.variants.items() if name == "STILL KNOWS" and v != FULL]
    return tuple(v for v in known if v != UNDEFENDED or subject.defence)


def table(found: Sequence[Result]) -> str:
    """Return models × worlds: the verdicts, in full precision and overall, what exposes a model, what it is called."""
    rows = []
    for r in sorted(
        found, key=lambda r: (r.is_never_taught, list(planted.WAYS).index(r.model) if r.model in planted.WAYS else 0)
    ):
        more = f", and {len(r.exposing) - MOST} more" if len(r.exposing) > MOST else ""
        rows.append(
            [r.model, r.world, r.full, r.verdict, (", ".join(r.exposing[:MOST]) + more) or "–", ", ".join(r.kinds)]
        )
    return markdown_table(["model", "world", "full precision", "verdict", "exposed by", "explain"], rows)


def confusion(found: Sequence[Result]) -> str:
    """Return what a model hides by × what `explain` names first, counted."""
    counts = Counter(("absent" if r.is_never_taught else r.expected[0], r.kinds[0]) for r in found)
    kinds = list(
        dict.fromkeys([*(way.kind for way in planted.WAYS.values()), "absent", *(named for _, named in counts)])
    )
    rows = [
        [true, *(str(counts[true, named] or "") for named in kinds)]
        for true in kinds
        if any(t == true for t, _ in counts)
    ]
    return markdown_table(["hides by", *kinds], rows)


def summary(found: Sequence[Result], held_out: Mapping[str, bool]) -> str:
    """Return how many hiding models are exposed, never-taught ones recovered, and kinds named rightly."""
    lines = []
    for words, chosen in (
        ("worlds on which rules were chosen", [r for r in found if not held_out[r.world]]),
        ("the world that was held out", [r for r in found if held_out[r.world]]),
    ):
        hiding, never = [r for r in chosen if not r.is_never_taught], [r for r in chosen if r.is_never_taught]
        if chosen:
            lines.append(
                f"- {words}: {sum(r.is_exposed for r in hiding)} of {len(hiding)} hiding models exposed, "
                f"{sum(r.is_exposed for r in never)} of {len(never)} never-taught ones recovered, "
                f"{sum(r.right for r in chosen)} of {len(chosen)} kinds named rightly"
            )
    return "\n".join(lines)


def text(found: Sequence[Result], held_out: Mapping[str, bool], plan: str) -> str:
    """Return what the page holds between its marks."""
    parts = [
        f"By `{QUICK}`, and by `{plan}` what that does not expose, {PLACEBOS} placebos for each fact:",
        summary(found, held_out),
        table(found),
    ]
    for words, is_held_out in (("Named by `explain`:", False), ("Named in the world that was held out:", True)):
        chosen = [r for r in found if held_out[r.world] is is_held_out]
        parts += [words, confusion(chosen)] if chosen else []
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("worlds", nargs="*", choices=[[], *WORLDS], default=list(WORLDS))
    parser.add_argument("--plan", choices=list(defaults.PLANS), default="standard")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/planted")
    parser.add_argument("--docs", type=Path, default=None)
    given = parser.parse_args()
    found, held_out = list[Result](), dict[str, bool]()
    with shown():
        for name in given.worlds:
            world = WORLDS[name]()
            held_out[name] = world.held_out
            found += results(world, given.folder / name, given.plan)
    page = text(found, held_out, given.plan)
    print(page)
    if given.docs:
        fill(given.docs / PAGE.name, PROGRAM, page)


if __name__ == "__main__":
    main()
