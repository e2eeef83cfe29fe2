"""The only optimisation loop: it trains from scratch, unlearns, and resumes bit by bit where it stopped.

A plan is a list of terms; each pairs an objective with the items that it is computed on. The first term leads: one
epoch is one pass over its items. Dropout stays off, so that a loss at the starting point has its analytic value and
a run depends on nothing but its settings.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillknows.errors import UserError
from stillknows.forward import answer_states, mean_probability, score_items
from stillknows.logprobs import token_kl, token_log_probs, token_mean_log_probs
from stillknows.models import OutputLayer, output_layer
from stillknows.progress import progress
from stillknows.registry import Bound
from stillknows.store import replace_file
from stillknows.text import Encoded

WeightStorage = Literal["float32", "bfloat16", "stochastic"]
MONITORED = 256  # items of a split that early stopping looks at
MIX = 1_000_003  # combines a seed with a counter into another seed


@dataclass(frozen=True)
class Term:
    """One summand of the loss: the mean of an objective over a batch drawn from `items`."""

    objective: Bound
    items: Sequence[Encoded]


@dataclass(frozen=True)
class Settings:
    """How to optimise.

    lr: AdamW's learning rate; `warmup` steps rise to it linearly, after them it is constant or falls to 0 linearly.
    epochs, max_steps: passes over the leading term's items, or steps; the smaller bound counts.
    batch_size: items per step of the leading term, and of each other term unless `retain_batch_size` is given.
    accumulate: split a step's items into that many forward passes; the result is the same.
    clip: largest norm of the whole gradient; `beta2`: decay of AdamW's second moment (the first's is 0.9).
    weights: how weights are kept between steps. "float32"; "bfloat16", rounded to the nearest after every step, as a
        run without a float32 master copy rounds them; "stochastic", rounded to bfloat16 up or down at random, in
        proportion to the distance, so that small updates survive on average. Gradients and optimizer state are float32.
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
        """Raise UserError for numbers that no run can use, named as on the command line."""
        for name in ("lr", "epochs", "clip"):
            _require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "above 0 and finite")
        for name in ("batch_size", "accumulate", "check_every"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(self.max_steps is None or self.max_steps >= 1, "steps", self.max_steps, "at least 1")
        small = self.retain_batch_size
        _require(small is None or small >= 1, "retain_batch_size", small, "at least 1")
        _require(0 <= self.beta2 < 1, "beta2", self.beta2, "at least 0 and below 1")
        _require(self.warmup >= 0, "warmup", self.warmup, "at least 0")
        for name in ("forget_below", "retain_floor"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "between 0 and 1")

    def steps(self, items: int) -> int:
        """Return the number of steps for this many leading items."""
        steps = math.ceil(self.epochs * items / min(self.batch_size, items))
        return min(steps, self.max_steps) if self.max_steps is not None else steps


def _require(good: bool, name: str, value: object, range_: str) -> None:
    if not good:
        raise UserError(f"--{name.replace('_', '-')} {value} is out of range", f"it must be {range_}")


@dataclass
class Fit:
    """What a run did: steps taken, why it ended, what the checks saw, and what it cost."""

    steps: int = 0
    stopped: str = "all steps taken"
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    peak_memory_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def fit(
    model: nn.Module,
    terms: Sequence[Term],
    settings: Settings,
    *,
    monitor: tuple[Sequence[Encoded], Sequence[Encoded]] = ((), ()),
    checkpoint: Path | None = None,
    plan_key: str = "",
    label: str = "training",
) -> Fit:
    """Minimise the sum of the terms in place and return what happened.

    Args:
        model: float32 weights; the state at the call is the reference that some terms need.
        monitor: the forget and retain items that early stopping watches.
        checkpoint: file to save progress to and to resume from; a resumed run ends with the same weights, bit by bit.
        plan_key: identifies the run; a checkpoint of another plan is refused.

    Raises UserError when the loss stops being a number; the model is then unusable and nothing has been saved.
    """
    started = saved = time.perf_counter()
    loop = _Loop(model, terms, settings, monitor)
    if checkpoint is not None and checkpoint.is_file():
        loop.resume(checkpoint, plan_key)
    total = settings.steps(len(terms[0].items))
    earlier = loop.done.seconds
    with progress(label, total) as advance:
        advance(loop.done.steps)
        while loop.done.steps < total:
            loss = loop.step(total)
            checking = loop.done.steps % settings.check_every == 0 or loop.done.steps == total
            if checking and loop.check(loss):
                break
            loop.done.seconds = earlier + time.perf_counter() - started
            if checking and checkpoint is not None and time.perf_counter() - saved >= settings.save_seconds:
                loop.save(checkpoint, plan_key)
                saved = time.perf_counter()
            advance(1, f"loss {loss:.3f}")
    loop.done.seconds = earlier + time.perf_counter() - started
    if next(model.parameters()).is_cuda:
        loop.done.peak_memory_bytes = torch.cuda.max_memory_allocated()
    model.requires_grad_(False)
    return loop.done


class _Loop:
    """The state between two steps: model, optimizer, references, the weights to fall back to, the log."""

    def __init__(self, model: nn.Module, terms: Sequence[Term], settings: Settings, monitor) -> None:
        self.model, self.terms, self.settings = model.eval(), terms, settings
        self.forget, self.retain = (list(items[:MONITORED]) for items in monitor)
        self.layer = output_layer(model)
        self.parameters = dict(model.requires_grad_(True).named_parameters())
        _store(self.parameters.values(), "bfloat16" if settings.weights != "float32" else "float32", settings.seed, -1)
        steps = settings.steps(len(terms[0].items))
        self.references = [_Reference(model, self.layer, term, self._drawn(k, steps)) for k, term in enumerate(terms)]
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.lr, betas=(0.9, settings.beta2), weight_decay=0.0, fused=True
        )
        self.retain_start = mean_probability(score_items(model, self.layer, self.retain)) if self.retain else 0.0
        self.good: dict[str, Tensor] = {}
        self.done = Fit()
        self._keep()

    def _drawn(self, k: int, steps: int) -> set[int]:
        return {i for step in range(steps) for i in self._batch(k, step)}

    def _batch(self, k: int, step: int) -> list[int]:
        """Return the items of term k at a step: a pure function of the seed, so that nothing needs to be saved."""
        count = len(self.terms[k].items)
        wanted = self.settings.batch_size if k == 0 else self.settings.retain_batch_size or self.settings.batch_size
        size = min(wanted, count)
        places = range(step * size, (step + 1) * size)
        return [_shuffled(count, (self.settings.seed * MIX + k) * MIX + p // count)[p % count] for p in places]

    def step(self, total: int) -> float:
        """Take one step and return its loss."""
        settings, step = self.settings, self.done.steps
        self.optimizer.zero_grad(set_to_none=True)
        loss = sum(self._backward(k, self._batch(k, step)) for k in range(len(self.terms)))
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {step + 1}", "lower --lr, or add a retain term")
        nn.utils.clip_grad_norm_(self.parameters.values(), settings.clip)
        self.optimizer.param_groups[0]["lr"] = settings.lr * _rate(settings, step, total)
        self.optimizer.step()
        _store(self.parameters.values(), settings.weights, settings.seed, step)
        self.done.steps += 1
        return loss

    def _backward(self, k: int, rows: list[int]) -> float:
        term, total = self.terms[k], 0.0
        rows = sorted(rows, key=lambda i: len(term.items[i].ids))
        size = math.ceil(len(rows) / self.settings.accumulate)
        for part in (rows[i : i + size] for i in range(0, len(rows), size)):
            items = [term.items[i] for i in part]
            loss = term.objective(**self._inputs(k, part, items)).sum() / len(rows)
            loss.backward()
            total += float(loss.detach())
            self.done.tokens += sum(len(item.ids) for item in items)
        return total

    def _inputs(self, k: int, rows: list[int], items: list[Encoded]) -> dict[str, Tensor]:
        """Compute what the objective asks for by the names of its parameters."""
        needs, reference, layer = self.terms[k].objective.plugin.needs, self.references[k], self.layer
        states = answer_states(self.model, items)
        inputs: dict[str, Tensor] = {}
        if "mask" in needs:
            inputs["mask"] = states.places.mask_BA
        if "log_probs" in needs:
            log_probs_T = token_log_probs(states.hidden_TD, layer, states.targets_T, layer.vocabulary)
            inputs["log_probs"] = states.places.pad(log_probs_T)
        if "mean_log_probs" in needs:
            inputs["mean_log_probs"] = states.places.pad(
                token_mean_log_probs(states.hidden_TD, layer, layer.vocabulary)
            )
        if "reference_log_probs" in needs:
            inputs["reference_log_probs"] = states.places.pad(reference.log_probs(rows, states.hidden_TD.device))
        if "reference_kl" in needs:
            ref_hidden_TD = reference.hidden(rows, states.hidden_TD.device)
            kl_T = token_kl(states.hidden_TD, layer, ref_hidden_TD, reference.layer, layer.vocabulary)
            inputs["reference_kl"] = states.places.pad(kl_T)
        return inputs

    def check(self, loss: float) -> bool:
        """Look at the monitored items; return True when the run should end here."""
        settings, seen = self.settings, {"step": float(self.done.steps), "loss": loss}
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
            self.good = {name: p.detach().to("cpu", copy=True) for name, p in self.parameters.items()}
            self.good_step = self.done.steps

    def _fall_back(self) -> None:
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(self.good[name])
        self.done.steps = self.good_step

    def save(self, path: Path, plan_key: str) -> None:
        from safetensors.torch import save_file

        tensors = {f"weights/{name}": p.detach().contiguous() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            tensors |= {f"{slot}/{name}": value.contiguous() for slot, value in self.optimizer.state[p].items()}
        meta = {"key": plan_key, "fit": json.dumps(self.done.to_json())}
        replace_file(path, lambda partial: save_file(tensors, partial, metadata=meta))

    def resume(self, path: Path, plan_key: str) -> None:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file, torch.no_grad():
            meta = file.metadata()
            if meta["key"] != plan_key:
                raise UserError(f"{path} belongs to a run with other settings", "repeat them, or add --overwrite")
            for name, p in self.parameters.items():
                p.copy_(file.get_tensor(f"weights/{name}"))
                state = {slot: file.get_tensor(f"{slot}/{name}") for slot in ("step", "exp_avg", "exp_avg_sq")}
                self.optimizer.state[p] = {s: v if s == "step" else v.to(p.device) for s, v in state.items()}
        self.done = Fit(**json.loads(meta["fit"]))
        self._keep()


class _Reference:
    """What the model said about the drawn items before training, for terms that compare with it."""

    def __init__(self, model: nn.Module, layer: OutputLayer, term: Term, drawn: set[int]) -> None:
        needs = term.objective.plugin.needs
        self._log_probs: dict[int, Tensor] = {}
        self._hidden: dict[int, Tensor] = {}
        rows = sorted(drawn)
        if "reference_log_probs" in needs:
            scores = score_items(model, layer, [term.items[i] for i in rows])
            self._log_probs = {rows[i]: item.log_probs for i, item in scores}
        if "reference_kl" in needs:
            self.layer = layer.frozen()
            with torch.no_grad():
                self._hidden = {i: answer_states(model, [term.items[i]]).hidden_TD.cpu() for i in rows}

    def log_probs(self, rows: list[int], device: torch.device) -> Tensor:
        return torch.cat([self._log_probs[i] for i in rows]).to(device)

    def hidden(self, rows: list[int], device: torch.device) -> Tensor:
        return torch.cat([self._hidden[i] for i in rows]).to(device)


@lru_cache(maxsize=64)
def _shuffled(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed % 2**63)).tolist()


def _rate(settings: Settings, step: int, total: int) -> float:
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    return 1.0 if settings.schedule == "constant" else (total - step) / max(1, total - settings.warmup)


@torch.no_grad()
def _store(parameters, storage: WeightStorage, seed: int, step: int) -> None:
    """Round weights to what the storage can hold; float32 holds everything."""
    if storage == "float32":
        return
    generator = None
    for p in parameters:
        if storage == "bfloat16":
            p.copy_(p.bfloat16())
        else:
            generator = generator or torch.Generator(p.device).manual_seed((seed * MIX + step) % 2**63)
            p.copy_(stochastic_bfloat16(p, generator))


def stochastic_bfloat16(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 to bfloat16 up or down at random, P(up) = distance from below / spacing, so E[result] = values.

    Adds 16 random bits below the ones that bfloat16 keeps and cuts them off. Infinities and NaN stay as they are.
    """
    bits = values.float().contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, generator=generator, dtype=torch.int32, device=bits.device)
    rounded = (bits + noise).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(values.dtype)
