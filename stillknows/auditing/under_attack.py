"""What attacks ask the models of an audit, and what they may teach them: known before any weights are loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from stillknows.auditing.asking import Items, Questions, Reader
from stillknows.auditing.prepared import Prepared
from stillknows.errors import UserError, first_line
from stillknows.variants.variant import Variant, taught_facts


def asked_under_attack(
    variants: Mapping[str, Variant], named: Collection[str], questions: Questions, reader: Reader
) -> tuple[dict[str, Items], dict[str, str]]:
    """Return what models without a defence are asked under attack, by `Variant.asking`, and why others cannot be.

    Raises UserError for a variant in `named` that this benchmark does not allow, or whose questions are too long.
    """
    found: dict[str, Items] = {}
    impossible: dict[str, str] = {}
    for name, variant in variants.items():
        if variant.role != "attack" or variant.asking in found:
            continue
        try:
            found[variant.asking] = questions.attacked(variant, reader.tokenizer)
        except UserError as error:
            if name in named:
                what, _, fix = str(error).partition("\n")
                raise UserError(f"{name}: {what}", fix.strip()) from error
            impossible[name] = first_line(error)
    return found, impossible


def attacked(
    model: Prepared,
    variants: Mapping[str, Variant],
    asked: Mapping[str, Items],
    questions: Questions,
    reader: Reader,
) -> Prepared:
    """Return a model with what attacks ask of it, through its defence if it has one, and what they may teach it.

    Args:
        asked: as `asked_under_attack` returns it.
    """
    if model.suppression is None:
        found: dict[str, tuple[Items, Items | None]] = {asking: (items, None) for asking, items in asked.items()}
    else:
        attacks = {variant.asking: variant for variant in variants.values() if variant.role == "attack"}
        found = {
            asking: (questions.attacked(variant, reader.tokenizer, model.suppression), asked[asking])
            for asking, variant in attacks.items()
        }
    forget = [split for split in questions.benchmark.splits if split.role == "forget"]
    taught, plain = taught_facts(forget), model.bare or model.splits
    items = (item.answer for split in forget for item in plain[split.name])
    return model._replace(attacked=found, teachable=tuple(i for i in items if i.example.fact in taught))
