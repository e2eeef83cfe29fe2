"""Everything about a step besides its loss: which gradient is taken where, and which weights it may move.

Step plug-ins have six roles. An adapter decides what is trained at all, a mask which weights may move, a curriculum
which items a step may draw, a perturbation where the forget gradient is taken, a gradient merge how it is joined with
the retain gradient, and an optimizer what becomes of the result.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from stillknows.errors import UserError
from stillknows.lazy import Tensor, nn, parametrize, torch
from stillknows.model.encoding import EncodedAnswer
from stillknows.model.parameters import update
from stillknows.needs import OF_SCRAMBLED, OF_TERMS
from stillknows.registry import Bound
from stillknows.training.objective_inputs import Term
from stillknows.training.weight_rounding import MIX

Gradients = dict[str, Tensor]  # of all parameters that are trained, by name
ROLES = ("adapter", "mask", "curriculum", "perturbation", "gradient_merge", "optimizer")


def check(step_plugins: Sequence[Bound], skeleton: nn.Module, count: int) -> None:
    """Raise UserError for options that are out of range or do not go with the model, before its weights are there.

    Args:
        skeleton: the model without numbers; adapters change it.
        count: number of items to forget.
    """
    tensors = {name: torch.zeros(2, 2) for name, _ in skeleton.named_parameters()}
    given: dict[str, Any] = {"weights": tensors} | dict.fromkeys((*OF_TERMS, *OF_SCRAMBLED), tensors)
    given |= {"retain_loss": 0.0, "state": {}, "forget": [], "gradients": _no_numbers, "random": torch.Generator()}
    given |= {"model": skeleton, "parameters": list(skeleton.parameters()), "lr": 1.0, "count": count}
    for part in sorted(step_plugins, key=lambda part: part.plugin.role == "adapter"):
        with contextlib.suppress(NotImplementedError, RuntimeError):  # the first step that needs numbers
            part(**{name: given[name] for name in part.plugin.needs})


def _no_numbers() -> Gradients:
    raise NotImplementedError("a model without numbers has no gradient")


class Stage(NamedTuple):
    """The items that a term draws from, by index, and the step from which on it does."""

    pool: Sequence[int]
    first: int


class StepPipeline:
    """The step plug-ins of one run and what they keep between steps.

    parameters: what is trained, by name. state: tensors of a gradient merge that a checkpoint must hold.
    """

    def __init__(self, model: nn.Module, step_plugins: Sequence[Bound], *, steps: int, seed: int) -> None:
        self.model, self.steps, self.seed = model, steps, seed
        self.by_role: dict[str, list[Bound]] = {
            role: [w for w in step_plugins if w.plugin.role == role] for role in ROLES
        }
        model.requires_grad_(not self.by_role["adapter"])
        for adapter in self.by_role["adapter"]:
            adapter(model=model)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.held: dict[str, tuple[Tensor, Tensor]] = {}
        self.state: dict[str, Tensor] = {}
        self.stages: list[tuple[Sequence[int], Sequence[int]]] = []

    @property
    def looks_ahead(self) -> bool:
        """Whether the terms are computed of all items before the first step."""
        return any(name in OF_TERMS for mask in self.by_role["mask"] for name in mask.plugin.needs)

    @property
    def trained(self) -> int:
        """Number of weights that are free to move."""
        held = sum(int((~mask).sum()) for mask, _ in self.held.values())
        return sum(p.numel() for p in self.parameters.values()) - held

    def extended(self, terms: Sequence[Term]) -> list[Term]:
        """Return the terms; where a curriculum defers forgetting, retain terms know the forget items too."""
        if not self.by_role["curriculum"]:
            return list(terms)
        self.stages = self.by_role["curriculum"][0](count=len(terms[0].items))
        return [
            replace(term, items=[*term.items, *terms[0].items]) if term.objective.plugin.role == "retain" else term
            for term in terms
        ]

    def stage(self, term: Term, step: int) -> Stage:
        """Return what a term may draw from at a step."""
        if not self.stages:
            return Stage(range(len(term.items)), 0)
        number = min(step * len(self.stages) // self.steps, len(self.stages) - 1)
        forgotten, deferred = self.stages[number]
        first = math.ceil(number * self.steps / len(self.stages))
        if term.objective.plugin.role == "forget":
            return Stage(forgotten, first)
        own = len(term.items) - sum(map(len, (self.stages[-1])))
        return Stage([*range(own), *(own + i for i in deferred)], first)

    def begin(self, whole_gradients: Callable[[str], Gradients]) -> None:
        """Ask the masks what may move; what no mask lets move is not trained, and keeps its bits.

        Raises UserError for a mask that lets none or all of the trained weights move: it is none.
        """
        masks = self.by_role["mask"]
        given: dict[str, Any] = {"weights": {name: p.detach() for name, p in self.parameters.items()}}
        for name in {name for mask in masks for name in mask.plugin.needs} - {"weights"}:
            given[name] = whole_gradients(name.removesuffix("_gradients"))
        for mask in masks:
            seen = {name: given[name] for name in mask.plugin.needs}
            allowed = mask(**seen)
            _require_some(mask, allowed, seen)
            for name in list(self.parameters):
                self._restrict(name, allowed[name])
        if not self.parameters:
            raise UserError("the masks of the method together let no weight move (0 %)", "choose wider ones")

    def _restrict(self, name: str, allowed: Tensor) -> None:
        p = self.parameters[name]
        if name in self.held:
            allowed = allowed & self.held[name][0]
        if not bool(allowed.any()):
            p.requires_grad_(False)
            del self.parameters[name]
            self.held.pop(name, None)
        elif not bool(allowed.all()):
            self.held[name] = (allowed, p.detach().clone())

    def hold(self) -> None:
        """Put weights that may not move back to what they were: momentum and rounding have moved them."""
        held = {name: self.parameters[name] for name in self.held}
        update(held, lambda name, p: torch.where(self.held[name][0], p, self.held[name][1]))

    def optimizer(self, lr: float, beta2: float) -> torch.optim.Optimizer:
        """Return the optimizer of the trained parameters: AdamW without decay, or the one that was asked for."""
        trained = list(self.parameters.values())
        for optimizer in self.by_role["optimizer"]:
            return optimizer(parameters=trained, lr=lr)
        return torch.optim.AdamW(trained, lr=lr, betas=(0.9, beta2), weight_decay=0.0, fused=True)

    def gradients(
        self,
        terms: Sequence[Term],
        backward: Callable[[int], float],
        drawn: Callable[[int], list[EncodedAnswer]],
        step: int,
    ) -> float:
        """Leave a step's gradient in the parameters and return the loss, at the point where the gradient was taken.

        Args:
            backward: adds the gradient of a term's batch to the parameters' and returns its loss.
            drawn: returns the items of a term's batch.
        """
        roles = [term.objective.plugin.role for term in terms]
        perturbations, merges = self.by_role["perturbation"], self.by_role["gradient_merge"]
        self.model.zero_grad(set_to_none=True)
        if not perturbations and not merges:
            return sum(backward(k) for k in range(len(terms)))
        losses: dict[str, float] = {}

        def of(role: str) -> Gradients:
            losses[role] = sum(backward(k) for k, found in enumerate(roles) if found == role)
            return self.taken()

        forget: Callable[[], Gradients] = partial(of, "forget")
        items = list(dict.fromkeys(item for k, role in enumerate(roles) if role == "forget" for item in drawn(k)))
        for perturbation in reversed(perturbations):
            forget = partial(self._under, perturbation, forget, items, step)
        joined = self._joined(merges[0] if merges else None, forget(), of("retain"), losses)
        for name, p in self.parameters.items():
            p.grad = joined[name]
        return sum(losses.values())

    def taken(self) -> Gradients:
        """Take the gradients out of the parameters; 0 where no loss reached one."""
        found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in self.parameters.items()}
        self.model.zero_grad(set_to_none=True)
        return found

    def _under(
        self, perturbation: Bound, gradients: Callable[[], Gradients], items: list[EncodedAnswer], step: int
    ) -> Gradients:
        device = next(iter(self.parameters.values())).device
        given = {
            "gradients": gradients,
            "forget": items,
            "parameters": self.parameters,
            "model": self.model,
            "random": torch.Generator(device).manual_seed((self.seed * MIX + step) % 2**63),
        }
        return perturbation(**{name: given[name] for name in perturbation.plugin.needs})

    def _joined(
        self, merge: Bound | None, forget: Gradients, retain: Gradients, losses: Mapping[str, float]
    ) -> Gradients:
        if merge is None:
            return {name: forget[name] + retain[name] for name in forget}
        given = {
            "forget_gradients": forget,
            "retain_gradients": retain,
            "retain_loss": losses["retain"],
            "state": self.state,
        }
        return merge(**{name: given[name] for name in merge.plugin.needs})

    def close(self) -> None:
        """Merge what an adapter added into the weights that it stands beside."""
        for module in self.model.modules():
            for name in list(getattr(module, "parametrizations", ())):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def _require_some(mask: Bound, allowed: Mapping[str, Tensor], seen: Mapping[str, Gradients]) -> None:
    """Raise UserError where a mask lets none or all of the weights that it was asked about move."""
    moving, total = (sum(map(count, allowed.values())) for count in (lambda m: int(m.sum()), Tensor.numel))
    if 0 < moving < total:
        return
    share = f"{moving:,} of {total:,} trained weights ({100 * moving // total} %)"
    sizes = [float(g.abs().mean()) for name in seen if name != "weights" for g in seen[name].values()]
    told = f"; the means of |g| by tensor are {min(sizes):.2g} to {max(sizes):.2g}" if sizes else ""
    raise UserError(f"{mask.spec} lets {share} move: that is no mask", f"give it other options, or leave it out{told}")
