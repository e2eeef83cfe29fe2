"""Which way of unlearning holds? Many methods at equal utility, in every format, and when a part is taught again.

For each seed the demo's original and never-taught control are trained on a fictional world, and one person is forgotten
by every method. Each is drawn back until it keeps 95 % of the retain score (`equal_retain`), so that all pay the same
price. Then all are audited in every format, and half of the forgotten facts are taught again to see when the others
come back. Writes docs/compare.json, .md and .png (needs matplotlib).

    python examples/compare_methods.py [--out runs/compare] [--seeds 0 1 2] [--methods npo sure …]

About two hours on one core; a second run reuses what the first one finished.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from stillknows.auditing import audit
from stillknows.experiments import demo, relearning_curve, sweep
from stillknows.experiments.sweep import Json, Run
from stillknows.formatting import markdown_table, number
from stillknows.model import loading, modelfiles
from stillknows.model.encoding import encode_split, without_end
from stillknows.model.ref import ModelRef
from stillknows.progress import shown
from stillknows.registry import bind
from stillknows.store import digest, read_json, write_json, write_text
from stillknows.training.settings import Settings
from stillknows.training.weight_rounding import WeightStorage
from stillknows.types import CONTROL, FULL, ORIGINAL, Benchmark

SEEDS, TUNING_SEED = (0, 1, 2), 9
RATE, SMALL_RATE, LARGE_RATES, ADAPTER_RATES = 6e-4, 6e-5, (1.5e-4, 6e-4), (1e-3, 3e-3)
UNLEARNING = replace(demo.UNLEARNING, max_steps=80, check_every=5)
FLOOR, CLEAN = 0.95, 0.1  # least share of the retain score; largest upper bound of what may be kept in any format
BASE = "npo + nll"
FORMATS = "full,int8,nf4,fp4,int4,rtn:group=0,gptq,gguf:Q2_K"
QUICK = "full,int4"  # what rates are chosen by
METRICS = "answer_probability,extraction_strength"
METRIC = "answer_probability"
KEPT, RECOVERY = f"{METRIC}.kept", f"{METRIC}.recovery"
WANTED = [("forget", METRIC), ("forget", KEPT), ("forget", RECOVERY), ("retain", f"{METRIC}.share")]
SEED_NOISE = 0.05  # of what relearning brings back
RELEARNING = Settings(lr=3e-5, max_steps=40, epochs=1e9, batch_size=18, beta2=0.9, check_every=4)
BREACH = 0.2  # of the gap between original and control, both taught alike
PAGE = """# {count} ways to unlearn, at equal utility

Made by `python examples/compare_methods.py`: one person of a fictional world is forgotten by a model of 4.5 million
weights. Every result is drawn back towards the original until it keeps {floor:.0%} of the retain items' answer
probability (training items; the retain column is measured on a sample of them). Seeds: {seeds}. Formats: {formats}.

- **kept**: share of the gap between never-taught control and original, by answer probability: 0 as never taught, 1 as
  the original; in full precision, and in the format that keeps most.
- **recovery**: what the worst format brings back of what full precision has lost. – where nothing was lost.
- **steps to breach**: half of the facts are taught again (learning rate {lr}); after how many steps more than {breach}
  of the gap on the *other* half is there, original and control being taught alike. The least of all seeds.
- **relearned**: that share after {steps} steps.
- **s**: seconds of training on a shared machine; good for orders of magnitude.

Numbers are means over the seeds that the last column counts (a single one is the first), bounds the widest of any seed.
In order: what is clean (no more than 10 % kept in any format, by the bounds) before what is not, what keeps {floor:.0%}
on the sample before what does not, then by what relearning brings back. Means over different seeds are not to be
compared closely.

{table}

![retained against relearned](compare.png)

Names in bold: among the clean, no other method retains more, gives back less and costs less at once.

## robust

{robust}
## What they were

{used}

All have one learning rate, which is SURE's: of two, SURE kept least at it on another world (seed 9), and `npo_gdr` at
it is the control "same rate, no mask". What is called slow has a tenth of it. LoRA, which takes larger rates, chose
between two on that world. Steps end at 80, or where the forget items' probability is below .001.

What this does not show: larger models, longer texts, other amounts to forget. Rates were hardly searched, and
defaults of methods that were published for models a thousand times as large may suit this one badly; a low place here
is no judgement of a method.
"""


class Entry(NamedTuple):
    """A method, the learning rates that it may choose among, and how its weights are kept between steps."""

    method: str
    rates: tuple[float, ...] = (RATE,)
    weights: WeightStorage = "float32"


METHODS: dict[str, Entry] = {
    "ga": Entry("ga"),
    "grad_diff": Entry("grad_diff"),
    "npo_gdr": Entry(BASE),
    "npo_gdr_slow": Entry(BASE, rates=(SMALL_RATE,)),
    "npo_gdr_slow_bfloat16": Entry(BASE, rates=(SMALL_RATE,), weights="bfloat16"),
    "npo_klr": Entry("npo + kl"),
    "simnpo": Entry("simnpo_gd"),
    "dpo": Entry("dpo_gd"),
    "idk_ap": Entry("idk_ap"),
    "altpo": Entry("altpo_gd"),
    "me": Entry("me_gd"),
    "llmu": Entry("llmu"),
    "undial": Entry("undial"),
    "wga": Entry("wga + nll"),
    "satimp": Entry("satimp_gd"),
    "ceu": Entry("ceu + nll"),
    "flat": Entry("flat"),
    "jensun": Entry("jensun"),
    "pdu": Entry("pdu"),
    "rmu": Entry("rmu"),
    "lunar": Entry("lunar"),
    "task_vector": Entry("task_vector"),
    "whp": Entry("whp + nll"),
    "undo": Entry("npo + kl + undo"),
    "sam": Entry(f"{BASE} + sam"),
    "lat": Entry(f"{BASE} + lat:steps=4"),
    "ste": Entry(f"{BASE} + ste:formats=int4|nf4"),
    "gru": Entry(f"{BASE} + gru"),
    "quail": Entry(f"{BASE} + quail"),
    "floor": Entry(f"{BASE} + floor:format=int4"),
    "lora": Entry(f"{BASE} + lora", rates=ADAPTER_RATES),
    "sure": Entry(f"{BASE} + sure", rates=LARGE_RATES),
    "robust": Entry("robust"),
    "robust_slow": Entry("robust", rates=(SMALL_RATE,)),
}


@shown()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where the page goes")
    parser.add_argument("--no-page", action="store_true", help="measure only")
    arguments = parser.parse_args()
    loading.quiet()
    rates = choose_rates(arguments.out, arguments.methods)
    rows = [row for seed in arguments.seeds for row in measure(arguments.out, seed, arguments.methods, rates)]
    if not arguments.no_page:
        write_json(arguments.docs / "compare.json", rows)
        write_text(arguments.docs / "compare.md", page(rows))
        draw(rows, arguments.docs / "compare.png")


def benchmark_of(seed: int) -> Benchmark:
    """Return the demo's world: everything is trained on as there, and a sample of what is kept is measured."""
    world = bind("benchmark", f"world:seed={seed}")()
    forget, retain = world.split("forget"), world.split("retain")
    return replace(world, splits=(forget, sweep.sample(retain)), training=(forget, retain))


def taught(out: Path, seed: int) -> dict[str, Path]:
    """Train the original and the control of a seed, unless they are there."""
    models = {name: out / "models" / f"{name}-s{seed}" for name in (ORIGINAL, CONTROL)}
    demo.train_both(models, bind("benchmark", f"world:seed={seed}")(), replace(demo.TRAINING, seed=seed))
    return models


def run_of(name: str, rate: float, seed: int) -> Run:
    """Return the run of a method at a rate: to equal utility at its end."""
    entry = METHODS[name]
    spec = entry.method if entry.method == "robust" else f"{entry.method} + equal_retain:floor={FLOOR}"
    settings = replace(UNLEARNING, lr=rate, seed=seed, weights=entry.weights)
    return Run(f"{name}-{rate:g}-s{seed}".replace("e-0", "e-"), spec, settings)


def choose_rates(out: Path, names: Sequence[str]) -> dict[str, float]:
    """Return the rate at which each method keeps least, at worst over QUICK formats, on the world for choosing."""
    rates: dict[str, float] = {}
    for name in names:
        entry = METHODS[name]
        if len(entry.rates) == 1:
            [rates[name]] = entry.rates
            continue
        runs = [run_of(name, rate, TUNING_SEED) for rate in entry.rates]
        kept = {row["model"]: worst(row)[0] for row in audited(out, TUNING_SEED, runs, QUICK)}
        rates[name] = min(entry.rates, key=lambda rate: kept[run_of(name, rate, TUNING_SEED).name])
    return rates


def audited(out: Path, seed: int, runs: Sequence[Run], formats: str) -> list[Json]:
    """Unlearn by these runs, unless that is done, audit the results and return a row for each."""
    models, benchmark = taught(out, seed), benchmark_of(seed)
    request = audit.AuditConfig(str(models[ORIGINAL]), {}, benchmark, (str(models[CONTROL]),), formats, METRICS)
    subjects = {
        run.name: sweep.unlearn_once(run, models[ORIGINAL], benchmark, out / "models" / run.name) for run in runs
    }
    report = sweep.audited(request, subjects, out / f"s{seed}", "python examples/compare_methods.py")
    rows = sweep.rows(report, WANTED, {"seed": seed})
    return [row for row in rows if row["model"] in subjects]


def measure(out: Path, seed: int, names: Sequence[str], rates: dict[str, float]) -> list[Json]:
    """Return a row for each method: numbers in every format, and how the forgotten comes back when a part is taught."""
    runs = {run_of(name, rates[name], seed).name: name for name in names}
    rows = audited(out, seed, [run_of(name, rates[name], seed) for name in names], FORMATS)
    models = taught(out, seed)
    base = {name: relearned(out, seed, models[name]) for name in (ORIGINAL, CONTROL)}
    for row in rows:
        row["method"] = runs[row["model"]]
        curve = relearned(out, seed, out / "models" / row["model"])
        row["relearned"] = [
            sweep.rounded((u - c) / (o - c)) for u, o, c in zip(curve, base[ORIGINAL], base[CONTROL], strict=True)
        ]
    return rows


def relearned(out: Path, seed: int, folder: Path) -> list[float]:
    """Return the answer probability of the facts that are not taught, at each check; kept beside the audits."""
    path = out / "relearned" / f"{folder.name}.json"
    identity = digest(modelfiles.fingerprint(folder), repr(RELEARNING), seed)
    if path.is_file() and (saved := read_json(path))["key"] == identity:
        return saved["curve"]
    source, split = ModelRef.open(str(folder)), benchmark_of(seed).split("forget")
    subject = source.load()
    items = encode_split(split, subject.tokenizer, "{prompt}", source.context_length)
    curve = relearning_curve.curve(subject.model, without_end([item.answer for item in items]), RELEARNING)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"key": identity, "curve": curve})
    return curve


def worst(row: Json, name: str = KEPT) -> list[float]:
    """Return value and bounds in the format that keeps most."""
    cells = [cell for cell in row["cells"][f"forget {name}"].values() if not isinstance(cell, str)]
    return max(cells, key=lambda cell: cell[0])


def steps_to_breach(row: Json) -> int | None:
    """Return after how many steps more than BREACH of the gap is there again; None where it never is."""
    return next((i * RELEARNING.check_every for i, share in enumerate(row["relearned"]) if share > BREACH), None)


def summary(rows: Sequence[Json]) -> list[Json]:
    """Return the methods, best first, with means over seeds and the widest bounds of any seed."""
    found = []
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        full = [row["cells"][f"forget {KEPT}"][FULL] for row in own]
        at_worst, recovery = [worst(row) for row in own], [worst(row, RECOVERY) for row in own if recoverable(row)]
        retain = [row["cells"][f"retain {METRIC}.share"][FULL] for row in own]
        steps = [steps_to_breach(row) for row in own]
        found.append(
            {
                "method": name,
                "full": _pooled(full),
                "worst": _pooled(at_worst),
                "recovery": _pooled(recovery) if recovery else None,
                "retain": _pooled(retain),
                "steps": min((s for s in steps if s is not None), default=None),
                "relearned": statistics.mean(row["relearned"][-1] for row in own),
                "seconds": statistics.mean(row["run"]["seconds"] for row in own),
                "lr": own[0]["run"]["settings"]["lr"],
                "seeds": len(own),
            }
        )
    return sorted(found, key=rank)


def rank(entry: Json) -> tuple[bool, bool, float]:
    """Order methods: those that are clean in every format first, then those that keep enough, then by relearning."""
    return not is_clean(entry), entry["retain"][0] < FLOOR, entry["relearned"]


def recoverable(row: Json) -> bool:
    """Tell whether recovery was measured: a method that forgot nothing leaves nothing to recover."""
    return any(not isinstance(cell, str) for cell in row["cells"][f"forget {RECOVERY}"].values())


def _pooled(cells: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.mean(c[0] for c in cells), min(c[1] for c in cells), max(c[2] for c in cells)]


def page(rows: Sequence[Json]) -> str:
    """Return docs/compare.md."""
    entries = summary(rows)

    def cell(bounds: Sequence[float] | None) -> str:
        return "–" if bounds is None else f"{number(bounds[0])} ({number(bounds[1])} to {number(bounds[2])})"

    table = markdown_table(
        [
            *("method", "kept in full", "kept at worst", "recovery at worst", "retain"),
            "steps to breach",
            "relearned",
            "s",
            "seeds",
        ],
        [
            [
                e["method"],
                *(cell(e[name]) for name in ("full", "worst", "recovery", "retain")),
                str(e["steps"]) if e["steps"] is not None else f"> {RELEARNING.max_steps}",
                number(e["relearned"]),
                f"{e['seconds']:.0f}",
                str(e["seeds"]),
            ]
            for e in entries
        ],
    )
    used = markdown_table(
        ["method", "is", "weights", "lr"],
        [
            [e["method"], f"`{METHODS[e['method']].method}`", METHODS[e["method"]].weights, f"{e['lr']:g}"]
            for e in entries
        ],
    )
    seeds = sorted({row["seed"] for row in rows})
    return PAGE.format(
        table=table, used=used, seeds=", ".join(map(str, seeds)), formats=FORMATS.replace(",", ", "), floor=FLOOR,
        count=len(entries), breach=f"{BREACH:.0%}", steps=RELEARNING.max_steps, lr=f"{RELEARNING.lr:g}",
        robust=_on_robust(entries),
    )  # fmt: skip


def _on_robust(entries: Sequence[Json]) -> str:
    """Say of `robust` what was asked of it and what was seen."""
    [own] = [e for e in entries if e["method"] == "robust"] or [None]
    if own is None:
        return ""
    place = [e["method"] for e in entries].index("robust") + 1
    recovery, kept, retain = own["recovery"], own["worst"], own["retain"]
    asked = [
        ("recovery in its worst format is at most .05", recovery is not None and recovery[0] <= 0.05),
        ("its upper bound is at most .1 at every seed", recovery is not None and recovery[2] <= 0.1),
        ("it keeps no more than the control, in any format, within the bounds", kept[1] <= 0),
        (f"it keeps {FLOOR:.0%} of the retain score", retain[0] >= FLOOR),
    ]
    lines = "\n".join(f"- {'yes' if met else 'NO'}: {what}" for what, met in asked)
    return f"`robust` is number {place} of {len(entries)}.\n\n{lines}\n\n{_on_rates(entries)}"


def _on_rates(entries: Sequence[Json]) -> str:
    """Say what the learning rate does, from the methods that ran at two of them."""
    by_name = {e["method"]: e["relearned"] for e in entries}
    pairs = [(name, f"{name}_slow") for name in by_name if f"{name}_slow" in by_name]
    said = "; ".join(f"`{fast}` {number(by_name[fast])}, `{slow}` {number(by_name[slow])}" for fast, slow in pairs)
    near = sum(abs(value - by_name["robust"]) < SEED_NOISE for value in by_name.values()) - 1
    return (
        f"What relearning brings back depends on the learning rate more than on the method: {said}. {near} other "
        f"methods are within {SEED_NOISE} of `robust` there, which is about what seeds differ by, so that its place "
        "among them says little; what it holds besides is the retain score.\n"
    )


def draw(rows: Sequence[Json], path: Path) -> None:
    """Draw what is retained against what relearning brings back; the best in all three counts are set in bold."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entries = summary(rows)
    best = pareto([e for e in entries if is_clean(e)])
    figure, axes = plt.subplots(figsize=(10, 7))
    for marker, clean in (("o", True), ("x", False)):
        shown = [e for e in entries if is_clean(e) is clean]
        axes.scatter([e["retain"][0] for e in shown], [e["relearned"] for e in shown], marker=marker, s=30)
    for turn, e in enumerate(sorted(entries, key=lambda e: e["relearned"])):
        place = (5, 8 if turn % 2 else -12)
        weight, color = ("bold", "0") if e["method"] in best else ("normal", "0.35")
        text = f"{e['method']} ({e['seconds']:.0f} s)"
        at = e["retain"][0], e["relearned"]
        axes.annotate(text, at, place, textcoords="offset points", size=7, rotation=20, weight=weight, color=color)
    axes.axvline(FLOOR, color="0.8", linewidth=1, zorder=0)
    axes.set_yscale("symlog", linthresh=0.05)
    axes.set_xlabel("retain score, as a share of the original's (right is better)")
    axes.set_ylabel(f"share of untaught facts back after {RELEARNING.max_steps} steps on others (down is better)")
    axes.set_title(f"o: no more than {CLEAN:.0%} kept in any format; x: more; in brackets seconds to unlearn", size=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def is_clean(entry: Json) -> bool:
    """Tell whether the bounds exclude that more than CLEAN is kept in any format, at every seed."""
    return entry["worst"][2] <= CLEAN


def pareto(entries: Sequence[Json]) -> list[str]:
    """Return the methods that no other one beats in retain score, relearning and cost at once."""

    def costs(e: Json) -> tuple[float, float, float]:
        return -e["retain"][0], e["relearned"], e["seconds"]

    def beats(a: Json, b: Json) -> bool:
        return all(x <= y for x, y in zip(costs(a), costs(b), strict=True)) and costs(a) != costs(b)

    return [e["method"] for e in entries if not any(beats(other, e) for other in entries)]


if __name__ == "__main__":
    main()
