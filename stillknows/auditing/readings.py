"""What models read in each variant, and what attacks on them are given: known before any weights are loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from stillknows.auditing.asking import Questions, Reader, Reading
from stillknows.auditing.attack_inputs import AttackInputs, InputFinder
from stillknows.auditing.prepared import Prepared
from stillknows.errors import UserError, first_line
from stillknows.progress import warn
from stillknows.variants import defences
from stillknows.variants.defences import Defence
from stillknows.variants.variant import Variant

Readings = dict[tuple[str, bool], Reading]  # by `Variant.asking`, and whether a model's own defence stands before it


class LeftOut(NamedTuple):
    """A variant that nobody asked for by name and that this model or this benchmark does not allow."""

    variant: str
    because: str


def left_out_of(variant: str, because: str) -> LeftOut:
    """Return a variant as left out, which is told."""
    warn(f"{variant} is left out: {because}")
    return LeftOut(variant, because)


def read_in_variants(
    prepared: Sequence[Prepared],
    variants: Mapping[str, Variant],
    named: Collection[str],
    questions: Questions,
    reader: Reader,
) -> tuple[list[Prepared], dict[str, str]]:
    """Return the models with what they read in each variant, and by variant why it cannot be asked.

    Raises UserError for a variant in `named` that this benchmark does not allow, or whose questions are too long, and
    for an attack that its options leave nothing to do.
    """
    _require_budgets(variants)
    has_adapters = any(model.ref.adapter for model in prepared[1:])
    finder, inputs = InputFinder(questions, reader, prepared[0].ref, has_adapters), AttackInputs()
    found: list[Readings] = [{} for _ in prepared]
    impossible: dict[str, str] = {}
    for name, variant in variants.items():
        try:
            inputs = inputs.with_those(finder.find(variant))
            if (variant.asking, False) in found[0]:
                continue
            chain = [defences.made_of(link, questions.benchmark) for link in variant.defences]
            shared = questions.reading(variant, reader.tokenizer, chain)
            own = [_behind_own(model.defence, chain, variant, questions, reader) for model in prepared]
        except UserError as error:
            if name in named:
                what, _, fix = str(error).partition("\n")
                raise UserError(f"{name}: {what}", fix.strip()) from error
            impossible[name] = first_line(error)
            continue
        for readings, behind in zip(found, own, strict=True):
            readings |= {(variant.asking, False): shared} | behind
    models = zip(prepared, found, strict=True)
    return [model._replace(readings=readings, inputs=inputs) for model, readings in models], impossible


def _require_budgets(variants: Mapping[str, Variant]) -> None:
    for name, variant in variants.items():
        for link in variant.links:
            if not link.costs:
                what = f"{name} does nothing: its budget, {link.plugin.budget}, is {link.plugin.unspent:g}"
                raise UserError(what, f"{link.plugin.name}({link.plugin.budget}=…), or leave it out")


def _behind_own(
    own: Defence | None, chain: Sequence[Defence], variant: Variant, questions: Questions, reader: Reader
) -> Readings:
    """Return what a model reads behind the variant's defences and then its own, where it has one."""
    if own is None:
        return {}
    return {(variant.asking, True): questions.reading(variant, reader.tokenizer, [*chain, own])}
