"""A model of an audit that a server holds: what can be asked of it, what that takes, and how it is judged."""

from __future__ import annotations

import datetime
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from stillknows import defaults
from stillknows.auditing.asking import Questions, Reader
from stillknows.auditing.forecast import Todo
from stillknows.auditing.observe import observe
from stillknows.auditing.prepared import Prepared
from stillknows.auditing.sampled import SampledTarget
from stillknows.errors import UserError
from stillknows.model.encoding import EncodedAnswer
from stillknows.model.endpoint import Endpoint
from stillknows.model.endpoint_target import CountingTarget, EndpointTarget
from stillknows.model.target import Target
from stillknows.progress import log
from stillknows.registry import Bound
from stillknows.specs import Specs, spelled
from stillknows.types import FULL
from stillknows.variants.variant import Variant, expand

NO_WEIGHTS = "not measured: an endpoint serves no weights"
ASKED = ("prompt", "decoding")  # levels of attacks that need no more than answers


def wanted(variants: Specs, endpoint: Endpoint | None) -> tuple[frozenset[str], dict[str, Variant]]:
    """Return the variants that a list names itself and all that it stands for, as `expand` does; by default, of an
    endpoint, those of the plan `quick` that can be asked."""
    if endpoint is None or variants != spelled(defaults.VARIANTS):
        return expand(variants)
    named, found = expand("quick")
    return named, askable(found, endpoint)


def askable(variants: Mapping[str, Variant], endpoint: Endpoint | None) -> dict[str, Variant]:
    """Return the variants that can be asked of all models: beside one that is no more than served, attacks on prompts
    and decoding alone."""
    if endpoint is None:
        return dict(variants)
    return {name: variant for name, variant in variants.items() if all(map(_needs_answers_only, variant.links))}


def _needs_answers_only(link: Bound) -> bool:
    return link.spec == FULL or (link.plugin.role == "attack" and link.plugin.level in ASKED)


def require_possible(endpoint: Endpoint | None, tasks: bool, depth: bool) -> None:
    """Raise UserError for what an endpoint cannot be asked: general tasks, hidden states."""
    if endpoint is not None and (tasks or depth):
        raise UserError("an endpoint is asked no general tasks and shows no states", "leave out `tasks` and `depth`")


def with_served(
    endpoint: Endpoint | None, prepared: list[Prepared], questions: Questions, reader: Reader
) -> list[Prepared]:
    """Return the models of an audit and, where there is an endpoint, the served one, which reads as the original does.

    Where its server gives no log-probabilities, all of them are judged by samples. Raises UserError for a server that
    does not answer or that reads other tokens.
    """
    if endpoint is None:
        return prepared
    first = _first_item(questions, reader)
    label = _label(endpoint, {model.label for model in prepared})
    target = EndpointTarget.find(endpoint, label, first, str(reader.tokenizer.decode(list(first.ids))))
    by_samples = "score" not in target.capabilities
    served = prepared[0]._replace(
        label=label, fingerprint=target.fingerprint, beside=(), served=target, notes=(_note(target, by_samples),)
    )
    if not by_samples:
        return [*prepared, served]
    log(f"{endpoint.name} gives no log-probabilities: every model is judged by {endpoint.samples} answers a prompt")
    return [
        model._replace(samples=endpoint.samples, beside=(*model.beside, f"{endpoint.samples} samples"))
        for model in (*prepared, served)
    ]


def _first_item(questions: Questions, reader: Reader) -> EncodedAnswer:
    split = next(split for split in questions.benchmark.splits if split.role == "forget")
    part = replace(split, examples=split.examples[:1])
    alone = replace(questions, benchmark=replace(questions.benchmark, splits=(part,)), placebos=None)
    return alone.encoded(reader.tokenizer)[split.name][0].answer


def _label(endpoint: Endpoint, taken: Collection[str]) -> str:
    label = endpoint.model.rstrip("/").rpartition("/")[2]
    return label if label not in taken else f"served-{label}"


def _note(target: EndpointTarget, by_samples: bool) -> str:
    how = "the chat, with the bare questions" if target.chats else "completions"
    judged = "; judged by samples, as all models here" if by_samples else ""
    day = datetime.date.today().isoformat()
    return f"it is {target.client.endpoint.name}, asked through {how} on {day}; its weights were not seen{judged}"


def target_of(model: Prepared, target: Target) -> Target:
    """Return the target as the audit judges it: by its own log-probabilities, or by samples."""
    return SampledTarget(target, model.samples) if model.samples else target


def require_affordable(models: Sequence[Prepared], variants: Mapping[str, Variant], todo: Mapping[str, Todo]) -> None:
    """Say what asking served models will take, at most. Raises UserError where that is more than their budget."""
    for model in models:
        if model.served is not None:
            _affordable(model, model.served, variants, todo[model.label])


def _affordable(model: Prepared, served: EndpointTarget, variants: Mapping[str, Variant], todo: Todo) -> None:
    endpoint, counting = served.client.endpoint, CountingTarget()
    for name, splits in todo.items():
        for split in splits:
            fields, decoding = model.observed(variants[name], split)
            items = model.reading(variants[name]).items[split]
            observe(target_of(model, counting), items, fields=fields, decoding=decoding)
    words = counting.usage.words(endpoint)
    if counting.usage.requests:
        log(f"{endpoint.name} will be asked at most {words}")
    if counting.usage.exceeds(endpoint):
        raise UserError(
            f"asking {endpoint.name} may take {words}, more than the budget of {endpoint.budget:g}",
            "raise `budget`, or ask for less: fewer `placebos`, `variants` or `samples`",
        )
