"""A learning rate found on the model itself: how large steps may be before what must stay suffers.

A range test (Smith, arXiv 1506.01186): one short run in which the rate rises from step to step, on the method's own
terms. The weights are put back afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from stillknows.lazy import nn
from stillknows.model.encoding import EncodedAnswer
from stillknows.model.forward import mean_probability, score_items
from stillknows.model.layers import output_layer
from stillknows.model.parameters import Snapshot, restored
from stillknows.training import language
from stillknows.training.cost import CostMeter
from stillknows.training.loop import fit
from stillknows.training.objective_inputs import Term
from stillknows.training.settings import Settings
from stillknows.training.watch import Seen, Watch

LARGEST_RATE = 1e-1
PER_DECADE = 6  # steps in which the rate rises tenfold
STEPS = 4 * PER_DECADE
WATCHED = 64  # items to retain that are looked at after every step
SUFFERS = 0.9  # of their score at the start: below it a rate is too large for a run
STEADY = 0.98  # of what a model says of questions, which nothing brings back in a run
LANGUAGE_MARGIN = 8.0  # by which the rate of a run lies below the first one at which that suffers
MARGIN = 2.0  # by which the rate of a run lies below the first one that is too large


class RangeTest(NamedTuple):
    """The rate that a run may begin with, what was seen at each rate that was tried, and what it cost.

    trials: pairs of a rate and the share of the retain score that was left after a step with it, 0..1 or more.
    """

    lr: float
    trials: tuple[tuple[float, float], ...]
    seconds: float
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """Return it as a run's record holds it."""
        return self._asdict()


def range_test(
    model: nn.Module, terms: Sequence[Term], settings: Settings, retain: Sequence[EncodedAnswer], **how: Any
) -> RangeTest:
    """Return the largest learning rate that leaves the retain score as it is, with a margin; the weights stay.

    One run of STEPS steps in which the rate rises from LEAST_RATE to LARGEST_RATE ends at the first rate after which
    less than SUFFERS of the retain items' mean answer probability is left, or of the most that it was until then: items
    that the model hardly knew are learned on the way; or less than STEADY of what a model that reads language says of
    their questions, see `language`. The result is MARGIN times smaller than that rate; in the last case
    LANGUAGE_MARGIN times, as what a single step hardly touches may be lost over many.

    Args:
        terms: as of `fit`; `settings`: of the run to come, of which batch sizes and seed are taken.
        retain: items that must stay; without any the loss alone ends the test, which finds larger rates.
        how: further arguments of `fit`, such as `step_plugins` and `teachers`.
    """
    watched = retain[:: max(1, len(retain) // WATCHED)][:WATCHED]
    ramp = replace(
        settings, lr=LARGEST_RATE, schedule="ramp", warmup=0, max_steps=STEPS, epochs=1e9, check_every=1,
        forget_below=0.0, retain_floor=0.0,
    )  # fmt: skip
    with restored(model, Snapshot(model)), CostMeter(model) as meter:
        done = fit(model, terms, ramp, watch=_Suffering(model, watched), label="trying learning rates", **how)
    trials = tuple((ramp.rate(step, STEPS), seen["kept"]) for step, seen in enumerate(done.history))
    margin = MARGIN if done.history[-1]["language"] >= STEADY else LANGUAGE_MARGIN
    return RangeTest(trials[-1][0] / margin, trials, meter.seconds, meter.tokens)


class _Suffering(Watch):
    """Ends a run when too little is left of what is to stay, or of what training has made of it by then."""

    def __init__(self, model: nn.Module, kept: Sequence[EncodedAnswer]) -> None:
        self.model, self.items = model, {"kept": kept, "language": language.questions(model, kept)}
        self.start, self.most = {name: self._score(name) for name in self.items}, 1.0

    def look(self) -> Seen:
        seen = {name: self._score(name) / start if start else 1.0 for name, start in self.start.items()}
        self.most = max(self.most, seen["kept"])
        return seen

    def enough(self, seen: Seen) -> str:
        if seen["kept"] < SUFFERS * self.most:
            return "the retain score suffers"
        return "" if seen["language"] >= STEADY else "language suffers"

    def note(self, loss: float, history: Sequence[Seen]) -> str:
        return f"retain {history[-1]['kept']:.2f} of the original's"

    def _score(self, name: str) -> float:
        items = self.items[name]
        found = score_items(self.model, output_layer(self.model), items, with_distribution=())
        return mean_probability(found) if items else 0.0
