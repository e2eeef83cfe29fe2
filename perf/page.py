"""Write docs/speed.md from what the benchmarks left in docs/speed-*.json; no number is typed by hand.

    for name in quantizers diagnosis evaluation unlearning certificate; do
        python -m perf.$name --json docs/speed-$name.json
    done
    python -m perf.page [--docs docs]

Quantizers are compared with libraries that only the environment of `make oracles` holds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

from stillknows.formatting import markdown_table, number, significant
from stillknows.store import read_json, write_text

Json = dict[str, Any]
HEAD = """# Speed

Made by `python -m perf.page` from what each benchmark measured in one run on a shared machine, in turn with what
it is compared with. Ratios are medians of the turns, the other's time, or memory, over ours: above 1 this project needs
less. Absolute times move with the machine, ratios less.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    docs = parser.parse_args().docs
    write_text(docs / "speed.md", page(docs))


def page(docs: Path) -> str:
    """Return docs/speed.md, made of the figures in a folder."""
    sections = [section(read_json(docs / f"speed-{name}.json")) for name, section in SECTIONS.items()]
    return "\n".join([HEAD, *sections])


def quantizers(content: Json) -> str:
    rows = [
        [
            row["format"],
            row["library"],
            significant(row["seconds_per_million"]),
            number(row["peak_mb"], digits=0),
            number(row["ratio"]),
        ]
        for row in content["rows"]
    ]
    sizes = content["sizes"]
    return _section(
        "One matrix in a format",
        f"`python -m perf.quantizers`: {sizes['outputs']} × {sizes['inputs']} float32 weights into codes "
        "and back, on one core.",
        markdown_table(["format", "library", "s per million weights", "peak MB", "ratio"], rows),
        content,
    )


def diagnosis(content: Json) -> str:
    ways = ("plain", "diagnose")
    rows = [
        [", ".join(run["formats"]), *(_spread(run[way]) for way in ways), number(run["ratio"])]
        for run in content["runs"]
    ]
    return _section(
        "`stillknows diagnose`",
        "`python -m perf.diagnosis`: s of processor time for 100 million weights and each format, from two "
        "checkpoints on disk, on one core, against loading both models and quantizing each matrix whole; median "
        "(lowest to highest). A row is one run of all its formats.",
        markdown_table(["formats", "whole matrices", "diagnose", "ratio"], rows),
        content,
    )


def _spread(values: list[float]) -> str:
    return f"{number(median(values))} ({number(min(values))} to {number(max(values))})"


def evaluation(content: Json) -> str:
    ways = list(content["rounds"][0])
    rows = []
    for name, what, unit in (("seconds", "time", "s"), ("peak_mb", "peak memory", "MB")):
        middle = [median(runs[way][name] for runs in content["rounds"]) for way in ways]
        rows.append([what, *(f"{number(m, digits=0)} {unit}" for m in middle), _spread(content["ratios"][name])])
    return _section(
        "The whole TOFU evaluation",
        f"`python -m perf.evaluation`: {content['sizes']['share']:.0%} of TOFU's items, every metric and attack.",
        markdown_table(["", *ways, "ratio"], rows),
        content,
    )


def unlearning(content: Json) -> str:
    return _section(
        "Steps of unlearning",
        "`python -m perf.unlearning`: NPO + KL, with batches in the order drawn, all logits and a second model "
        "on the other side.",
        markdown_table(["", "ratio"], [["time", _spread(content["ratios"])]]),
        content,
    )


def certificate(content: Json) -> str:
    row = [*(_spread(content[way]) for way in ("sha256sum", "verify")), number(content["ratio"])]
    return _section(
        "`stillknows verify`",
        "`python -m perf.certificate`: s of processor time for each gigabyte of weights, read from memory, against "
        "coreutils' sha256sum; median (lowest to highest).",
        markdown_table(["sha256sum", "verify", "ratio"], [row]),
        content,
    )


def _section(title: str, words: str, table: str, content: Json) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    return f"## {title}\n\n{words}\n\n{table}\n\nWith {versions}.\n"


SECTIONS = {
    **{"quantizers": quantizers, "diagnosis": diagnosis, "evaluation": evaluation, "unlearning": unlearning},
    "certificate": certificate,
}

if __name__ == "__main__":
    main()
