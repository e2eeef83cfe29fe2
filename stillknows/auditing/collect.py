"""Collect observations of each model in each variant on each split; what a folder holds already is not made again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from stillknows.auditing.attack_record import AttackRecord, readable, record_file
from stillknows.auditing.evidence import CellKey
from stillknows.auditing.forecast import Forecast, Todo, cost
from stillknows.auditing.loader import OBSERVATIONS_VERSION, Loader, observations_file
from stillknows.auditing.observe import observe
from stillknows.auditing.prepared import Prepared
from stillknows.auditing.served import target_of
from stillknows.errors import UserError
from stillknows.ledger import LEDGER, Ledger
from stillknows.model.encoding import EncodedItem
from stillknows.model.target import Target
from stillknows.observations import load_observations, save_observations
from stillknows.progress import progress, warn
from stillknows.store import Serialized, digest
from stillknows.training.cost import CostMeter
from stillknows.types import FULL, Observations
from stillknows.variants.variant import Variant


class Keys:
    """Identify observations by everything that they depend on; items are written out once for all variants."""

    def __init__(self) -> None:
        self.items: dict[tuple[str, tuple[str, bool], str], Serialized] = {}

    def __call__(self, model: Prepared, variant: Variant, split: str) -> str:
        place = model.label, model.read_as(variant), split
        if place not in self.items:
            self.items[place] = Serialized.of([described(item) for item in model.reading(variant).candidates(split)])
        fields, decoding = model.observed(variant, split)
        defence = model.defended(variant)
        beside = [defence.identity] if defence else []
        how = sorted(fields), {k: v for k, v in asdict(decoding).items() if k != "temperatures" or v}
        parts = OBSERVATIONS_VERSION, model.fingerprint, variant.identity, self.items[place], how, *beside
        return digest(*parts, *model.beside, *model.inputs.identity(variant))

    def of_attack(self, model: Prepared, variant: Variant) -> str:
        """Identify what an attack found on a model, and what it took."""
        return digest(*(self(model, variant, split) for split in model.reading(variant).items))


def described(item: EncodedItem) -> dict[str, Any]:
    """Return everything of an item, its wording and its placebos where it has some."""
    return {name: value for name, value in asdict(item).items() if name not in ("wording", "placebos") or value}


def missing(model: Prepared, variants: Mapping[str, Variant], keys: Keys, ledger: Ledger) -> Todo:
    """Return what of one model the ledger does not hold yet; an attack of which it does not is made anew."""
    found: dict[str, list[str]] = {}
    for name, variant in variants.items():
        if variant.defended or model.defence or FULL not in variants:
            splits = list(model.reading(variant).items)
            is_recorded = variant.role != "attack" or recorded(model, name, variant, keys, ledger) is not None
            found[name] = [s for s in splits if not is_recorded or _is_missing(model, name, variant, s, keys, ledger)]
    return found


def recorded(model: Prepared, name: str, variant: Variant, keys: Keys, ledger: Ledger) -> AttackRecord | None:
    """Return what an attack took and found on a model; None where the ledger does not hold it."""
    return AttackRecord.read(ledger, record_file(ledger, model, name), keys.of_attack(model, variant))


def _is_missing(model: Prepared, name: str, variant: Variant, split: str, keys: Keys, ledger: Ledger) -> bool:
    """Tell whether observations have to be made. What others put in their place is told, and not trusted."""
    file, key = observations_file(ledger.folder, model, name, split), keys(model, variant, split)
    if ledger.load(file, key) is not None:
        return False
    if load_observations(file, key) is not None:
        warn(f"{file} is not what {LEDGER} names: it is measured again")
    return True


def observe_missing(
    load: Loader,
    model: Prepared,
    variants: Mapping[str, Variant],
    keys: Keys,
    ledger: Ledger,
    todo: Todo,
    forecast: Forecast,
) -> None:
    """Make the observations of one model in `todo`, one file after another."""
    with progress(f"observing {model.label}", sum(map(len, todo.values()))) as advance:
        for name, splits in todo.items():
            if not splits:
                continue
            variant, place = variants[name], record_file(ledger, model, name)
            key = keys.of_attack(model, variant)
            with _answering(load, model, variant, ledger, place) as (served, plain, record):
                for split in splits:
                    fields, decoding = model.observed(variant, split)
                    items = model.reading(variant).asked(split, plain)
                    started = time.monotonic()
                    seen = observe(served, items, fields=fields, decoding=decoding)
                    file = observations_file(ledger.folder, model, name, split)
                    save_observations(file, keys(model, variant, split), seen)
                    ledger.add(file)
                    took = time.monotonic() - started
                    record = replace(record, seconds=record.seconds + took)
                    if variant.role == "attack":
                        record.write(ledger, place, key)
                    forecast.measured(cost(model, variant, split), took)
                    advance(1, f"{name}, {split}")


@contextlib.contextmanager
def _answering(
    load: Loader, model: Prepared, variant: Variant, ledger: Ledger, place: Path
) -> Iterator[tuple[Target, Any, AttackRecord]]:
    """Give what answers in a variant, behind the model's own defence; the model in memory, None where it is served
    elsewhere; and what it took to make an attack, the vectors that it found beside `place`."""
    if model.served is not None:
        yield target_of(model, model.served), None, AttackRecord.of(model, variant, None, {})
        return
    target, defence, found = load(model), model.defended(variant), dict[str, Any]()
    with contextlib.ExitStack() as stack:
        with CostMeter(target.model) as meter:
            given = model.inputs.given(load.beside, lambda named: load.adapter(named or model.ref))
            answering = stack.enter_context(variant.applied(target.model, given, found))
        texts = readable(found, target.tokenizer, ledger, place)
        served = replace(target, model=defence.wrap(answering, target.tokenizer) if defence else answering)
        yield target_of(model, served), target.model, AttackRecord.of(model, variant, meter, texts)


def collected(
    model: Prepared, variants: Mapping[str, Variant], keys: Keys, ledger: Ledger
) -> dict[CellKey, Observations]:
    """Return the observations of one model that `observe_missing` has made. Raises UserError where one has vanished."""
    found = {}
    for name, variant in variants.items():
        for split in model.reading(variant).items:
            file = observations_file(ledger.folder, model, name, split)
            seen = ledger.load(file, keys(model, variant, split))
            if seen is None:
                raise UserError(f"{file} vanished while the audit ran", "run it again")
            found[CellKey(model.label, name, split)] = seen
    return found
