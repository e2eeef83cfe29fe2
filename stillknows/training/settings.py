"""How to optimise: checked when it is made, and how many steps it means."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from stillknows.errors import UserError
from stillknows.training.weight_rounding import WeightStorage

LEAST_RATE = 1e-5  # where a ramp of the learning rate begins
MOST_STEPS = 1_000_000  # published runs take thousands; what each step draws is known before the first


@dataclass(frozen=True)
class Settings:
    """How to optimise.

    lr: the optimizer's learning rate; `warmup` steps rise to it linearly, after them it is constant, falls to 0
        linearly ("linear"), does so anew in every `round_steps` steps ("rounds"), or rises to it from LEAST_RATE,
        step by step by the same factor ("ramp").
    epochs, max_steps: passes over the leading term's items, or steps; the smaller bound counts.
    batch_size: items per step of the leading term, and of each other term unless `retain_batch_size` is given.
    accumulate: split a step's items into that many forward passes; the result is the same.
    clip: largest norm of the whole gradient; `beta2`: decay of AdamW's second moment (the first's is 0.9).
    compute: what passes for gradients multiply in; with "bfloat16" sums, losses, gradients and weights stay in float32.
        "auto" takes it for models of some size where the processor is made for it.
    weights: how weights are kept between steps, see weight_rounding.Storage. Gradients and optimizer state are float32.
    forget_below: stop when the mean answer probability of the monitored forget items is at most this; 0 never stops.
    retain_floor: stop, and go back to the last check, when the monitored retain items' mean answer probability is below
        this share of its start; 0 never stops.
    check_every: steps between two such checks.
    save_seconds: least time between two checkpoints; with `retain_floor` they are written after checks only.
    """

    lr: float
    epochs: float = 10.0
    max_steps: int | None = None
    batch_size: int = 16
    retain_batch_size: int | None = None
    accumulate: int = 1
    compute: Literal["float32", "bfloat16", "auto"] = "float32"
    weights: WeightStorage = "float32"
    seed: int = 0
    warmup: int = 0
    schedule: Literal["constant", "linear", "rounds", "ramp"] = "constant"
    round_steps: int = 40
    clip: float = 1.0
    beta2: float = 0.999
    forget_below: float = 0.0
    retain_floor: float = 0.0
    check_every: int = 10
    save_seconds: float = 60.0

    def __post_init__(self) -> None:
        """Raise UserError for numbers that no run can use."""
        _require(0 < self.lr < math.inf, "lr", self.lr, "a rate above 0 and finite")
        for name in ("epochs", "clip"):
            _require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "above 0 and finite")
        for name in ("batch_size", "accumulate", "check_every", "round_steps"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(self.max_steps is None or self.max_steps >= 1, "max_steps", self.max_steps, "at least 1")
        small = self.retain_batch_size
        _require(small is None or small >= 1, "retain_batch_size", small, "at least 1")
        _require(0 <= self.beta2 < 1, "beta2", self.beta2, "at least 0 and below 1")
        _require(self.warmup >= 0, "warmup", self.warmup, "at least 0")
        for name in ("forget_below", "retain_floor"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "between 0 and 1")

    def steps(self, items: int) -> int:
        """Return the number of steps for this many leading items. Raises UserError for more than MOST_STEPS."""
        passes = self.epochs * items / min(self.batch_size, items)
        steps = min(passes, math.inf if self.max_steps is None else self.max_steps)
        if steps > MOST_STEPS:
            raise UserError(
                f"`epochs` {self.epochs:g} over {items} items are more than {MOST_STEPS:,} steps, the most of a run",
                "lower `epochs`, or set `max_steps`",
            )
        return math.ceil(steps)

    def rate(self, step: int, total: int) -> float:
        """Return the learning rate of a step, counted from 0, of a run of `total` steps."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "linear":
            return self.lr * (total - step) / max(1, total - self.warmup)
        if self.schedule == "rounds":
            return self.lr * (1 - (step % self.round_steps) / self.round_steps)
        if self.schedule == "ramp":
            return self.lr * (LEAST_RATE / self.lr) ** (1 - (step + 1) / total)
        return self.lr


def _require(good: bool, name: str, value: object, range_: str) -> None:
    if not good:
        raise UserError(f"`{name}` {value} is out of range", f"it must be {range_}")
