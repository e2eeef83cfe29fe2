"""Planted truth: models that hide in known ways, and models that never knew, audited by the plans of variants.

    python -m perf.planted_truth [--plan standard] [--seeds 2] [--work runs/planted] [--write]

Prints which variants expose which model, the misses included; `--write` puts the table into docs/planted-truth.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from perf import planted
from perf.marked import fill
from stillknows import defaults
from stillknows.auditing.audit import AuditConfig, audit
from stillknows.experiments import tiny_models
from stillknows.formatting import markdown_table
from stillknows.registry import bind
from stillknows.reporting.build import build
from stillknows.reporting.schema import AuditReport, ReportSubject
from stillknows.training.settings import Settings
from stillknows.types import FULL, UNDEFENDED, Benchmark

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/planted-truth.md"
WORLD = "world:people=4,facts=6,forget=2,forget_facts=20,values=8"
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
TEACHING = Settings(lr=5e-3, epochs=1000, max_steps=150, batch_size=64, warmup=5, schedule="linear")


class Result(NamedTuple):
    """What an audit says of one model. exposing: the variants that find it to know."""

    model: str
    verdict: str
    full: str
    exposing: list[str]
    undecided: list[str]


def teach(out: Path, benchmark: Benchmark, left_out: str, seed: int) -> Path:
    """Train a model on every split but those of one role."""
    if not (out / "config.json").is_file():
        tokenizer = tiny_models.word_tokenizer(tiny_models.texts(benchmark))
        examples = [e for split in benchmark.splits if split.role != left_out for e in split.examples]
        out.mkdir(parents=True, exist_ok=True)
        tiny_models.train(out, examples, benchmark.template, tokenizer, SIZES, replace(TEACHING, seed=seed))
    return out


def models_of(folder: Path, benchmark: Benchmark, original: Path, seed: int) -> dict[str, Path]:
    """Make every hiding model, and one that was trained anew without the facts."""
    found = {}
    for name, make in planted.HIDING.items():
        places = [folder / name, folder / f"{name}.json"]
        made = [place for place in reversed(places) if place.is_file() or (place / "config.json").is_file()]
        found[name] = made[0] if made else make(original, benchmark, folder / name)
    return found | {"never_taught": teach(folder / "never_taught", benchmark, "forget", seed + 1)}


def audited(folder: Path, benchmark: Benchmark, variants: str, seed: int) -> AuditReport:
    """Make and audit all models of one seed. Placebos are left out: the gates alone must find them."""
    original, control = (
        teach(folder / n, benchmark, left, seed) for n, left in (("original", ""), ("control", "forget"))
    )
    subjects = {name: str(path) for name, path in models_of(folder, benchmark, original, seed).items()}
    config = AuditConfig(str(original), subjects, benchmark, (str(control),), variants, placebos=0)
    return build(audit(config, folder / f"audit-{variants}"), f"stillknows audit … --variants {variants}")


def result_of(subject: ReportSubject) -> Result:
    """Return what a report says of one model."""
    by = {word: [v for v, name in subject.variants.items() if name == word] for word in ("STILL KNOWS", "UNDECIDED")}
    exposing = [v for v in by["STILL KNOWS"] if v != UNDEFENDED or subject.defence]
    return Result(subject.name, subject.verdict, subject.variants[FULL], exposing, by["UNDECIDED"])


def table(results: Mapping[int, list[Result]]) -> str:
    """Return models × seeds: the verdicts, in full precision and overall, and what exposes a model."""
    header = ["model", "seed", "full precision", "verdict", "exposed by"]
    rows = [
        [r.model, str(n), r.full, r.verdict, ", ".join(r.exposing) or "–"]
        for n, found in results.items()
        for r in found
    ]
    return markdown_table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=list(defaults.PLANS), default="standard")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--work", type=Path, default=ROOT / "runs/planted")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    results, started = {}, time.process_time()
    for seed in range(given.seeds):
        folder = given.work / str(seed)
        report = audited(folder, bind("benchmark", f"{WORLD},seed={seed}")(), given.plan, seed)
        results[seed] = [result_of(s) for s in report.audited]
        (folder / f"{given.plan}.json").write_text(json.dumps([r._asdict() for r in results[seed]], indent=1))
        (folder / f"{given.plan}-report.json").write_text(json.dumps(report.to_json()))
    text = table(results)
    print(text, f"\n{time.process_time() - started:.0f} s")
    if given.write:
        fill(PAGE, "perf.planted_truth", text)


if __name__ == "__main__":
    main()
