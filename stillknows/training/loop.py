"""The only optimisation loop: it trains from scratch, unlearns, and resumes bit by bit where it stopped.

A plan is a list of terms; each pairs an objective with the items that it is computed on. The first term leads: one
epoch is one pass over its items. Wrappers change which gradient is applied to which weights. Dropout stays off, so that
a loss at the starting point has its analytic value and a run depends on nothing but its settings.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from stillknows.errors import UserError
from stillknows.lazy import Tensor, nn, torch
from stillknows.model.encoding import EncodedAnswer
from stillknows.model.forward import mean_probability, score_items
from stillknows.model.layers import output_layer
from stillknows.model.parameters import copies, write
from stillknows.progress import progress
from stillknows.registry import Bound, bind
from stillknows.training.checkpoint import SaveClock, open_checkpoint, write_checkpoint
from stillknows.training.cost import CostMeter, peak_memory
from stillknows.training.objective_inputs import Draw, Inputs, Term
from stillknows.training.precision import computing, multiplies_bfloat16, passes
from stillknows.training.scrambled_answers import scrambled
from stillknows.training.settings import Settings
from stillknows.training.step_pipeline import Gradients, StepPipeline
from stillknows.training.watch import Watch
from stillknows.training.weight_rounding import MIX, Storage

MONITORED = 256  # items of a split that early stopping looks at


@dataclass
class FitResult:
    """What a run did: steps taken, why it ended, what the checks saw, and what it cost.

    tokens: of the items that went through the model for gradients. forward_tokens: read without gradients, to ask
    teachers and to check, padding included. flops: an estimate, see cost.CostMeter. trained: weights free to move.
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

    def add(self, meter: CostMeter, before: FitResult | None = None) -> None:
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
    monitor: tuple[Sequence[EncodedAnswer], Sequence[EncodedAnswer]] = ((), ()),
    watch: Watch | None = None,
    checkpoint: Path | None = None,
    plan_key: str = "",
    label: str = "training",
) -> FitResult:
    """Minimise the sum of the terms in place and return what happened.

    Args:
        model: float32 weights; the state at the call is the reference that some terms need.
        step_plugins: plug-ins of kind "step".
        teachers: models besides the reference that terms compare with, by name; asked before the first step.
        start: changes the weights after the teachers were asked and before the first step.
        monitor: the forget and retain items that early stopping watches.
        watch: looks at the model at each check, and may end the run or slow it down.
        checkpoint: file to save progress to, at most every `save_seconds` and in a small part of the run's time, and to
            resume from; a resumed run ends with the same weights, bit by bit.
        plan_key: identifies the run; a checkpoint of another plan is refused.

    Raises UserError when the loss stops being a number; the model is then unusable and nothing has been saved.
    """
    watch, clock = watch or Watch(), SaveClock(settings)
    with CostMeter(model) as meter:
        loop = _Loop(model, terms, settings, monitor, step_plugins, teachers or {}, start)
        if checkpoint is not None and checkpoint.is_file():
            loop.resume(checkpoint, plan_key)
        total = settings.steps(len(terms[0].items))
        before = replace(loop.done)
        with progress(label, total) as advance, contextlib.closing(loop.pipeline):
            advance(loop.done.steps)
            while loop.done.steps < total:
                loop.pace = watch.pace(loop.done.history)
                loss = loop.step(total)
                checking = loop.done.steps % settings.check_every == 0 or loop.done.steps == total
                if checking and loop.check(loss, watch):
                    break
                loop.done.add(meter, before)
                if checkpoint is not None and clock.is_due(checking):
                    with clock:
                        loop.save(checkpoint, plan_key)
                advance(1, watch.note(loss, loop.done.history))
        loop.done.add(meter, before)
    loop.done.peak_memory_bytes = peak_memory(next(model.parameters()).device)
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    return loop.done


class _Loop:
    """The state between two steps: model, optimizer, references, the weights to fall back to, the log."""

    def __init__(
        self,
        model: nn.Module,
        terms: Sequence[Term],
        settings: Settings,
        monitor: tuple[Sequence[EncodedAnswer], Sequence[EncodedAnswer]] = ((), ()),
        step_plugins: Sequence[Bound] = (),
        teachers: Mapping[str, nn.Module] | None = None,
        start: Callable[[nn.Module], None] | None = None,
    ) -> None:
        self.model, self.settings, self.pace = model.eval(), settings, 1.0
        self.forget, self.retain = (list(items[:MONITORED]) for items in monitor)
        self.layer = output_layer(model)
        steps = settings.steps(len(terms[0].items))
        self.pipeline = StepPipeline(model, step_plugins, steps=steps, seed=settings.seed)
        self.terms = self.pipeline.extended(terms)
        self.inputs = [
            Inputs(model, self.layer, term, teachers or {}, self._all_draws(k, steps))
            for k, term in enumerate(self.terms)
        ]
        if start is not None:
            start(model)
        self.done = FitResult()
        self.bfloat16 = multiplies_bfloat16(model, settings.compute)
        self.pipeline.begin(self._whole_gradients)
        self.parameters = self.pipeline.parameters
        self.done.trained = self.pipeline.trained
        self.storage = Storage(self.parameters, settings.weights, settings.seed)
        self.pipeline.hold()
        self.optimizer = self.pipeline.optimizer(settings.lr, settings.beta2)
        self.retain_start = mean_probability(score_items(model, self.layer, self.retain)) if self.retain else 0.0
        self.good: dict[str, Tensor] = {}
        self._keep()

    def _all_draws(self, k: int, steps: int) -> Iterator[Draw]:
        """Yield the draws of all steps, some of them more than once; the many of a long run are made if asked for."""
        if self.pipeline.looks_ahead:
            yield from (Draw(i, 0) for i in range(len(self.terms[k].items)))
        for step in range(steps):
            yield from self._batch(k, step)

    def _batch(self, k: int, step: int) -> list[Draw]:
        """Return the draws of term k at a step: a pure function of the seed, so that nothing needs to be saved."""
        stage = self.pipeline.stage(self.terms[k], step)
        count = len(stage.pool)
        wanted = self.settings.batch_size if k == 0 else self.settings.retain_batch_size or self.settings.batch_size
        size = min(wanted, count)
        places = range((step - stage.first) * size, (step - stage.first + 1) * size)
        seeds = ((self.settings.seed * MIX + k) * MIX + p // count for p in places)
        in_rounds, turn = self.settings.schedule == "rounds", step // self.settings.round_steps
        return [
            Draw(stage.pool[_shuffled(count, seed)[p % count]], turn if in_rounds else p // count)
            for p, seed in zip(places, seeds, strict=True)
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
        self.optimizer.param_groups[0]["lr"] = settings.rate(step, total) * self.pace
        self.optimizer.step()
        self.storage.keep(step)
        self.pipeline.hold()
        self.done.steps += 1
        return loss

    def _backward(self, term: Term, inputs: Inputs, draws: Sequence[Draw], parts: int | None = None) -> float:
        """Add the gradient of a term's mean over these draws to the parameters' and return the mean."""
        total = 0.0
        draws = sorted(draws, key=lambda draw: len(term.items[draw.item].ids))
        parts = parts or max(self.settings.accumulate, passes(self.model, [len(term.items[i].ids) for i, _ in draws]))
        size = math.ceil(len(draws) / parts)
        for part in (draws[i : i + size] for i in range(0, len(draws), size)):
            with computing(self.model, self.bfloat16):
                loss = term.objective(**inputs(part)).sum() / len(draws)
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
            draws = [Draw(i, 0) for i in range(len(term.items))]
            self._backward(term, inputs, draws, math.ceil(len(draws) / self.settings.batch_size))
        return self.pipeline.taken()

    def _scrambled(self, terms: Iterable[Term]) -> tuple[Term, Inputs]:
        items = dict.fromkeys(item for term in terms for item in term.items)
        term = Term(bind("objective", "nll"), scrambled(list(items), self.model.config, self.settings.seed))
        return term, Inputs(self.model, self.layer, term, {}, ())

    def check(self, loss: float, watch: Watch) -> bool:
        """Look at the monitored items; return True when the run should end here."""
        settings, seen = self.settings, {"step": float(self.done.steps), "loss": loss, **watch.look()}
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
        if settings.forget_below and seen.get("forget", 1.0) <= settings.forget_below:
            self.done.stopped = f"forget items at {seen['forget']:.4f}, asked for at most {settings.forget_below:g}"
            return True
        self._keep()
        reason = watch.enough(seen)
        self.done.stopped = reason or self.done.stopped
        return bool(reason)

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
            self.done = FitResult(**json.loads(texts["fit"]))
        self._keep()


@lru_cache(maxsize=64)
def _shuffled(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed % 2**63)).tolist()
