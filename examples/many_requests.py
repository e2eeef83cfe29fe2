"""What do more items to forget, and more requests one after another, cost and break?

Trains the demo's two models on a world in which four people are to be forgotten. They are unlearned one after another,
a request each, and two to four at once. All results are audited for all four people; docs/requests.md, .json and .png
are written (needs matplotlib).

    python examples/many_requests.py [--out runs/requests] [--docs docs] [--seed 0]

Every request is one `stillknows unlearn` of its own process, so that its peak memory is its own. A second run reuses
what the first one finished.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stillknows.auditing import audit
from stillknows.experiments import demo, sweep
from stillknows.formatting import markdown_table
from stillknows.model import loading
from stillknows.progress import log, shown
from stillknows.registry import bind
from stillknows.store import RECORD, locked, read_json, write_json, write_text
from stillknows.types import CONTROL, FULL, ORIGINAL, Benchmark, Example, Split

PEOPLE = 4
WORLD = "world:people=34,forget=4,forget_facts=36,seed={seed}"
TRAINING = replace(demo.TRAINING, max_steps=120)
SETTINGS = replace(demo.UNLEARNING, lr=3e-5, check_every=5)  # twice the demo's rate, to be quick
VARIANTS = "full,nf4"
METRIC, METRICS = "answer_probability", "answer_probability,extraction_strength"
Row = dict[str, Any]


@shown()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/requests"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    loading.quiet()
    with locked(arguments.out):
        rows = measure(arguments.out, arguments.seed)
    write_json(arguments.docs / "requests.json", rows)
    write_text(arguments.docs / "requests.md", page(rows))
    draw(rows, arguments.docs / "requests.png")


def measure(out: Path, seed: int) -> list[Row]:
    """Return one row for each request: what it forgot, what it cost, what is left of every person."""
    world = bind("benchmark", WORLD.format(seed=seed))()
    models = {name: out / "models" / name for name in (ORIGINAL, CONTROL)}
    demo.train_both(models, world, replace(TRAINING, seed=seed))
    people = split_by_person(world.split("forget"))
    retain = write(out / "data" / "retain.jsonl", world.split("retain").examples)
    folders: dict[str, Path] = {}
    before: list[str] = []
    for number, person in enumerate(people, 1):
        name = f"request-{number}"
        forget = write(out / "data" / f"person-{number}.jsonl", person.examples)
        folders[name] = unlearn(models[ORIGINAL], forget, retain, out / "models" / name, seed, before)
        before = ["--after", str(folders[name])]
    for count in range(2, PEOPLE + 1):
        name = f"together-{count}"
        forget = write(out / "data" / f"{name}.jsonl", [e for person in people[:count] for e in person.examples])
        folders[name] = unlearn(models[ORIGINAL], forget, retain, out / "models" / name, seed, [])
    sample = sweep.sample(world.split("retain"))
    asked = Benchmark(world.spec, (*people, sample), world.template)
    request = audit.AuditConfig(str(models[ORIGINAL]), {}, asked, (str(models[CONTROL]),), VARIANTS, METRICS)
    result = sweep.audited(request, folders, out / "audit", f"python examples/many_requests.py --seed {seed}")
    return [
        row(subject, read_json(folders[subject["name"]] / RECORD)) for subject in result["subjects"][: len(folders)]
    ]


def split_by_person(forget: Split) -> list[Split]:
    """Return the questions about each person as a split to forget."""
    people: dict[str, list[Example]] = {}
    for example in forget.examples:
        people.setdefault(example.fact.partition("-")[0], []).append(example)
    return [Split(f"person-{i}", "forget", tuple(examples)) for i, examples in enumerate(people.values(), 1)]


def write(path: Path, examples: Sequence[Example]) -> Path:
    lines = [{"id": e.id, "question": e.prompt, "answer": e.answer, "fact": e.fact} for e in examples]
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    return path


def unlearn(original: Path, forget: Path, retain: Path, out: Path, seed: int, before: Sequence[str]) -> Path:
    """Run `stillknows unlearn` with SETTINGS, unless its result is there."""
    if (out / RECORD).is_file():
        return out
    log(f"unlearning {out.name}")
    s = SETTINGS
    numbers = {"--lr": s.lr, "--epochs": s.epochs, "--steps": s.max_steps, "--batch-size": s.batch_size}
    numbers |= {"--retain-batch-size": s.retain_batch_size, "--beta2": s.beta2, "--forget-below": s.forget_below}
    numbers |= {"--check-every": s.check_every}
    command = [str(Path(sys.executable).with_name("stillknows")), "unlearn", str(original), "--template", "{prompt}"]
    command += ["--benchmark", f"jsonl:forget={forget},retain={retain}", "--method", demo.METHOD, "--seed", str(seed)]
    command += [str(word) for option in numbers.items() for word in option]
    subprocess.run([*command, "--out", str(out), *before], check=True, stdout=subprocess.DEVNULL)
    return out


def row(subject: Row, record: Row) -> Row:
    """Return a request's costs, and the knowledge kept of each person and of what was to be retained."""
    cells = {(c["variant"], c["split"], c["metric"]): c.get("value") for c in subject["cells"]}
    fit, request = record["fit"], record["request"]
    kept = {
        variant: [cells[variant, f"person-{i}", f"{METRIC}.kept"] for i in range(1, PEOPLE + 1)]
        for variant in VARIANTS.split(",")
    }
    return {
        "name": subject["name"],
        "number": request["number"],
        "people": len(request["forgotten"]) // 36,
        "fit": {name: fit[name] for name in ("steps", "seconds", "tokens", "forward_tokens", "flops")},
        "peak_memory_bytes": fit["peak_memory_bytes"],
        "stopped": fit["stopped"],
        "total": request["total"],
        "kept": kept,
        "retain": {variant: cells[variant, "retain", f"{METRIC}.share"] for variant in VARIANTS.split(",")},
    }


def page(rows: Sequence[Row]) -> str:
    """Return docs/requests.md."""
    chain, together = _in_a_row(rows), _at_once(rows)
    head = ["knowledge kept of", *(f"person {i}" for i in range(1, PEOPLE + 1)), "retain score"]
    return "\n".join(
        [
            "# More to forget, and more requests in a row\n",
            "Made by `python examples/many_requests.py`; no number here was typed by hand. A small world; four people",
            f"of 36 facts each are forgotten with `{demo.METHOD}`, each request until the mean probability of its own",
            f"items is at most {SETTINGS.forget_below:g}. Knowledge kept is 0 for a model that was never taught and",
            "1 for the original; the retain score is a share of the original's. Floating-point operations are an",
            "estimate: 6·N per token that is trained on, 2·N per token that is only read (reference, checks), N being",
            "the weights without the embedding, fillers included. Seconds depend on the machine and its other work.\n",
            "![curves](requests.png)\n",
            "## Requests in a row: each starts where the one before ended\n",
            _costs(chain),
            "",
            *(_kept(chain, head, variant) for variant in VARIANTS.split(",")),
            "## As many people in one request\n",
            _costs(together),
            "",
            *(_kept(together, head, variant) for variant in VARIANTS.split(",")),
        ]
    )


def _in_a_row(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["name"].startswith("request-")]


def _at_once(rows: Sequence[Row]) -> list[Row]:
    """Return the requests for 1, 2, … people; the first is also the first of those in a row."""
    return [row for row in rows if row["number"] == 1]


def _costs(rows: Sequence[Row]) -> str:
    head = ["run", "people", "steps", "seconds", "tokens trained", "tokens read", "TFLOP", "TFLOP so far", "peak MiB"]
    lines = [
        [
            row["name"],
            str(row["people"]),
            str(row["fit"]["steps"]),
            f"{row['fit']['seconds']:.0f}",
            str(row["fit"]["tokens"]),
            str(row["fit"]["forward_tokens"]),
            f"{row['fit']['flops'] / 1e12:.2f}",
            f"{row['total']['flops'] / 1e12:.2f}",
            f"{row['peak_memory_bytes'] / 2**20:.0f}",
        ]
        for row in rows
    ]
    return markdown_table(head, lines)


def _kept(rows: Sequence[Row], head: list[str], variant: str) -> str:
    lines = [
        [f"{row['name']}, {variant}", *(_number(x) for x in row["kept"][variant]), _number(row["retain"][variant])]
        for row in rows
    ]
    return markdown_table(head, lines) + "\n"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw knowledge kept of what was forgotten so far (the worst person), the retain score and the operations."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for label, found, line in (("in a row", _in_a_row(rows), "-o"), ("at once", _at_once(rows), "--s")):
        counts = range(1, len(found) + 1)
        worst = [max(row["kept"][FULL][:k]) for k, row in zip(counts, found, strict=True)]
        left.plot(counts, worst, line, color="tab:red", label=f"kept of the forgotten, {label}")
        left.plot(counts, [row["retain"][FULL] for row in found], line, color="tab:blue", label=f"retain, {label}")
        right.plot(counts, [row["total"]["flops"] / 1e12 for row in found], line, color="black", label=label)
    left.set(xlabel="people forgotten", ylabel="share of the original's", xticks=range(1, PEOPLE + 1))
    right.set(xlabel="people forgotten", ylabel="TFLOP in all", xticks=range(1, PEOPLE + 1), ylim=(0, None))
    for axes in (left, right):
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
