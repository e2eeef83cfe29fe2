"""Put the table of a demo into README.md, between its marks: python -m perf.readme [runs/demo]."""

from __future__ import annotations

import sys
from pathlib import Path

from perf.marked import fill
from stillknows.reporting import report
from stillknows.reporting.overview import summary

ROOT = Path(__file__).parents[1]


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "runs/demo")
    fill(ROOT / "README.md", "perf.readme", summary(report.read(folder)))


if __name__ == "__main__":
    main()
