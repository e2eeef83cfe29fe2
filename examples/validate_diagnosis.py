"""Does the surviving update tell how much comes back? Tested on audited models; writes what `diagnose` predicts with.

    python examples/validate_diagnosis.py [AUDIT …] [--docs docs]

Reads report.json in the folders of audits, by default those of `examples/diagnosis_models.py`,
`examples/demo_seeds.py` and `examples/why.py`; a model that several audits hold counts once. Writes docs/diagnose.json
(every pair of model and format), docs/diagnose.md and docs/diagnose.svg made of it, and the curve,
stillknows/analysis/recovery_curve.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import spearmanr

from stillknows.analysis.recovery_curve import FILE, SURVIVES, Curve, fit, held_out
from stillknows.errors import UserError
from stillknows.formatting import markdown_table, number
from stillknows.reporting import report
from stillknows.stats import LEVEL, bootstrap_counts, bounds
from stillknows.store import write_json, write_text
from stillknows.types import CONTROL, FULL, ORIGINAL, WEIGHTS, Floats

AUDITS = [Path("runs") / name for name in ("diagnosis/0", *(f"seeds/{seed}" for seed in range(5)))]
AUDITS += [Path(f"runs/why/{part}-s{seed}") for part in ("key", "more") for seed in range(3)]
FORGET, METRIC = "forget", "answer_probability"
LEAST_PAIRS = 60
PLOT = 400
MARGIN = 45


class Pair(NamedTuple):
    """A model in a format: what is left of its update, and how much of what it forgot the format brings back."""

    original: str
    model: str
    format: str
    weights: int
    surviving: float
    crossing: float
    recovery: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("audits", type=Path, nargs="*", default=AUDITS)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    pairs = collect(report.read(folder).to_json() for folder in arguments.audits if (folder / report.JSON).is_file())
    if len(pairs) < LEAST_PAIRS or len({pair.original for pair in pairs}) < 3:
        raise UserError(
            f"{len(pairs)} pairs of model and format were found, {LEAST_PAIRS} of three originals are needed",
            "python examples/demo_seeds.py && python examples/diagnosis_models.py && python examples/why.py",
        )
    write_json(arguments.docs / "diagnose.json", [pair._asdict() for pair in pairs])
    write_text(arguments.docs / "diagnose.md", page(pairs))
    write_text(arguments.docs / "diagnose.svg", plot(pairs))
    write_json(Path("stillknows/analysis") / FILE, curve(pairs).to_json())


def collect(reports: Iterable[dict[str, Any]]) -> list[Pair]:
    """Return the pairs for which both the update's fate and the recovery were measured."""
    pairs: dict[tuple[str, str], Pair] = {}
    originals: dict[str, str] = {}
    models: dict[str, str] = {}  # names by fingerprint, the first where audits name a model differently
    for audit in reports:
        subjects = {subject["name"]: subject for subject in audit["subjects"]}
        original = originals.setdefault(subjects[ORIGINAL]["fingerprint"], f"original {len(originals)}")
        for name, subject in subjects.items():
            if name in (ORIGINAL, CONTROL):
                continue
            model = models.setdefault(subject["fingerprint"], name)
            for pair in _pairs(subject, original, model, audit["variants"]):
                pairs.setdefault((subject["fingerprint"], pair.format), pair)
    return list(pairs.values())


def _pairs(subject: dict[str, Any], original: str, model: str, variants: list[str]) -> Iterator[Pair]:
    cells = {(c["variant"], c["split"], c["metric"]): c for c in subject["cells"] if "value" in c}
    for variant in variants:
        surviving, crossing = (cells.get((variant, WEIGHTS, f"update.{name}")) for name in ("surviving", "crossing"))
        recovery = cells.get((variant, FORGET, f"{METRIC}.recovery"))
        if variant != FULL and surviving and crossing and recovery:
            values = (round(cell["value"], 6) for cell in (surviving, crossing, recovery))
            yield Pair(original, model, variant, surviving["n"], *values)


def column(pairs: list[Pair], name: str) -> Floats:
    return np.array([getattr(pair, name) for pair in pairs], dtype=np.float64)


def brought_back(pairs: list[Pair]) -> Floats:
    """Return R where it is above 0; where rounding makes models forget more, it brings nothing back."""
    return np.maximum(column(pairs, "recovery"), 0)


def curve(pairs: list[Pair]) -> Curve:
    """Return the curve that is fitted to the pairs."""
    originals, weights = [pair.original for pair in pairs], [pair.weights for pair in pairs]
    return fit(column(pairs, "surviving"), brought_back(pairs), originals, weights)


def correlation(pairs: list[Pair], feature: str) -> tuple[float, float, float]:
    """Return Spearman's rank correlation of a feature with R, with bounds at LEVEL each from resampled models."""
    x, y = (column(pairs, name) for name in (feature, "recovery"))
    drawn = bootstrap_counts([f"{pair.original} {pair.model}" for pair in pairs])
    resampled = _correlations_of(_ranks(x, drawn), _ranks(y, drawn), drawn)
    found: Any = spearmanr(x, y)
    return float(found.statistic), *bounds(resampled, LEVEL)


def _ranks(values: Floats, drawn: Floats) -> Floats:
    """Return the rank of each value in each resample, ties sharing their mean: [RESAMPLES, n]."""
    _, which = np.unique(values, return_inverse=True)
    counts = drawn @ np.eye(which.max() + 1)[which]
    return (counts.cumsum(1) - (counts - 1) / 2)[:, which]


def _correlations_of(x: Floats, y: Floats, drawn: Floats) -> Floats:
    """Return the correlation of the drawn rows in each resample, NaN where all of them are alike."""
    x, y = (values - (values * drawn).sum(1, keepdims=True) / drawn.sum(1, keepdims=True) for values in (x, y))
    with np.errstate(invalid="ignore"):
        return (drawn * x * y).sum(1) / np.sqrt((drawn * x**2).sum(1) * (drawn * y**2).sum(1))


def page(pairs: list[Pair]) -> str:
    """Return docs/diagnose.md."""
    models = sorted({(pair.original, pair.model) for pair in pairs})
    formats = list(dict.fromkeys(pair.format for pair in pairs))
    found = curve(pairs)
    lossy = [pair for pair in pairs if pair.surviving < SURVIVES]
    parts = [
        "# What `stillknows diagnose` predicts, and how well\n",
        "Made by `python examples/validate_diagnosis.py`; no number here was typed by hand.\n",
        f"{len(pairs)} pairs of model and format: {len(models)} models unlearned from",
        f"{len({pair.original for pair in pairs})} originals, in {len(formats)} formats. All are models of",
        f"{found.weights[0]:,} to {found.weights[1]:,} quantized weights with one decoder block, trained on a",
        "fictional world; nothing here was measured on a large model. Recovery R is the share of what full precision",
        "forgot that a format brings back (0 nothing, 1 all of it), in mean probability of the forgotten answers; the",
        "surviving update is ⟨Q(θu) − Q(θo), θu − θo⟩ / ‖θu − θo‖², from the weights alone.\n",
        "![recovery against surviving update](diagnose.svg)\n",
        "## Rank correlation with recovery\n",
        "Spearman's, bounds at 95 % each from resampled models.\n",
        _correlations(pairs, lossy),
        "\n## The prediction\n",
        "The falling curve nearest to all pairs in least squares (isotonic regression), R below 0 counted as 0, and",
        "how far measured recovery lies below and above a curve that was fitted without any model of its original:",
        "what bounds a prediction, at 95 % each, by the original whose pairs lie the furthest off. It is what was seen",
        f"of {len({pair.original for pair in pairs})} originals, not a bound for any model.\n",
        markdown_table(["surviving", "R"], [[f"{s:.3f}", number(r)] for s, r in found.knots]),
        "",
        _errors(pairs, found),
        "\n## The largest errors\n",
        _largest(pairs),
        "\n## Every pair\n",
        "Surviving update → recovery R.\n",
        _every(pairs, models, formats),
    ]
    return "\n".join(parts) + "\n"


def _correlations(pairs: list[Pair], lossy: list[Pair]) -> str:
    rows = []
    for name, chosen in ((f"all {len(pairs)}", pairs), (f"the {len(lossy)} with surviving < {SURVIVES}", lossy)):
        for feature in ("surviving", "crossing"):
            value, low, high = correlation(chosen, feature)
            rows.append([name, feature, number(value), f"{number(low)} to {number(high)}"])
    return markdown_table(["pairs", "of R with", "Spearman", "bounds"], rows)


def _errors(pairs: list[Pair], found: Curve) -> str:
    surviving, recovery = column(pairs, "surviving"), brought_back(pairs)
    errors = recovery - held_out(surviving, recovery, [pair.original for pair in pairs])
    rows = []
    for error, end in zip(found.errors, [*(error.start for error in found.errors[1:]), None], strict=True):
        low, high = -np.inf if error.start is None else error.start, np.inf if end is None else end
        mean = np.abs(errors[(surviving >= low) & (surviving < high)]).mean()
        name = f"{'' if error.start is None else f'from {error.start}'} {'' if end is None else f'below {end}'}".strip()
        rows.append([name, str(error.pairs), number(mean), number(error.low), number(error.high)])
    return markdown_table(["surviving", "pairs", "mean absolute error", "low", "high"], rows)


def _largest(pairs: list[Pair], shown: int = 10) -> str:
    recovery = brought_back(pairs)
    predicted = held_out(column(pairs, "surviving"), recovery, [pair.original for pair in pairs])
    order = np.argsort(-np.abs(recovery - predicted), kind="stable")[:shown]
    rows = [
        [p.original, p.model, p.format, number(p.surviving), number(float(predicted[i])), number(p.recovery)]
        for i, p in ((i, pairs[i]) for i in order.tolist())
    ]
    return markdown_table(["of", "model", "format", "surviving", "predicted R", "measured R"], rows)


def _every(pairs: list[Pair], models: list[tuple[str, str]], formats: list[str]) -> str:
    found = {(p.original, p.model, p.format): f"{number(p.surviving)} → {number(p.recovery)}" for p in pairs}
    rows = [[*model, *(found.get((*model, name), "–") for name in formats)] for model in models]
    return markdown_table(["of", "model", *formats], rows)


def plot(pairs: list[Pair]) -> str:
    """Return the pairs and the curve as SVG: surviving shares from 0 to the largest, R from 0 to 1 and beyond as far as
    it was measured."""
    most, recovery = max(1.0, float(column(pairs, "surviving").max())), column(pairs, "recovery")
    least_r, most_r = min(-0.1, float(recovery.min())), max(1.1, float(recovery.max()))

    def x(surviving: float) -> str:
        return f"{MARGIN + PLOT * min(max(surviving, 0) / most, 1):.1f}"

    def y(recovery: float) -> str:
        return f"{MARGIN / 2 + PLOT * (most_r - recovery) / (most_r - least_r):.1f}"

    side = PLOT + 2 * MARGIN
    dots = [f'<circle cx="{x(p.surviving)}" cy="{y(p.recovery)}" r="3"/>' for p in pairs]
    line = " ".join(f"{x(s)},{y(r)}" for s, r in curve(pairs).knots)
    ticks = [f'<text x="{x(v)}" y="{side - 22}" text-anchor="middle">{v:g}</text>' for v in np.arange(0, most, 0.5)]
    ticks += [f'<text x="{MARGIN - 8}" y="{y(v)}" text-anchor="end" dy="4">{v:g}</text>' for v in (0, 0.5, 1)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}" font-family="sans-serif">',
            f'<rect width="{side}" height="{side}" fill="#fff"/>',
            f'<path d="M{x(0)} {y(0)}H{x(most)}M{x(0)} {y(1)}H{x(most)}" stroke="#ccc"/>',
            f'<g fill="#0b6fa4" fill-opacity=".35">{"".join(dots)}</g>',
            f'<polyline points="{line}" fill="none" stroke="#c2410c" stroke-width="2"/>',
            *ticks,
            f'<text x="{side / 2}" y="{side - 4}" text-anchor="middle">surviving update</text>',
            f'<text x="14" y="{side / 2}" text-anchor="middle" transform="rotate(-90 14 {side / 2})">recovery R</text>',
            "</svg>\n",
        ]
    )


def load(path: Path) -> list[Pair]:
    """Return the pairs that docs/diagnose.json holds."""
    return [Pair(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


if __name__ == "__main__":
    main()
