"""What models read in each variant, and what attacks may teach them: known before any weights are loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from stillknows.auditing.asking import Questions, Reader, Reading
from stillknows.auditing.prepared import Prepared
from stillknows.errors import UserError, first_line
from stillknows.model.encoding import EncodedAnswer
from stillknows.variants import defences
from stillknows.variants.defences import Defence
from stillknows.variants.variant import Variant, taught_facts

Readings = dict[tuple[str, bool], Reading]  # by `Variant.asking`, and whether a model's own defence stands before it


def read_in_variants(
    prepared: Sequence[Prepared],
    variants: Mapping[str, Variant],
    named: Collection[str],
    questions: Questions,
    reader: Reader,
) -> tuple[list[Prepared], dict[str, str]]:
    """Return the models with what they read in each variant, and by variant why it cannot be asked.

    Raises UserError for a variant in `named` that this benchmark does not allow, or whose questions are too long.
    """
    teachable = _teachable(questions, reader) if any(variant.teaches for variant in variants.values()) else ()
    found: list[Readings] = [{} for _ in prepared]
    impossible: dict[str, str] = {}
    for name, variant in variants.items():
        if found and (variant.asking, False) in found[0]:
            continue
        try:
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
    return [model._replace(readings=readings, teachable=teachable) for model, readings in models], impossible


def _behind_own(
    own: Defence | None, chain: Sequence[Defence], variant: Variant, questions: Questions, reader: Reader
) -> Readings:
    """Return what a model reads behind the variant's defences and then its own, where it has one."""
    if own is None:
        return {}
    return {(variant.asking, True): questions.reading(variant, reader.tokenizer, [*chain, own])}


def _teachable(questions: Questions, reader: Reader) -> tuple[EncodedAnswer, ...]:
    """Return the items of the facts that attacks on the weights may teach."""
    forget = [split for split in questions.benchmark.splits if split.role == "forget"]
    taught, plain = taught_facts(forget), questions.encoded(reader.tokenizer)
    items = (item.answer for split in forget for item in plain[split.name])
    return tuple(item for item in items if item.example.fact in taught)
