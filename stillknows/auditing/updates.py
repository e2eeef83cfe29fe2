"""Where a model's update lies, and what each format leaves of it, measured on the weights alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from stillknows.analysis import update_survival
from stillknows.analysis.changed_parts import ChangedParts, changed_parts
from stillknows.auditing.findings import SAME_WEIGHTS
from stillknows.auditing.loader import OBSERVATIONS_VERSION, Loader, observations_file
from stillknows.auditing.prepared import Prepared
from stillknows.errors import UserError, first_line
from stillknows.ledger import Ledger
from stillknows.store import digest, write_sealed
from stillknows.types import FULL, WEIGHTS, Cell, Interval
from stillknows.variants.variant import Variant

CHANGES_VERSION = 2  # raise when `changed_parts` gives other numbers


def updates(
    load: Loader, original: Prepared, model: Prepared, variants: Mapping[str, Variant], ledger: Ledger
) -> Iterator[Cell]:
    """Yield what each format leaves of a model's update, as a whole and by layer, measured on the weights alone.

    Of a layer that has no update there is no number, and none is asked for.
    """
    for variant, form in variants.items():
        on_disk = model.ref.packing or original.ref.packing
        unknown = on_disk or form.ids_NL is not None
        whole, layers = (None, {}) if unknown else _damage(load, original, model, variant, form, ledger)
        for name in ("crossing", "surviving"):
            value = getattr(whole, name, None)
            if on_disk:
                result: Interval | str = "the file is quantized: its weights differ by more than the update"
            elif whole is None:
                result = "the format depends on inputs, not on the weights alone"
            elif value is None:
                result = SAME_WEIGHTS
            else:
                result = Interval(value, value, value, whole.weights)
            yield Cell(model.label, variant, WEIGHTS, f"update.{name}", result)
            for layer, damage in layers.items():
                value = getattr(damage, name)
                if damage.surviving is not None:
                    result = Interval(value, value, value, damage.weights)
                    yield Cell(model.label, variant, WEIGHTS, f"update.{name}.{layer}", result)


def changes(original: Prepared, model: Prepared, ledger: Ledger) -> Iterator[Cell]:
    """Yield in which parts of the weights a model differs from the original, and in how few directions."""
    path = observations_file(ledger.folder, model, FULL, "changes").with_suffix(".json")
    cache = digest(CHANGES_VERSION, original.fingerprint, model.fingerprint)
    saved = ledger.recall(path, cache)
    if saved is None:
        saved = {"key": cache, "parts": _changed(original, model)}
        write_sealed(path, saved)
        ledger.add(path)
    for name in ChangedParts._fields:
        value = saved["parts"] if isinstance(saved["parts"], str) else saved["parts"][name]
        result = (
            Interval(value, value, value, 1) if isinstance(value, float) else value or "there is nothing to compare"
        )
        yield Cell(model.label, FULL, WEIGHTS, f"change.{name}", result)


def _changed(original: Prepared, model: Prepared) -> dict[str, float | None] | str:
    """Return the numbers by name, None for NaN; or why there are none."""
    for ref in (original.ref, model.ref):
        if ref.packing or ref.adapter is not None:
            return f"{ref.name} holds {ref.packing or 'an adapter'}: its matrices are not compared one by one"
    try:
        parts = changed_parts(original.ref, model.ref)._asdict()
    except UserError as error:
        return first_line(error)
    return {name: None if math.isnan(value) else float(value) for name, value in parts.items()}


class Damage(NamedTuple):
    """What a format leaves of an update; see `tally.Tally`."""

    weights: int
    crossing: float
    surviving: float | None

    @classmethod
    def of(cls, counted: update_survival.Tally) -> Damage:
        return cls(counted.weights, counted.crossing, counted.surviving)


def _damage(
    load: Loader, original: Prepared, model: Prepared, variant: str, form: Variant, ledger: Ledger
) -> tuple[Damage, dict[str, Damage]]:
    """Return the damage as a whole and by layer."""
    path = observations_file(ledger.folder, model, variant, WEIGHTS).with_suffix(".json")
    cache = digest(OBSERVATIONS_VERSION, original.fingerprint, model.fingerprint, form.identity)
    found = _read_damage(ledger.recall(path, cache))
    if found is None:
        before = load.original_weights(original)
        counted = update_survival.tallies(load(model).model, before, form.chain)
        layers = {layer: Damage.of(part) for layer, part in update_survival.by_layer(counted).items()}
        found = Damage.of(update_survival.total(counted.values())), layers
        saved = {layer: part._asdict() for layer, part in layers.items()}
        write_sealed(path, {"key": cache, "whole": found[0]._asdict(), "layers": saved})
        ledger.add(path)
    return found


def _read_damage(saved: dict[str, Any] | None) -> tuple[Damage, dict[str, Damage]] | None:
    """Return what was saved; None when there is nothing."""
    if saved is None:
        return None
    return Damage(**saved["whole"]), {layer: Damage(**part) for layer, part in saved["layers"].items()}
