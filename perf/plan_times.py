"""How long plans take: processor time of whole audits of a demo's models, written into docs/plans.md.

    python -m perf.plan_times [--folder runs/demo] [--plans quick] [--docs docs]

Audits one unlearned model with both controls, in the formats that plans begin with and then in each plan, each into a
folder of its own, and shows the ratio.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from perf.marked import fill
from stillknows.auditing.audit import AuditConfig, audit
from stillknows.defaults import USUAL
from stillknows.formatting import markdown_table, number
from stillknows.progress import shown
from stillknows.registry import bind
from stillknows.reporting import report
from stillknows.specs import Specs
from stillknows.types import CONTROL, ORIGINAL

PROGRAM, SUBJECT = "perf.plan_times", "npo-float32"


def seconds(folder: Path, variants: Specs) -> float:
    """Return the processor time that an audit from nothing takes."""
    models = folder / "models"
    benchmark = bind("benchmark", report.read(folder).benchmark)()
    config = AuditConfig(
        str(models / ORIGINAL), {SUBJECT: str(models / SUBJECT)}, benchmark, (str(models / CONTROL),), variants
    )
    with tempfile.TemporaryDirectory() as out:
        started = time.process_time()
        audit(config, Path(out))
        return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"))
    parser.add_argument("--plans", nargs="*", default=["quick"])
    parser.add_argument("--docs", type=Path)
    given = parser.parse_args()
    with shown():
        seconds(given.folder, "full")  # imports
        found = {"formats alone": seconds(given.folder, USUAL)}
        found |= {plan: seconds(given.folder, plan) for plan in given.plans}
    rows = [[name, f"{number(s, digits=0)} s", number(s / found["formats alone"])] for name, s in found.items()]
    text = markdown_table(["variants", "processor time", "ratio"], rows)
    print(text, flush=True)
    if given.docs:
        fill(given.docs / "plans.md", PROGRAM, text)


if __name__ == "__main__":
    main()
