"""Why does rounding bring back what was unlearned? Weights stored in different ways, learning rates, formats.

Trains the demo's original and never-taught control for each seed, unlearns the original with every storage and rate,
audits all models in every format and writes docs/why.json, docs/why.md and the plots beside it.

    python examples/why.py [--out runs/why] [--seeds 0 1 2] [--storages bfloat16 float32 …]

About 70 minutes on one core; a second run reuses what the first one finished. With fewer seeds or storages it writes
what is there.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jinja2 import Environment, StrictUndefined
from scipy.stats import spearmanr
from torch import Tensor

from stillknows.auditing import audit
from stillknows.auditing.plan import plan
from stillknows.experiments import demo, sweep
from stillknows.experiments.sweep import Json, Run, spread, value
from stillknows.formatting import markdown_table, number, percent
from stillknows.model import loading
from stillknows.model.layers import linears
from stillknows.model.ref import ModelRef
from stillknows.progress import log, shown
from stillknows.registry import bind
from stillknows.stats import LEVEL, bounds
from stillknows.store import locked, read_text, write_json, write_text
from stillknows.training.settings import Settings
from stillknows.types import CONTROL, FULL, ORIGINAL, WEIGHTS, Benchmark
from stillknows.variants import compress
from stillknows.variants.variant import Variant

SEEDS = (0, 1, 2)
STORAGES = ("bfloat16", "float32", "stochastic", "compensated", "lora")
KEY_RATE = 1.5e-5  # the demo's; measured over all seeds, others at the first
LOW_RATE = 7e-6  # at which every format is measured too, with weights kept in bfloat16
RATES = (LOW_RATE, 3e-5, 1e-4)
GA_RATES = (KEY_RATE, 1e-4)
ADAPTER_RATE = 1e-3  # the key rate of an adapter, which takes larger ones
NPO, GA = demo.METHOD, "ga + nll"
ADAPTER = "lora:rank=8"  # trained in float32 and merged
COLLAPSE_RATES = (KEY_RATE, 3e-5)
COLLAPSE_STEPS = 300
CALIBRATED = ("gptq", "awq")
PLAIN = "full,int8,nf4,fp4,int4,rtn:group=0,rtn:group=32,rtn:bits=3,gguf:Q4_0"
FORMATS = f"{PLAIN},{','.join(CALIBRATED)},gguf:Q4_K_M"  # the last three take most of the time: at the key rate only
METRICS = "answer_probability,extraction_strength"
WANTED = (
    ("forget", "answer_probability"),
    ("forget", "answer_probability.recovery"),
    ("retain", "answer_probability.share"),
    (WEIGHTS, "update.surviving"),
)
KNOWN, RECOVERY, KEPT, SURVIVING = (" ".join(place) for place in WANTED)
LOST, HALF, KEPT_SHARE, LITTLE = 0.1, 0.5, 0.9, 0.1  # bounds of "erased" and "carried over", of "back" and "not back"
ORDER = ("fp4", "nf4", "awq", "gptq")  # of recovery, as published
SHOWN = ("int8", "nf4", "fp4", "int4", "rtn:group=0", "rtn:bits=3")
TEMPLATE = Path(__file__).with_suffix(".md.j2")
RESAMPLES = 1000


@shown()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/why"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--storages", nargs="+", default=list(STORAGES), choices=STORAGES)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    loading.quiet()
    with locked(arguments.out):
        rows = [row for seed in arguments.seeds for row in measure(arguments.out, seed, arguments.storages)]
    write_json(arguments.docs / "why.json", rows)
    write_text(arguments.docs / "why.md", page(rows))
    draw(rows, arguments.docs)


def key_runs(seed: int, storages: Sequence[str]) -> Iterator[Run]:
    """Yield what every format is measured on: NPO at the key rate with each storage; for the first seed a low rate."""
    for storage in storages:
        lr = ADAPTER_RATE if storage == "lora" else KEY_RATE
        yield _run("npo", NPO, storage, replace(demo.UNLEARNING, lr=lr, seed=seed))
    if seed == SEEDS[0] and "bfloat16" in storages:
        yield _run("npo", NPO, "bfloat16", replace(demo.UNLEARNING, lr=LOW_RATE, seed=seed))


def more_runs(seed: int, storages: Sequence[str]) -> Iterator[Run]:
    """Yield the others: gradient ascent with nothing to retain, and for the first seed other rates and ga + nll."""
    for lr in COLLAPSE_RATES if seed == SEEDS[0] else COLLAPSE_RATES[:1]:
        collapse = replace(demo.UNLEARNING, lr=lr, seed=seed, forget_below=0.0, max_steps=COLLAPSE_STEPS)
        for storage in ("bfloat16", "float32"):
            if storage in storages:
                yield _run("collapse", "ga", storage, collapse)
    if seed == SEEDS[0]:
        for name, method, rates in (("npo", NPO, RATES), ("ga", GA, GA_RATES)):
            for lr in rates:
                for storage in storages:
                    if storage != "lora" and (name, lr, storage) != ("npo", LOW_RATE, "bfloat16"):
                        yield _run(name, method, storage, replace(demo.UNLEARNING, lr=lr, seed=seed))


def _run(name: str, method: str, storage: str, settings: Settings) -> Run:
    label = f"{name}-{storage}-{settings.lr:g}-s{settings.seed}".replace("e-0", "e-")
    if storage == "lora":
        return Run(label, f"{method} + {ADAPTER}", settings)
    return Run(label, method, replace(settings, weights=storage))


def benchmark_of(seed: int) -> Benchmark:
    """Return the demo's world: everything is trained on as there, and a sample of what is kept is measured."""
    world = bind("benchmark", f"world:seed={seed}")()
    forget, retain = world.split("forget"), world.split("retain")
    return replace(world, splits=(forget, sweep.sample(retain)), training=(forget, retain), refusals=())


def measure(out: Path, seed: int, storages: Sequence[str]) -> list[Json]:
    """Return the rows of one seed; models are audited one by one, so that each run's numbers are there at once."""
    models = out / "models"
    pair = {name: models / f"{name}-s{seed}" for name in (ORIGINAL, CONTROL)}
    demo.train_both(pair, bind("benchmark", f"world:seed={seed}")(), replace(demo.TRAINING, seed=seed))
    benchmark, rows = benchmark_of(seed), []
    for group, runs, formats in (("key", key_runs, FORMATS), ("more", more_runs, PLAIN)):
        request = audit.AuditConfig(str(pair[ORIGINAL]), {}, benchmark, (str(pair[CONTROL]),), formats, METRICS)
        audits, subjects = out / f"{group}-s{seed}", {}
        for run in runs(seed, storages):
            subjects[run.name] = sweep.unlearn_once(run, pair[ORIGINAL], benchmark, models / run.name)
            audit.audit(replace(request, subjects={run.name: str(subjects[run.name])}), audits)
        log(f"{audits}: the report of all {len(subjects)} models")
        result = sweep.audited(request, subjects, audits, f"python examples/why.py --seeds {seed}")
        found = sweep.rows(result, WANTED, {"seed": seed, "group": group})
        if group == "key":
            add_calibrated(found, pair[ORIGINAL], subjects, plan(request, audits).variants)
        rows += found
    return rows


def add_calibrated(
    rows: Sequence[Json], original: Path, subjects: Mapping[str, Path], formats: Mapping[str, Variant]
) -> None:
    """Put in the rows what calibrated formats leave of an update, which an audit does not measure.

    Each model is quantized with its own activations, so the difference also holds what calibration changes.
    """
    chosen = [name for name in formats if name in CALIBRATED]
    before = {name: _weights(original, formats[name]) for name in (FULL, *chosen)}
    for row in rows:
        if row["model"] in subjects:
            now = _weights(subjects[row["model"]], formats[FULL])
            update = {layer: now[layer] - w for layer, w in before[FULL].items()}
            size = sum(float(u.square().sum()) for u in update.values())
            for name in chosen:
                after = _weights(subjects[row["model"]], formats[name])
                dot = sum(float(((after[layer] - w) * update[layer]).sum()) for layer, w in before[name].items())
                row["cells"][SURVIVING][name] = [sweep.rounded(dot / size)] * 3


def _weights(folder: Path, form: Variant) -> dict[str, Tensor]:
    """Return a model's linear maps as a format leaves them."""
    model = ModelRef.open(str(folder)).load().model
    with compress.compressed(model, form.chain, form.ids_NL):
        return {layer.name: layer.read().double() for layer in linears(model)}


def storage(row: Json) -> str:
    run = row["run"]
    return "lora" if ADAPTER in run["method"] else run["settings"].get("weights", "float32")


def family(row: Json) -> str:
    """Return "npo", "ga" or "collapse", and the names of the two controls for these."""
    return row["model"].partition("-")[0]


def of(rows: Iterable[Json], **wanted: object) -> list[Json]:
    """Return the rows with these values of family, storage, lr and group."""
    reads = {
        "family": family,
        "storage": storage,
        "lr": lambda row: row["run"]["settings"]["lr"],
        "group": lambda row: row["group"],
    }
    return [row for row in rows if all(reads[name](row) == found for name, found in wanted.items())]


class Points(NamedTuple):
    """Cells in which both are measured: the update that survives a format, and what the format brings back."""

    surviving: np.ndarray
    recovery: np.ndarray
    runs: np.ndarray
    formats: np.ndarray

    def where(self, chosen: np.ndarray) -> Points:
        return Points(*(column[chosen] for column in self))


def points(rows: Sequence[Json]) -> Points:
    """Return every cell of the runs that retain something, in formats other than full precision."""
    found = [
        (surviving, recovered, row["model"], name)
        for row in rows
        if family(row) in ("npo", "ga")
        for name in row["cells"].get(RECOVERY, {})
        if (surviving := value(row, SURVIVING, name)) is not None
        and (recovered := value(row, RECOVERY, name)) is not None
    ]
    return Points(*(np.array(column) for column in zip(*found, strict=True)))


def correlation(cells: Points) -> float:
    """Return Spearman's rank correlation of surviving update and recovery, NaN where one of them does not vary."""
    if len(set(cells.surviving)) < 2 or len(set(cells.recovery)) < 2:
        return float("nan")
    return float(spearmanr(cells.surviving, cells.recovery)[0])  # type: ignore[arg-type]


def correlation_bounds(cells: Points) -> tuple[float, float]:
    """Return one-sided bounds at LEVEL from resampling whole runs, since the cells of a run depend on each other."""
    rng, names = np.random.default_rng(0), sorted(set(cells.runs))
    rows = {name: np.flatnonzero(cells.runs == name) for name in names}
    drawn = (rng.choice(names, len(names)) for _ in range(RESAMPLES))
    return bounds(
        np.array([correlation(cells.where(np.concatenate([rows[n] for n in some]))) for some in drawn]), LEVEL
    )


def page(rows: Sequence[Json]) -> str:
    """Return docs/why.md: the prose of why.md.j2 with numbers that are all computed from the rows."""
    runs = [row for row in rows if row["run"]]
    key = [row for lr in (KEY_RATE, ADAPTER_RATE) for row in of(runs, group="key", lr=lr)]
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(read_text(TEMPLATE))
    settings = {
        "width": demo.ARCHITECTURE["hidden_size"],
        "npo": NPO,
        "ga": GA,
        "adapter": ADAPTER,
        "depth": f"{demo.UNLEARNING.forget_below:g}",
        "most_steps": demo.UNLEARNING.max_steps,
        "collapse_steps": COLLAPSE_STEPS,
        "key_rate": f"{KEY_RATE:g}",
        "adapter_rate": f"{ADAPTER_RATE:g}",
        "first_seed": SEEDS[0],
        "seeds": ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows})),
        "num_runs": len(runs),
    }
    bfloat16, low = of(key, storage="bfloat16"), of(runs, group="key", lr=LOW_RATE)
    return template.render(
        settings,
        original=spread([value(row, KNOWN, FULL) for row in rows if row["model"] == ORIGINAL]),
        control=spread([value(row, KNOWN, FULL) for row in rows if row["model"] == CONTROL]),
        depths=depths(key),
        recovery=by_format(key, RECOVERY),
        surviving=by_format(key, SURVIVING),
        rates=rates([row for row in runs if row["seed"] == SEEDS[0] and family(row) in ("npo", "ga")]),
        matched=matched(runs),
        order=order({f"{KEY_RATE:g}": bfloat16, f"{LOW_RATE:g}": low}),
        pairs=pairs(bfloat16),
        coarse=highest([row for row in of(runs, family="npo") if storage(row) == "bfloat16"]),
        fine=highest([row for row in runs if storage(row) != "bfloat16"]),
        fast=highest([r for name in ("npo", "ga") for r in of(runs, family=name, storage="bfloat16", lr=RATES[-1])]),
        low_depth=spread([value(row, KNOWN, FULL) for row in low]),
        collapse=collapse(of(runs, family="collapse")),
        **tested(points(runs)),
    )


def tested(cells: Points) -> dict[str, object]:
    """Return the numbers that test whether R falls as the surviving update rises, and the cells that disagree."""
    low, high = correlation_bounds(cells)
    lost, kept = cells.where(cells.surviving < LOST), cells.where(cells.surviving >= KEPT_SHARE)
    odd = cells.where(
        ((cells.surviving >= KEPT_SHARE) & (cells.recovery > LITTLE))
        | ((cells.surviving < LOST) & (cells.recovery < HALF))
    )
    below, less = cells.where(cells.recovery < -LITTLE), cells.where(cells.surviving < KEPT_SHARE)
    return {
        "num_cells": len(cells.runs),
        "correlation": number(correlation(cells)),
        "low": number(low),
        "high": number(high),
        "level": percent(LEVEL),
        "within_run": _within(cells, cells.runs),
        "within_format": _within(cells, cells.formats),
        "lost": LOST,
        "kept_share": KEPT_SHARE,
        "little": LITTLE,
        "half": HALF,
        "lost_cells": _share(lost, lost.recovery > HALF, f"R above {HALF:g}"),
        "kept_cells": _share(kept, np.abs(kept.recovery) <= LITTLE, f"R between −{LITTLE:g} and {LITTLE:g}"),
        "less_cells": len(less.runs),
        "less_correlation": number(correlation(less)),
        "odd_count": len(odd.runs),
        "odd": _listed(odd) if len(odd.runs) else "",
        "num_below": len(below.runs),
        "below": f", in {', '.join(sorted(set(below.formats)))}" if len(below.runs) else "",
    }


def highest(rows: Sequence[Json]) -> str:
    """Return the highest R of these runs, with its run and format."""
    cells = [(r, row["model"], f) for row in rows for f in FORMATS.split(",")[1:] if (r := value(row, RECOVERY, f))]
    if not cells:
        return "not measured"
    r, model, variant = max(cells)
    return f"{number(r)} ({model} in {variant})"


def _within(cells: Points, column: np.ndarray) -> str:
    """Return the correlation within each run, or format, in which anything comes back."""
    names = sorted(set(column[cells.recovery > LITTLE]))
    return f"{spread([correlation(cells.where(column == name)) for name in names])}, n = {len(names)}"


def _share(cells: Points, hits: np.ndarray, words: str) -> str:
    if not len(cells.runs):
        return "there is no cell"
    low, high = number(min(cells.recovery)), number(max(cells.recovery))
    return f"{int(hits.sum())} of {len(cells.runs)} cells have {words} (R from {low} to {high})"


def _listed(cells: Points) -> str:
    lines = sorted(zip(*(column.tolist() for column in (cells.runs, cells.formats, *cells[:2])), strict=True))
    return markdown_table(["run", "format", "surviving", "R"], [[m, f, number(x), number(y)] for m, f, x, y in lines])


def storages(rows: Sequence[Json]) -> dict[str, list[Json]]:
    """Return the rows of every storage that there is."""
    return {name: found for name in STORAGES if (found := of(rows, storage=name))}


def depths(key: Sequence[Json]) -> str:
    lines = [
        [
            name,
            spread([row["run"]["steps"] for row in rows], 0),
            spread([value(row, KNOWN, FULL) for row in rows], 3),
            spread([value(row, KEPT, FULL) for row in rows]),
        ]
        for name, rows in storages(key).items()
    ]
    return markdown_table(["weights", "steps", "depth", "retain"], lines)


def by_format(rows: Sequence[Json], place: str) -> str:
    """Return a table of formats × storages."""
    found = storages(rows)
    formats = FORMATS.split(",")[1:]
    lines = [[f, *(spread([value(row, place, f) for row in some]) for some in found.values())] for f in formats]
    return markdown_table([place.rpartition(".")[2], *found], lines)


def order(by_rate: Mapping[str, Sequence[Json]]) -> str:
    """Return what comes back and what survives in the formats whose order was published, at each rate."""
    columns = [(rate, rows, place) for place in (RECOVERY, SURVIVING) for rate, rows in by_rate.items()]
    lines = [[f, *(spread([value(row, place, f) for row in rows]) for _, rows, place in columns)] for f in ORDER]
    head = [f"{'R' if place == RECOVERY else 'surviving'} at {rate}" for rate, _, place in columns]
    return markdown_table(["format", *head], lines)


def rates(rows: Sequence[Json]) -> str:
    lines = []
    for row in sorted(rows, key=lambda row: (family(row), STORAGES.index(storage(row)), row["run"]["settings"]["lr"])):
        run = [family(row), storage(row), f"{row['run']['settings']['lr']:g}", str(row["run"]["steps"])]
        run += [spread([value(row, KNOWN, FULL)], 3), spread([value(row, KEPT, FULL)])]
        lines.append(
            [*run, *(spread([value(row, RECOVERY, f)]) for f in SHOWN), spread([value(row, SURVIVING, "int4")])]
        )
    head = ["method", "weights", "rate", "steps", "depth", "retain"]
    return markdown_table([*head, *(f"R {f}" for f in SHOWN), "surviving int4"], lines)


def matched(runs: Sequence[Json]) -> str:
    """Return bfloat16 beside float32 at each rate and seed."""
    lines = []
    for one in of(runs, family="npo", storage="bfloat16"):
        lr = one["run"]["settings"]["lr"]
        for other in of(runs, family="npo", storage="float32", lr=lr):
            if other["seed"] == one["seed"]:
                both = [" / ".join(spread([value(r, KNOWN, FULL)], 3) for r in (one, other))]
                both += [" / ".join(spread([value(r, RECOVERY, f)]) for r in (one, other)) for f in SHOWN]
                lines.append([f"{lr:g}", str(one["seed"]), *both])
    return markdown_table(["rate", "seed", "depth", *(f"R {f}" for f in SHOWN)], sorted(lines))


def pairs(rows: Sequence[Json]) -> str:
    """Say for each two neighbours of the published order in how many seeds the first recovers more."""
    lines = []
    for a, b in pairwise(ORDER):
        both = [(value(row, RECOVERY, a), value(row, RECOVERY, b)) for row in rows]
        seen = [(x, y) for x, y in both if x is not None and y is not None]
        lines.append(f"- R is higher in {a} than in {b} in {sum(x > y for x, y in seen)} of {len(seen)} seeds.")
    return "\n".join(lines)


def collapse(rows: Sequence[Json]) -> str:
    lines = [
        [what, f"{lr:g}", name, *(spread([value(row, place, f) for row in some]) for f in (FULL, *SHOWN))]
        for what, place in (("retain", KEPT), ("forgotten", KNOWN))
        for lr in COLLAPSE_RATES
        for name, some in storages(of(rows, lr=lr)).items()
    ]
    return markdown_table(["score", "rate", "weights", FULL, *SHOWN], lines)


def draw(rows: Sequence[Json], folder: Path) -> None:
    """Draw R against the surviving update, one point for each run and format, coloured by storage."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name, some in storages([row for row in rows if row["run"]]).items():
        cells = points(some)
        axes.scatter(cells.surviving, cells.recovery, s=14, alpha=0.7, label=name)
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.set(xlabel="surviving update", ylabel="recovery R", ylim=(-0.3, 1.1))
    axes.legend(title="weights kept in")
    figure.savefig(folder / "why-scatter.png", dpi=150)


if __name__ == "__main__":
    main()
