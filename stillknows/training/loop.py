"""The only optimisation loop: it trains from scratch, unlearns, and resumes bit by bit where it stopped.

A plan is a list of terms; each pairs an objective with the items that it is computed on. The first term leads: one
epoch is one pass over its items. Wrappers change which gradient is applied to which weights. Dropout stays off, so that
a loss at the starting point has its analytic value and a run depends on nothing but its settings.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from stillknows.errors import UserError
from stillknows.lazy import Tensor, nn, torch
from stillknows.model.encoding import Encoded
from stillknows.model.forward import mean_probability, score_items
from stillknows.model.layers import output_layer
from stillknows.model.parameters import copies, write
from stillknows.progress import progress
from stillknows.registry import Bound, bind
from stillknows.training.checkpoint import open_checkpoint, write_checkpoint
from stillknows.training.cost import Meter, peak_memory
from stillknows.training.objective_inputs import Inputs, Term, Visit
from stillknows.training.scrambled_answers import scrambled
from stillknows.training.step_pipeline import Gradients, StepPipeline
from stillknows.training.weight_rounding import MIX, Storage, WeightStorage

MOST_STEPS = 1_000_000  # published runs take thousands; what each step draws is known before the first
MONITORED = 256  # items of a split that early stopping looks at


@dataclass(frozen=True)
class Settings:
    """How to optimise.

    lr: the optimizer's learning rate; `warmup` steps rise to it linearly, after them it is constant or falls to 0
        linearly.
    epochs, max_steps: passes over the leading term's items, or steps; the smaller bound counts.
    batch_size: items per step of the leading term, and of each other term unless `retain_batch_size` is given.
    accumulate: split a step's items into that many forward passes; the result is the same.
    clip: largest norm of the whole gradient; `beta2`: decay of AdamW's second moment (the first's is 0.9).
    weights: how weights are kept between steps, see weight_rounding.Storage. Gradients and optimizer state are float32.
    forget_below: stop when the mean answer probability of the monitored forget items is at most this; 0 never stops.
    retain_floor: stop, and go back to the last check, when the monitored retain items' mean answer probability is below
        this share of its start; 0 never stops.
    check_every: steps between two such checks.
    save_seconds: least time between two checkpoints, which are written after checks.
    """

    lr: float
    epochs: float = 10.0
    max_steps: int | None = None
    batch_size: int = 16
    retain_batch_size: int | None = None
    accumulate: int = 1
    weights: WeightStorage = "float32"
    seed: int = 0
    warmup: int = 0
    schedule: Literal["constant", "linear"] = "constant"
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
        for name in ("batch_size", "accumulate", "check_every"):
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


def _require(good: bool, name: str, value: object, range_: str) -> None:
    if not good:
        raise UserError(f"`{name}` {value} is out of range", f"it must be {range_}")


@dataclass
class Fit:
    """What a run did: steps taken, why it ended, what the checks saw, and what it cost.

    tokens: of the items that went through the model for gradients. forward_tokens: read without gradients, to ask
    teachers and to check, fillers included. flops: an estimate, see cost.Meter. trained: weights free to move.
    peak_memory_bytes: see cost.peak_memory.
    """

    steps: int = 0
    stopped: str = "all steps taken"
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    forward_tokens: int = 0
    flops: float = 0.0
    trained: int = 0
    peak_memory_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def add(self, meter: Meter, before: Fit | None = None) -> None:
        """Book what a meter has counted, on top of what had been booked before it started."""
        before = before or replace(self)
        self.seconds = before.seconds + meter.seconds
        self.forward_tokens = before.forward_tokens + meter.forward_tokens
        self.flops = before.flops + meter.flops


def fit(
    model: nn.Module,
    terms: Sequence[Term],
    settings: Settings,
    *,
    step_plugins: Sequence[Bound] = (),
    teachers: Mapping[str, nn.Module] | None = None,
    start: Callable[[nn.Module], None] | None = None,
    monitor: tuple[Sequence[Encoded], Sequence[Encoded]] = ((), ()),
    look: Callable[[], Mapping[str, float]] | None = None,
    checkpoint: Path | None = None,
    plan_key: str = "",
    label: str = "training",
) -> Fit:
    """Minimise the sum of the terms in place and return what happened.

    Args:
        model: float32 weights; the state at the call is the reference that some terms need.
        step_plugins: plug-ins of kind "step".
        teachers: models besides the reference that terms compare with, by name; asked before the first step.
        start: changes the weights after the teachers were asked and before the first step.
        monitor: the forget and retain items that early stopping watches.
        look: measures what else the history is to hold of the model at each check.
        checkpoint: file to save progress to and to resume from; a resumed run ends with the same weights, bit by bit.
        plan_key: identifies the run; a checkpoint of another plan is refused.

    Raises UserError when the loss stops being a number; the model is then unusable and nothing has been saved.
    """
    saved = time.perf_counter()
    with Meter(model) as meter:
        loop = _Loop(model, terms, settings, monitor, step_plugins, teachers or {}, start)
        if checkpoint is not None and checkpoint.is_file():
            loop.resume(checkpoint, plan_key)
        total = settings.steps(len(terms[0].items))
        before = replace(loop.done)
        with progress(label, total) as advance:
            advance(loop.done.steps)
            while loop.done.steps < total:
                loss = loop.step(total)
                checking = loop.done.steps % settings.check_every == 0 or loop.done.steps == total
                if checking and loop.check(loss, look):
                    break
                loop.done.add(meter, before)
                if checking and checkpoint is not None and time.perf_counter() - saved >= settings.save_seconds:
                    loop.save(checkpoint, plan_key)
                    saved = time.perf_counter()
                advance(1, f"loss {loss:.3f}")
        loop.done.add(meter, before)
    loop.done.peak_memory_bytes = peak_memory(next(model.parameters()).device)
    loop.pipeline.finish()
    model.requires_grad_(False)
    return loop.done


class _Loop:
    """The state between two steps: model, optimizer, references, the weights to fall back to, the log."""

    def __init__(
        self,
        model: nn.Module,
        terms: Sequence[Term],
        settings: Settings,
        monitor: tuple[Sequence[Encoded], Sequence[Encoded]] = ((), ()),
        step_plugins: Sequence[Bound] = (),
        teachers: Mapping[str, nn.Module] | None = None,
        start: Callable[[nn.Module], None] | None = None,
    ) -> None:
        self.model, self.settings = model.eval(), settings
        self.forget, self.retain = (list(items[:MONITORED]) for items in monitor)
        self.layer = output_layer(model)
        steps = settings.steps(len(terms[0].items))
        self.pipeline = StepPipeline(model, step_plugins, steps=steps, seed=settings.seed)
        self.terms = self.pipeline.extended(terms)
        self.inputs = [
            Inputs(model, self.layer, term, teachers or {}, self._drawn(k, steps)) for k, term in enumerate(self.terms)
        ]
        if start is not None:
            start(model)
        self.done = Fit()
        self.pipeline.begin(self._whole_gradients)
        self.parameters = self.pipeline.parameters
        self.done.trained = self.pipeline.trained
        self.storage = Storage(self.parameters, settings.weights, settings.seed)
        self.pipeline.hold()
        self.optimizer = self.pipeline.optimizer(settings.lr, settings.beta2)
        self.retain_start = mean_probability(score_items(model, self.layer, self.retain)) if self.retain else 0.0
        self.good: dict[str, Tensor] = {}
        self._keep()

    def _drawn(self, k: int, steps: int) -> Iterator[Visit]:
        """Yield the visits of all steps, some of them more than once; the many of a long run are made if asked for."""
        if self.pipeline.looks_ahead:
            yield from ((i, 0) for i in range(len(self.terms[k].items)))
        for step in range(steps):
            yield from self._batch(k, step)

    def _batch(self, k: int, step: int) -> list[Visit]:
        """Return the visits of term k at a step: a pure function of the seed, so that nothing needs to be saved."""
        stage = self.pipeline.stage(self.terms[k], step)
        count = len(stage.pool)
        wanted = self.settings.batch_size if k == 0 else self.settings.retain_batch_size or self.settings.batch_size
        size = min(wanted, count)
        places = range((step - stage.first) * size, (step - stage.first + 1) * size)
        seeds = ((self.settings.seed * MIX + k) * MIX + p // count for p in places)
        return [
            (stage.pool[_shuffled(count, seed)[p % count]], p // count) for p, seed in zip(places, seeds, strict=True)
        ]

    def step(self, total: int) -> float:
        """Take one step and return its loss."""
        settings, step = self.settings, self.done.steps
        loss = self.pipeline.gradients(
            self.terms,
            lambda k: self._backward(self.terms[k], self.inputs[k], self._batch(k, step)),
            lambda k: [self.terms[k].items[i] for i, _ in self._batch(k, step)],
            step,
        )
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {step + 1}", "lower `lr`, or add a retain term")
        nn.utils.clip_grad_norm_(self.parameters.values(), settings.clip)
        self.optimizer.param_groups[0]["lr"] = settings.lr * _rate(settings, step, total)
        self.optimizer.step()
        self.storage.keep(step)
        self.pipeline.hold()
        self.done.steps += 1
        return loss

    def _backward(self, term: Term, inputs: Inputs, visits: Sequence[Visit], parts: int | None = None) -> float:
        """Add the gradient of a term's mean over these visits to the parameters' and return the mean."""
        total = 0.0
        visits = sorted(visits, key=lambda visit: len(term.items[visit[0]].ids))
        size = math.ceil(len(visits) / (parts or self.settings.accumulate))
        for part in (visits[i : i + size] for i in range(0, len(visits), size)):
            loss = term.objective(**inputs(part)).sum() / len(visits)
            loss.backward()
            total += float(loss.detach())
            self.done.tokens += inputs.tokens
        return total

    def _whole_gradients(self, name: str) -> Gradients:
        """Return a gradient over all items, at the weights as they are.

        Args:
            name: "forget" or "retain", of all terms of that role; "forget_scrambled" or "retain_scrambled", of the loss
                of their items' answers in which tokens were replaced.
        """
        role, _, scrambled = name.partition("_")
        self.model.zero_grad(set_to_none=True)
        chosen = [(t, i) for t, i in zip(self.terms, self.inputs, strict=True) if t.objective.plugin.role == role]
        for term, inputs in [self._scrambled(term for term, _ in chosen)] if scrambled else chosen:
            visits = [(i, 0) for i in range(len(term.items))]
            self._backward(term, inputs, visits, math.ceil(len(visits) / self.settings.batch_size))
        return self.pipeline.taken()

    def _scrambled(self, terms: Iterable[Term]) -> tuple[Term, Inputs]:
        items = dict.fromkeys(item for term in terms for item in term.items)
        term = Term(bind("objective", "nll"), scrambled(list(items), self.model.config, self.settings.seed))
        return term, Inputs(self.model, self.layer, term, {}, ())

    def check(self, loss: float, look: Callable[[], Mapping[str, float]] | None = None) -> bool:
        """Look at the monitored items; return True when the run should end here."""
        settings, seen = self.settings, {"step": float(self.done.steps), "loss": loss, **(look() if look else {})}
        if self.retain and settings.retain_floor:
            seen["retain"] = mean_probability(score_items(self.model, self.layer, self.retain))
        if self.forget and settings.forget_below:
            seen["forget"] = mean_probability(score_items(self.model, self.layer, self.forget))
        self.done.history.append(seen)
        if seen.get("retain", 1.0) < settings.retain_floor * self.retain_start:
            self._fall_back()
            self.done.stopped = (
                f"retain below {settings.retain_floor:g} of its start; went back to step {self.done.steps}"
            )
            return True
        if seen.get("forget", 1.0) <= settings.forget_below:
            self.done.stopped = f"forget items at {seen['forget']:.4f}, asked for at most {settings.forget_below:g}"
            return True
        self._keep()
        return False

    def _keep(self) -> None:
        if self.settings.retain_floor:
            self.good = copies(self.parameters, "cpu")
            self.good_step = self.done.steps

    def _fall_back(self) -> None:
        write(self.parameters, self.good)
        self.done.steps = self.good_step

    def save(self, path: Path, plan_key: str) -> None:
        kept = {f"weights/{name}": p for name, p in self.parameters.items()}
        kept |= {f"rest/{name}": value for name, value in self.storage.rest.items()}
        kept |= {f"state/{name}": value for name, value in self.pipeline.state.items()}
        for name, p in self.parameters.items():
            kept |= {f"optimizer.{slot}/{name}": value for slot, value in self.optimizer.state[p].items()}
        write_checkpoint(path, kept, {"key": plan_key, "fit": json.dumps(self.done.to_json())})

    def resume(self, path: Path, plan_key: str) -> None:
        with open_checkpoint(path) as (texts, tensors), torch.no_grad():
            if texts["key"] != plan_key:
                raise UserError(f"{path} belongs to a run with other settings", "repeat them, or add `overwrite`")
            for key, value in tensors:
                group, _, name = key.partition("/")
                if group == "weights":
                    write({name: self.parameters[name]}, {name: value})
                elif group == "rest":
                    self.storage.rest[name].copy_(value)
                elif group == "state":
                    self.pipeline.state[name] = value.to(next(iter(self.parameters.values())).device)
                else:
                    p, slot = self.parameters[name], group.removeprefix("optimizer.")
                    self.optimizer.state[p][slot] = value if slot == "step" else value.to(p.device)
            self.done = Fit(**json.loads(texts["fit"]))
        self._keep()


@lru_cache(maxsize=64)
def _shuffled(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed % 2**63)).tolist()


def _rate(settings: Settings, step: int, total: int) -> float:
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    return 1.0 if settings.schedule == "constant" else (total - step) / max(1, total - settings.warmup)
