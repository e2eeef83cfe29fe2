"""Is the demo's outcome stable? Runs `stillknows demo` for several seeds and writes docs/demo-seeds.md.

    python examples/demo_seeds.py [--seeds 0 1 2 3 4] [--out runs/seeds]

About five minutes a seed on 2 cores; a second run reuses what the first one finished.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from stillknows.experiments import demo
from stillknows.progress import log, shown
from stillknows.reporting.schema import AuditReport, Measured, ReportSubject
from stillknows.store import write_text

SHOWN = ("original", "control", *demo.FIXED)


@shown()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--table", type=Path, default=Path("docs/demo-seeds.md"))
    arguments = parser.parse_args()
    reports = {}
    for seed in arguments.seeds:
        log(f"seed {seed}")
        folder = arguments.out / str(seed)
        reports[seed] = demo.run_demo(folder, seed, "python examples/demo_seeds.py", demo.FIXED, demo.FORMATS)
    write_text(arguments.table, page(reports))


def page(reports: dict[int, AuditReport]) -> str:
    """Return docs/demo-seeds.md."""
    variants = next(iter(reports.values())).variants
    parts = [
        "# The demo over seeds\n",
        "Made by `python examples/demo_seeds.py`; no number here was typed by hand. A seed makes another world,",
        "another initialisation and another order of the data. What was tried before these settings were chosen,",
        "including what did not show the effect: [demo-settings.md](demo-settings.md).\n",
        f"Method: `{demo.METHOD}`, learning rate {demo.UNLEARNING.lr:g} for both weight storages, both stopped at the",
        "same depth.\n",
        "## Verdicts\n",
        _table(["seed", *SHOWN], [[seed, *(_find(r, name).verdict for name in SHOWN)] for seed, r in reports.items()]),
        "\n## Steps taken, and why they ended\n",
        _table(
            ["seed", *demo.FIXED],
            [[seed, *(_steps(_find(r, n)) for n in demo.FIXED)] for seed, r in reports.items()],
        ),
        _metric(reports, variants, "answer_probability", "forget", "Mean probability of the forgotten answers"),
        _metric(reports, variants, "answer_probability.recovery", "forget", "Recovery R by variant"),
        _metric(reports, variants, "exact_memorisation", "forget", "Share of forgotten answers' tokens that are right"),
        _metric(reports, variants, "answer_probability.share", "retain", "Utility: retain score over the original's"),
        _metric(reports, variants, "answer_probability.share", "neighbour", "The same on neighbours"),
        _metric(reports, variants, "update.surviving", "weights", "Surviving update"),
    ]
    return "\n".join(parts) + "\n"


def _metric(reports: dict[int, AuditReport], variants: tuple[str, ...], metric: str, split: str, title: str) -> str:
    rows = [
        [seed, name, *(_value(_find(report, name), variant, split, metric) for variant in variants)]
        for name in SHOWN
        for seed, report in reports.items()
    ]
    return f"\n## {title}\n\n" + _table(["seed", "model", *variants], rows)


def _find(report: AuditReport, name: str) -> ReportSubject:
    return next(subject for subject in report.subjects if subject.name == name)


def _steps(subject: ReportSubject) -> str:
    fit = (subject.run or {})["fit"]
    return f"{fit['steps']}: {fit['stopped']}"


def _value(subject: ReportSubject, variant: str, split: str, metric: str) -> str:
    cell = subject.by_place.get((variant, split, metric))
    return f"{cell.value:.3f}" if isinstance(cell, Measured) else "–"


def _table(head: list, rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(x) for x in line) + " |" for line in lines)


if __name__ == "__main__":
    main()
