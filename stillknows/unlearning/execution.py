"""A method carried out on a model in memory: rate and length found where they are not said, training, edits."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from stillknows.lazy import nn
from stillknows.model import parameters
from stillknows.model.encoding import EncodedAnswer
from stillknows.model.ref import ModelRef
from stillknows.model.saving import require_finite_result
from stillknows.progress import log
from stillknows.store import recall, write_sealed
from stillknows.training.cost import CostMeter, peak_memory
from stillknows.training.finetune import finetune
from stillknows.training.loop import FitResult, fit
from stillknows.training.objective_inputs import Term
from stillknows.training.range_test import range_test
from stillknows.training.settings import Settings
from stillknows.types import Example
from stillknows.unlearning import alternative_answers
from stillknows.unlearning.goal import Goal
from stillknows.unlearning.method import Method
from stillknows.unlearning.self_check import self_check

RANGE_TEST = "range_test.json"  # its name beside the checkpoint, while a run is under way
MOST_TURNS = 64  # exchanged answers to a question that are made; longer runs begin again with the first


class Work(NamedTuple):
    """Everything that a run needs besides the weights.

    find_rate: whether the learning rate is found on the model. other_wordings: of the facts to forget, by split, which
    the goal of a run looks at too; None where a run has no goal. controls: never-taught models, which tell what can be
    guessed. refusals: none where the method does not train with them.
    """

    method: Method
    answering: alternative_answers.Answering
    settings: Settings
    find_rate: bool
    other_wordings: Sequence[Sequence[Example]] | None
    forget: list[EncodedAnswer]
    retain: list[EncodedAnswer]
    refusals: tuple[str, ...]
    controls: Sequence[ModelRef] = ()


def companions_of(chosen: Method, role: str) -> frozenset[str]:
    """Return what other answers to the items of a role a method trains with."""
    found = (replace(chosen, terms=(term,)).companions for term in chosen.terms if term.plugin.role == role)
    edits = {"refusal"} if role == "forget" and chosen.needs("refusals") else ()
    return frozenset(edits).union(*found)


def carry_out(work: Work, model: nn.Module, checkpoint: Path, plan_key: str) -> tuple[FitResult, dict[str, Any]]:
    """Change the model in place, as the method says; return what was done and what it cost, and what was chosen."""
    chosen, settings = work.method, work.settings
    outcome, choice = FitResult(stopped="no loss to descend"), dict[str, Any]()
    with CostMeter(model) as preparing:
        aim = _goal(work, model)
        if aim:
            log(f"  at the start: {aim.words(aim.start)}")
        terms = _terms(work, model)
        given = _given(work, model)
        how: dict[str, Any] = {"step_plugins": chosen.step_plugins}
        how["teachers"] = {name: given[name] for name in ("reinforced",) if name in given}
        if terms and work.find_rate:
            found = _rate(work, model, terms, checkpoint.with_name(RANGE_TEST), plan_key, how)
            settings = replace(settings, lr=found["lr"])
            choice["range_test"] = found
    if terms:
        outcome = fit(
            model,
            terms,
            settings,
            monitor=(work.forget, work.retain),
            watch=aim,
            checkpoint=checkpoint,
            plan_key=plan_key,
            label=f"unlearning {work.method.spec}",
            **how,
        )
        require_finite_result(model)
    with CostMeter(model) as editing:
        for edit in chosen.edits:
            edit(**{name: given[name] for name in edit.plugin.needs})
        if aim:
            end = aim.seen()
            choice["goal"] = aim.outcome(end)
            choice["self_check"] = self_check(model, aim, work.forget, end)
    outcome.add(preparing)
    outcome.add(editing)
    outcome.peak_memory_bytes = peak_memory(next(model.parameters()).device)
    return outcome, choice | {"settings": asdict(settings)}


def _rate(
    work: Work, model: nn.Module, terms: Sequence[Term], saved: Path, plan_key: str, how: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the range test of a run as its record holds it: as it was saved, where the run goes on."""
    found = recall(saved, plan_key)
    if found is None:
        tested = range_test(model, terms, work.settings, work.retain, **how)
        found = write_sealed(saved, {"key": plan_key, "result": tested.to_json()})
    result = found["result"]
    log(f"learning rate {result['lr']:.2g}, found in {len(result['trials'])} steps of {result['seconds']:.0f} s")
    return result


def _given(work: Work, model: nn.Module) -> dict[str, Any]:
    """Return what the method's edits and teachers may ask for, of the model before training."""
    chosen, settings, forget = work.method, work.settings, work.forget
    given: dict[str, Any] = {"model": model, "forget": forget, "retain": work.retain, "settings": settings}
    if chosen.needs("original"):
        given["original"] = parameters.Snapshot(model)
    if chosen.needs("reinforced"):
        given["reinforced"] = _reinforced(model, forget, settings)
    if chosen.needs("refusals"):
        given["refusals"] = alternative_answers.refusals(forget, work.refusals, work.answering)
    return given


def _goal(work: Work, model: nn.Module) -> Goal | None:
    if work.other_wordings is None:
        return None
    log("  measuring what is known, and what can be guessed")
    return Goal.of(model, work.forget, work.other_wordings, work.retain, work.answering, work.controls)


def _terms(work: Work, model: nn.Module) -> list[Term]:
    """Pair each objective with its items and the other answers that it needs."""
    how = work.answering
    items = {"forget": work.forget, "retain": work.retain}
    makers: dict[str, Callable[[list[EncodedAnswer]], list[tuple[EncodedAnswer, ...]]]] = {
        "refusal": lambda found: alternative_answers.refusals(found, work.refusals, how),
        "mismatched": lambda found: alternative_answers.mismatched(found, work.retain, how),
        "alternative": lambda found: alternative_answers.alternatives(model, found, work.retain, how),
        "exchanged": lambda found: alternative_answers.exchanged(found, work.retain, _turns(work), how),
    }
    others = {
        role: {name: makers[name](found) for name in companions_of(work.method, role)} for role, found in items.items()
    }
    return [Term(term, items[role], others[role]) for term in work.method.terms if (role := str(term.plugin.role))]


def _turns(work: Work) -> int:
    """Return how many other answers to a question a run can use: one in a round, or in a pass over the items."""
    settings, items = work.settings, len(work.forget)
    steps = settings.steps(items)
    in_rounds = settings.schedule == "rounds"
    turns = steps / settings.round_steps if in_rounds else steps * settings.batch_size / items
    return min(MOST_TURNS, max(2, math.ceil(turns)))


def _reinforced(model: nn.Module, forget: list[EncodedAnswer], settings: Settings) -> nn.Module:
    """Return a copy of the model that was trained further on the forget items, with the run's own settings."""
    copy_ = copy.deepcopy(model)
    finetune(copy_, forget, settings, label="training a reinforced model")
    return copy_
