"""Recovery to expect from what a format leaves of an update: a curve through measured models, with its errors.

`examples/validate_diagnosis.py` fits the curve and writes it to recovery_curve.json; it is no better than the
models that it was fitted to, and says so of models unlike them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stillknows.stats import LEVEL
from stillknows.types import Floats

FILE = "recovery_curve.json"
LOST, SURVIVES = 0.1, 0.9  # surviving shares between which errors of the curve are told apart
GAP = 0.1  # of surviving shares without a measured model, beyond which the line between its ends is a guess
ROUNDED = 6  # digits of knots and errors
MILLION = 1e6


class Error(NamedTuple):
    """How far measured recovery lay below (`low`) and above (`high`) the curve for surviving shares from `start` up to
    the next start: bounds at LEVEL each, from the `pairs` of models that the curve was not fitted to."""

    start: float | None
    low: float
    high: float
    pairs: int


class Prediction(NamedTuple):
    """Recovery R with bounds at LEVEL each; `outside` says in what respect nothing like it was measured, or is None."""

    recovery: float
    low: float
    high: float
    outside: str | None


@dataclass(frozen=True)
class Curve:
    """Recovery R as a falling function of the surviving share.

    knots: surviving shares, rising, and R at each; linear between them.
    errors: by surviving share, rising.
    weights: least and most weights, quantized by the format, of the models that it was fitted to.
    """

    knots: tuple[tuple[float, float], ...]
    errors: tuple[Error, ...]
    weights: tuple[int, int]

    @classmethod
    def published(cls) -> Curve:
        """Return the curve that comes with the package."""
        return cls.from_json(json.loads(files("stillknows.analysis").joinpath(FILE).read_text(encoding="utf-8")))

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Curve:
        knots = tuple((surviving, recovery) for surviving, recovery in saved["knots"])
        return cls(knots, tuple(Error(**error) for error in saved["errors"]), tuple(saved["weights"]))

    def to_json(self) -> dict[str, Any]:
        return {
            "knots": [list(knot) for knot in self.knots],
            "errors": [error._asdict() for error in self.errors],
            "weights": list(self.weights),
        }

    def at(self, surviving: Floats) -> Floats:
        """Return R [n] for surviving shares [n]; beyond the first and last knot, theirs."""
        return np.interp(surviving, *np.transpose(self.knots))

    def predict(self, surviving: float, weights: int) -> Prediction:
        """Return the recovery to expect.

        Args:
            surviving: share of the update that the format leaves; see `tally`.
            weights: how many weights the format quantizes.
        """
        recovery = float(self.at(np.array([surviving]))[0])
        error = [e for e in self.errors if e.start is None or surviving >= e.start][-1]
        return Prediction(recovery, recovery + error.low, recovery + error.high, self._outside(surviving, weights))

    def _outside(self, surviving: float, weights: int) -> str | None:
        (first, _), (last, _) = self.knots[0], self.knots[-1]
        reasons = []
        gaps = [(a, b) for (a, high), (b, low) in pairwise(self.knots) if b - a > GAP and high != low]
        if not first <= round(surviving, ROUNDED) <= last:
            reasons.append(f"{surviving:.2f} of the update survives, measured were {first:.2f} to {last:.2f}")
        elif gap := next(((a, b) for a, b in gaps if a < surviving < b), None):
            reasons.append(
                f"{surviving:.2f} of the update survives, none was measured from {gap[0]:.2f} to {gap[1]:.2f}"
            )
        if not self.weights[0] <= weights <= self.weights[1]:
            sizes = " to ".join(f"{n / MILLION:.3g}" for n in self.weights)
            reasons.append(f"{weights / MILLION:.3g} million weights are quantized, measured were {sizes} million")
        return "; ".join(reasons) or None


def fit(surviving: Floats, recovery: Floats, originals: Sequence[str], weights: Sequence[int]) -> Curve:
    """Return the falling curve that is nearest to measured pairs in least squares, with errors of `held_out` curves.

    Args:
        surviving, recovery: measured pairs [n].
        originals: the original model that each pair's unlearned model was made of.
        weights: how many weights were quantized.
    """
    errors, names = recovery - held_out(surviving, recovery, originals), np.asarray(originals)
    starts = (None, LOST, SURVIVES)
    zones = np.digitize(surviving, starts[1:])
    found = tuple(
        Error(start, *_bounds(errors[zones == i], names[zones == i])) for i, start in enumerate(starts) if i in zones
    )
    return Curve(_falling(surviving, recovery), found, (min(weights), max(weights)))


def held_out(surviving: Floats, recovery: Floats, originals: Sequence[str]) -> Floats:
    """Return for each pair [n] the recovery on a curve fitted to the pairs of all other originals (two at least)."""
    predicted = np.empty_like(recovery)
    names = np.asarray(originals)
    for name in np.unique(names):
        is_out = names == name
        knots = _falling(surviving[~is_out], recovery[~is_out])
        predicted[is_out] = np.interp(surviving[is_out], *np.transpose(knots))
    return predicted


def _falling(surviving: Floats, recovery: Floats) -> tuple[tuple[float, float], ...]:
    """Return the ends of the pieces on which the least-squares falling function is constant (isotonic regression)."""
    from scipy.optimize import isotonic_regression

    shares, which = np.unique(surviving, return_inverse=True)
    counts = np.bincount(which)
    means = np.bincount(which, recovery) / counts
    blocks = isotonic_regression(means, weights=counts, increasing=False).blocks
    ends = [(first, last - 1) for first, last in pairwise(blocks.tolist())]
    heights = [float(np.average(means[a : b + 1], weights=counts[a : b + 1])) for a, b in ends]
    return tuple(
        (round(float(shares[i]), ROUNDED), round(height, ROUNDED))
        for (a, b), height in zip(ends, heights, strict=True)
        for i in dict.fromkeys((a, b))
    )


def _bounds(errors: Floats, originals: NDArray[np.str_]) -> tuple[float, float, int]:
    """Return the widest of the bounds that each original's errors give: pairs of one original are alike, and the
    easiest may have most of them. What an original gives is the ⌈(n + 1)·LEVEL⌉th of its n errors from either end,
    which a further one like them exceeds with probability 1 − LEVEL, or the outermost of too few."""
    ends = []
    for name in np.unique(originals):
        ordered = np.sort(errors[originals == name])
        n = len(ordered)
        rank = min(n, math.ceil((n + 1) * LEVEL - 1e-9))
        ends.append((ordered[n - rank], ordered[rank - 1]))
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    return round(float(low), ROUNDED), round(float(high), ROUNDED), len(errors)
