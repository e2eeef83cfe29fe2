"""What a verdict demands."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_type_hints

from stillknows import defaults
from stillknows.arguments import require_type
from stillknows.errors import UserError
from stillknows.stats import LEVEL


@dataclass(frozen=True)
class Policy:
    """What a verdict demands.

    tolerance: largest share of the knowledge, and of the facts, that may remain: 0..1.
    utility_floor: least retain score relative to the original under the same variant: 0..1.
    alpha: error rate of the claim that a model leaks, over all its deployments and gates together, and once more over
        all attacks: what is tried besides does not weaken the first claim.
    gates: metrics that must all pass; the ones that rank best in public meta-evaluations of unlearning metrics.
    utility: metric that damage is measured by.
    recited: how many single facts a model may recite.
    half_known: whether a fact is cleared only where it would be named if it were known half as well as by the original;
        otherwise, where it would be if it were known as well.
    guesses_pass: whether facts that seem to be known, of which nothing can be said, are passed as long as guesses
        explain their number.
    """

    tolerance: float = defaults.TOLERANCE
    utility_floor: float = defaults.UTILITY_FLOOR
    alpha: float = 0.05
    gates: tuple[str, ...] = ("answer_probability", "extraction_strength")
    utility: str = "answer_probability"
    recited: int = 0
    half_known: bool = False
    guesses_pass: bool = True

    def __post_init__(self) -> None:
        """Raise UserError for thresholds that no evidence can meet or miss, and for what is no number."""
        for name, kind in get_type_hints(Policy).items():
            require_type(name, getattr(self, name), kind)
        for name, value in (("tolerance", self.tolerance), ("alpha", self.alpha)):
            if not 0 < value < 1:
                raise UserError(f"`{name}` {value} is out of range", "it must be above 0 and below 1")
        if self.recited < 0:
            raise UserError(f"`recited` {self.recited} is out of range", "it must be 0 or more")
        if not 0 <= self.utility_floor <= 1:
            raise UserError(f"`utility_floor` {self.utility_floor} is out of range", "it must be between 0 and 1")


def least_facts(tolerance: float) -> int:
    """Return how many facts must be asked for until none that is known excludes a share of `tolerance`: 29 for 10 %."""
    return math.ceil(math.log(1 - LEVEL) / math.log(1 - tolerance))
