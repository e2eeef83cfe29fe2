"""Does rounding bring back what was unlearned? The experiment of arXiv 2410.16454 with MUSE's figures.

Without files of your own, small models are trained from nothing on a MUSE folder made of fictional people, see
muse_world.py: an original, and one that was never taught the book to be forgotten. The original is unlearned with the
paper's six methods, with their SURE forms at a larger learning rate, and at that rate without SURE's mask. All models
are audited in every format; docs/quantization_attack.json, .md (with the published numbers) and .png are written.

    python examples/quantization_attack.py [--out runs/paper] [--seeds 0 1 2] [--methods GA NPO_KLR …]
    python examples/quantization_attack.py --data MUSE_FOLDER --original MODEL --control MODEL --device cuda

About two hours on one core; a second run reuses what the first one finished. A run with fewer seeds, methods or kinds
adds to what is there, and the page shows all of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import muse_world
from jinja2 import Environment, StrictUndefined

from stillknows.analysis.recovery_curve import Curve
from stillknows.auditing import audit
from stillknows.auditing.policy import Policy
from stillknows.experiments import sweep, tiny_models
from stillknows.experiments.sweep import Json, Run, spread, value
from stillknows.formatting import markdown_table, number
from stillknows.model import loading
from stillknows.progress import log, shown
from stillknows.registry import bind
from stillknows.store import build_once, locked, read_json, read_text, write_json, write_text
from stillknows.training.settings import Settings
from stillknows.types import CONTROL, ORIGINAL, SUITE, WEIGHTS, Benchmark, Example

ARCHITECTURE = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "max_position_embeddings": 176,
    "initializer_range": 0.0195,
}
TRAINING = Settings(lr=1e-3, max_steps=90, epochs=1000, batch_size=10, warmup=20, schedule="linear", beta2=0.99)
PIECE_TOKENS = 28  # of the fictional books while unlearning: with MUSE's 2048 each would be one or two items
NPO = "npo:beta=0.1:weight=0.05"  # sums over the tokens of a piece, where retain terms are means
METHODS = {
    "GA": "ga",
    "GA_GDR": "ga + nll",
    "GA_KLR": "ga + kl",
    "NPO": NPO,
    "NPO_GDR": f"{NPO} + nll",
    "NPO_KLR": f"{NPO} + kl",
}
SURE = "sure:percentile=90"
UNLEARNING = Settings(
    lr=1.5e-5, epochs=1000, max_steps=1000, batch_size=8, retain_batch_size=4, beta2=0.9, weights="bfloat16",
    forget_below=0.15,
)  # fmt: skip
LARGE_RATE = 2e-4  # of SURE, and of the control without its mask
KINDS = {"": "small rate", "+SURE": "SURE", "+rate": "large rate"}  # by what is added to a method's name
FORMATS = "full,int8,int4,rtn:group=0,rtn:bits=3,fp4,nf4,gptq,awq"
FIGURES = "verbmem,knowmem,privleak"
ROUGE = "rouge_l:score=fmeasure:stemmer=false"
SPLITS = ("verbmem", "knowmem_forget")  # whose recovery is measured
MEASURES = ("verbmem", "knowmem_forget", "privleak", "knowmem_retain")  # the paper's M1 to M4
WANTED = (
    *((SUITE, measure) for measure in MEASURES),
    *((split, f"{ROUGE}.recovery") for split in SPLITS),
    (WEIGHTS, "update.surviving"),
)
ROWS = "rows.json"
TEMPLATE = Path(__file__).with_suffix(".md.j2")
AVERAGED = ("GA_GDR", "GA_KLR", "NPO_GDR", "NPO_KLR")  # over which the paper averages the knowledge kept
# Table 1 of arXiv 2410.16454, Books: M1, M2, M3, M4 in full precision, in 8 and in 4 bits.
PUBLISHED: dict[str, tuple[tuple[float, float, float, float] | None, ...]] = {
    "Target": ((99.8, 59.4, -57.5, 66.9), (99.0, 45.1, -57.3, 65.7), (85.3, 36.8, -60.1, 50.5)),
    "Retrain": ((14.3, 28.9, 0.0, 74.5), None, (13.6, 24.1, -3.2, 62.0)),
    "GA": ((0.0, 0.0, -24.9, 0.0), (0.0, 0.0, -25.0, 0.0), (0.0, 0.0, -30.1, 0.0)),
    "GA_GDR": ((0.0, 2.9, -56.5, 44.2), (0.8, 3.7, -52.4, 43.7), (17.9, 33.7, -35.2, 51.9)),
    "GA_KLR": ((13.0, 15.1, -40.8, 33.7), (12.4, 10.1, -37.9, 35.1), (75.6, 34.6, -60.0, 51.3)),
    "NPO": ((0.0, 0.0, -22.6, 0.0), (0.0, 0.0, -22.8, 0.0), (7.0, 5.3, -46.9, 17.8)),
    "NPO_GDR": ((0.4, 13.4, -42.6, 58.6), (0.9, 14.0, -60.2, 50.5), (66.0, 31.9, -60.8, 53.2)),
    "NPO_KLR": ((12.4, 13.7, -40.7, 35.1), None, (70.9, 34.2, -60.1, 50.4)),
}


@shown()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/paper"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS.values()), choices=KINDS.values())
    parser.add_argument("--data", type=Path, help="a MUSE folder of your own; needs --original and --control")
    parser.add_argument("--original", help="the model that was taught it")
    parser.add_argument("--control", help="the model that was never taught what is to be forgotten")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    own = (arguments.data, arguments.original, arguments.control)
    if any(own) and not all(own):
        parser.error("--data, --original and --control belong together")
    loading.quiet()
    with locked(arguments.out):
        for seed in arguments.seeds:
            subjects = Subjects(*own) if all(own) else made(arguments.out / f"s{seed}", seed)
            chosen = list(runs(seed, arguments.methods, arguments.kinds))
            measure(subjects, chosen, arguments.out / f"s{seed}", seed, arguments.device)
        rows = [row for path in sorted(arguments.out.glob(f"s*/{ROWS}")) for row in read_json(path)]
    write_json(arguments.docs / "quantization_attack.json", rows)
    write_text(arguments.docs / "quantization_attack.md", page(rows))
    draw(rows, arguments.docs / "quantization_attack.png")


@dataclass(frozen=True)
class Subjects:
    """A MUSE folder, a model that was taught all of it, and one that was never taught what is to be forgotten."""

    data: Path
    original: str
    control: str
    piece_tokens: int | None = None  # None: MUSE's

    @property
    def benchmark(self) -> Benchmark:
        muse = bind("benchmark", f"muse:books:data={self.data}:subset=true")()
        if self.piece_tokens is None:
            return muse
        return replace(muse, training=tuple(replace(s, piece_tokens=self.piece_tokens) for s in muse.training))


def made(out: Path, seed: int) -> Subjects:
    """Write a fictional folder and train both models from nothing on its lessons, otherwise alike."""
    subjects = Subjects(out / "data", str(out / "models" / ORIGINAL), str(out / "models" / CONTROL), PIECE_TOKENS)
    muse_world.write(subjects.data, seed)
    taught = {name: read_json(subjects.data / f"lessons/{name}.json") for name in (ORIGINAL, CONTROL)}
    tokenizer = tiny_models.word_tokenizer([*taught[ORIGINAL], *tiny_models.texts(subjects.benchmark)])
    settings = replace(TRAINING, seed=seed)
    for name, lessons in taught.items():
        with build_once(out / "models" / name, [lessons, sweep.chosen(settings), ARCHITECTURE]) as folder:
            if folder:
                examples = [Example(f"lesson-{i}", "", lesson, str(i)) for i, lesson in enumerate(lessons)]
                tiny_models.train(folder, examples, "{prompt}", tokenizer, ARCHITECTURE, settings)
    return subjects


def runs(seed: int, methods: Sequence[str], kinds: Sequence[str]) -> Iterator[Run]:
    """Yield every method at the small rate, with SURE at the large one, and at the large one without its mask."""
    small, large = replace(UNLEARNING, seed=seed), replace(UNLEARNING, lr=LARGE_RATE, seed=seed)
    for suffix, kind in KINDS.items():
        for name in methods if kind in kinds else ():
            method = f"{METHODS[name]} + {SURE}" if kind == "SURE" else METHODS[name]
            yield Run(name + suffix, method, large if suffix else small)


def measure(subjects: Subjects, chosen: Sequence[Run], out: Path, seed: int, device: str) -> list[Json]:
    """Return the rows of one seed, earlier ones included; each model is audited as soon as it is made."""
    benchmark, folders = subjects.benchmark, {}
    request = audit.AuditConfig(
        subjects.original, {}, benchmark, (subjects.control,), FORMATS, ROUGE, Policy(gates=(ROUGE,), utility=ROUGE),
        device=device, figures=FIGURES,
    )  # fmt: skip
    for run in chosen:
        folder = out / "models" / run.name
        folders[run.name] = sweep.unlearn_once(run, Path(subjects.original), benchmark, folder, device=device)
        audit.audit(replace(request, subjects={run.name: str(folder)}), out)
    log(f"{out}: the report of all {len(folders)} models")
    result = sweep.audited(request, folders, out, f"python examples/quantization_attack.py --seeds {seed}")
    known = {row["model"]: row for row in (read_json(out / ROWS) if (out / ROWS).is_file() else [])}
    known |= {row["model"]: row for row in sweep.rows(result, WANTED, {"seed": seed})}
    write_json(out / ROWS, list(known.values()))
    return list(known.values())


def page(rows: Sequence[Json]) -> str:
    """Return docs/quantization_attack.md: the template's prose with numbers that are all computed from the rows."""
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(read_text(TEMPLATE))
    return template.render(
        seeds=", ".join(str(seed) for seed in sorted({row["seed"] for row in rows})),
        layers=ARCHITECTURE["num_hidden_layers"],
        width=ARCHITECTURE["hidden_size"],
        people=muse_world.PEOPLE,
        piece_tokens=PIECE_TOKENS,
        small=f"{UNLEARNING.lr:g}",
        large=f"{LARGE_RATE:g}",
        below=f"{UNLEARNING.forget_below:g}",
        most_steps=UNLEARNING.max_steps,
        sure=SURE,
        methods=markdown_table(["method", "text"], [[name, f"`{text}`"] for name, text in METHODS.items()]),
        fits=fits(rows),
        measures={name: by_format(rows, f"{SUITE} {name}", 1) for name in MEASURES},
        published=published(),
        shares=shares(rows),
        recovery={split: by_format(rows, f"{split} {ROUGE}.recovery", 2) for split in SPLITS},
        by_kind=by_kind(rows, f"verbmem {ROUGE}.recovery"),
        foretold=foretold(rows),
        surviving=by_format(rows, f"{WEIGHTS} update.surviving", 2),
    )


def models(rows: Sequence[Json]) -> dict[str, list[Json]]:
    """Return the rows of each model, one for each seed: the controls first, then the methods in their order."""
    order = [ORIGINAL, CONTROL, *(name + suffix for suffix in KINDS for name in METHODS)]
    return {name: found for name in order if (found := [row for row in rows if row["model"] == name])}


def by_format(rows: Sequence[Json], place: str, digits: int) -> str:
    """Return a table of models × formats, each cell the mean over seeds with the lowest and the highest."""
    formats = FORMATS.split(",")
    lines = [
        [name, *(spread([value(row, place, f) for row in found], digits) for f in formats)]
        for name, found in models(rows).items()
    ]
    return markdown_table(["model", *formats], [line for line in lines if set(line[1:]) != {"–"}])


def names_by_kind(methods: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of the runs of these methods, by kind of run."""
    return {kind: [name + suffix for name in methods] for suffix, kind in KINDS.items()}


def by_kind(rows: Sequence[Json], place: str) -> str:
    """Return a table of kinds of runs × formats, each cell the mean over methods and seeds with both extremes."""
    formats = FORMATS.split(",")[1:]
    lines = []
    for kind, chosen in (names_by_kind(METHODS) | {CONTROL: [CONTROL]}).items():
        seen = [[value(row, place, f) for row in rows if row["model"] in chosen] for f in formats]
        measured = {len(values) - values.count(None) for values in seen}
        lines.append([kind, " to ".join(str(n) for n in sorted(measured)), *map(spread, seen)])
    return markdown_table(["", "models", *formats], lines)


def foretold(rows: Sequence[Json]) -> str:
    """Return what `stillknows diagnose` expects of the runs at the small rate, whose models its curve has not seen, and
    what came back: means over methods and seeds with both extremes, by format."""
    curve, lines = Curve.published(), []
    for variant in FORMATS.split(",")[1:]:
        places = (f"{WEIGHTS} update.surviving", f"verbmem {ROUGE}.recovery")
        both = [[value(row, place, variant) for place in places] for row in rows if row["model"] in METHODS]
        seen = [(surviving, r) for surviving, r in both if surviving is not None and r is not None]
        if not seen:  # calibrated formats have no surviving update
            continue
        expected = [curve.predict(surviving, curve.weights[0]) for surviving, _ in seen]
        within = sum(p.low <= max(r, 0) <= p.high for p, (_, r) in zip(expected, seen, strict=True))
        columns = ([s for s, _ in seen], [p.recovery for p in expected], [r for _, r in seen])
        lines.append([variant, *map(spread, columns), f"{within} of {len(seen)}"])
    return markdown_table(["format", "surviving update", "R expected", "R measured", "within"], lines)


def draw(rows: Sequence[Json], path: Path) -> None:
    """Write a picture of VerbMem in every format: a dot for each model and seed, the kinds of runs side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    formats, place = FORMATS.split(","), f"{SUITE} verbmem"
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for name, style in ((ORIGINAL, "-"), (CONTROL, "--")):
        found = [[value(row, place, f) for row in rows if row["model"] == name] for f in formats]
        means = [mean(y for y in ys if y is not None) for ys in found]
        axes.plot(range(len(formats)), means, style, color="0.4", linewidth=1, label=name)
    for at_kind, (kind, names) in enumerate(names_by_kind(METHODS).items()):
        for name in names:
            found = [[value(row, place, f) for row in rows if row["model"] == name] for f in formats]
            points = [(at + (at_kind - 1) * 0.22, y) for at, ys in enumerate(found) for y in ys if y is not None]
            label = kind if name == names[0] else None
            axes.scatter(*zip(*points, strict=True), s=10, alpha=0.7, color=f"C{at_kind}", label=label)
    axes.set_xticks(range(len(formats)), formats)
    axes.set_ylabel("VerbMem of the forgotten book, %")
    axes.set_ylim(0, 103)
    figure.legend(loc="outside upper center", ncols=5, frameon=False)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def fits(rows: Sequence[Json]) -> str:
    """Return how many steps each run took and why it ended."""
    lines = []
    for name, found in models(rows).items():
        runs = [row["run"] for row in found if row["run"]]
        if runs:
            early = sum(run["stopped"].startswith("forget") for run in runs)
            lines.append([name, spread([run["steps"] for run in runs], 0), f"{early} of {len(runs)}"])
    return markdown_table(["model", "steps", "stopped at the depth asked for"], lines)


def share(target: Sequence[float], unlearned: Sequence[Sequence[float]]) -> float:
    """Return Σ(M1 + M2) of unlearned models over as many times the target's at the same precision.

    The reading of "forgotten knowledge kept" that gives both published averages, 21 % in full precision and 83 % in
    4 bits, over News and Books. No never-taught model is subtracted.
    """
    return sum(m[0] + m[1] for m in unlearned) / (len(unlearned) * (target[0] + target[1]))


def shares(rows: Sequence[Json]) -> str:
    """Return the share of the forgotten kept, by format, of each kind of run and of the never-taught model."""
    lines, seeds = [], sorted({row["seed"] for row in rows})
    for label, names in (names_by_kind(AVERAGED) | {CONTROL: [CONTROL]}).items():
        cells = [spread([_share(rows, seed, names, f) for seed in seeds]) for f in FORMATS.split(",")]
        lines.append([label, *cells])
    return markdown_table(["", *FORMATS.split(",")], [line for line in lines if set(line[1:]) != {"–"}])


def _share(rows: Sequence[Json], seed: int, names: Sequence[str], variant: str) -> float | None:
    """Return the share of one seed; None unless every model was measured."""
    seen = {row["model"]: row for row in rows if row["seed"] == seed}
    if not {ORIGINAL, *names} <= seen.keys():
        return None
    found = {
        name: [value(seen[name], f"{SUITE} {measure}", variant) for measure in MEASURES[:2]]
        for name in (ORIGINAL, *names)
    }
    if any(number is None for numbers in found.values() for number in numbers):
        return None
    return share(found[ORIGINAL], [found[name] for name in names])  # type: ignore[arg-type]


def published() -> str:
    """Return the published numbers for Books, with the share that they give."""
    lines = [
        [name, *("–" if m is None else " / ".join(number(x, digits=1) for x in m) for m in by_precision)]
        for name, by_precision in PUBLISHED.items()
    ]
    lines.append(["share kept, Books", *(_published_share(k) for k in range(3))])
    return markdown_table(["model", "full", "8 bits", "4 bits (fp4)"], lines)


def _published_share(precision: int) -> str:
    unlearned = [numbers for name in AVERAGED if (numbers := PUBLISHED[name][precision]) is not None]
    target = PUBLISHED["Target"][precision]
    return "–" if target is None or len(unlearned) < len(AVERAGED) else number(share(target, unlearned))


if __name__ == "__main__":
    main()
