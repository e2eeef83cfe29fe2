"""How deep in each model of an audit knowledge is left: its hidden states between the original's and the control's."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from stillknows.auditing.loader import OBSERVATIONS_VERSION, Loader, observations_file
from stillknows.auditing.prepared import Prepared
from stillknows.depth.measure import DepthScale
from stillknows.depth.outcome import Depth, judged
from stillknows.depth.states import HookCache, hook_cache, only_answer
from stillknows.formatting import number
from stillknows.labels import is_control
from stillknows.ledger import Ledger
from stillknows.model.encoding import EncodedAnswer, EncodedItem
from stillknows.model.layers import blocks
from stillknows.progress import log, progress
from stillknows.store import digest, write_sealed
from stillknows.types import CONTROL, FULL, ORIGINAL, Benchmark
from stillknows.variants.variant import parse_variant

DEPTH = "depth"  # in the place of a split's name
DEPTH_VERSION = 1  # raise when the signals change their meaning
FACTS = 64  # at most, spread over the split
KNOWN = 256  # kept questions, likewise


class _Asked(NamedTuple):
    """The items of an audit's first split to forget, one for each fact, and kept questions."""

    items: list[EncodedItem]
    answers: list[EncodedAnswer]
    known: list[EncodedAnswer]

    @classmethod
    def of(cls, original: Prepared, benchmark: Benchmark) -> _Asked:
        reading = original.reading(parse_variant(FULL)._replace(defended=False))
        splits = {
            role: [s.name for s in benchmark.splits if s.role == role] for role in ("forget", "retain", "neighbour")
        }
        facts = {item.answer.example.fact: item for item in reversed(reading.items[splits["forget"][0]])}
        items = _spread(list(reversed(facts.values())), FACTS)
        kept = [item.answer for name in splits["retain"] + splits["neighbour"] for item in reading.items[name]]
        known = _spread([item for item in kept if item.example.prompt], KNOWN)
        return cls(items, [only_answer(item.answer) for item in items], known)

    @property
    def identity(self) -> list[Any]:
        items = [[i.answer.ids, i.answer.start, [p.ids for p in i.placebos]] for i in self.items]
        return [items, [[item.ids, item.start] for item in self.known]]

    @property
    def tokens(self) -> int:
        """How many are read when all answers are."""
        return sum(len(item.ids) for item in self.answers)


def _spread(items: list[Any], most: int) -> list[Any]:
    """Return so many of the items, from first to last at equal distances; all where there are no more."""
    count = min(most, len(items))
    return [items[k * len(items) // count] for k in range(count)]


def depths(load: Loader, prepared: Sequence[Prepared], benchmark: Benchmark, ledger: Ledger) -> dict[str, Depth]:
    """Return by model the signals of knowledge in its hidden states; what the ledger holds is not measured again.

    prepared: the models of an audit, the original first.
    """
    asked = _Asked.of(prepared[0], benchmark)
    control = next((model for model in prepared if model.label == CONTROL), None)
    against = [prepared[0].fingerprint, control and control.fingerprint, asked.identity]
    places = {
        model.label: (
            observations_file(ledger.folder, model, FULL, DEPTH).with_suffix(".json"),
            digest(OBSERVATIONS_VERSION, DEPTH_VERSION, model.fingerprint, *against),
        )
        for model in prepared
    }
    saved = {label: ledger.recall(*place) for label, place in places.items()}
    missing = [model for model in prepared if saved[model.label] is None]
    if missing:
        for label, depth in _measured(load, prepared, control, missing, asked):
            path, key = places[label]
            saved[label] = write_sealed(path, {"key": key, **depth.to_json()})
            ledger.add(path)
    found = {label: Depth.from_json(content) for label, content in saved.items() if content is not None}
    return judged(found, [label for label in found if is_control(label)])


def _measured(
    load: Loader, prepared: Sequence[Prepared], control: Prepared | None, missing: Sequence[Prepared], asked: _Asked
) -> list[tuple[str, Depth]]:
    original, caches = prepared[0], dict[str, HookCache]()
    needed = [m for m in prepared if m.label != ORIGINAL and (m is control or m in missing)]
    with progress("hidden states", len(needed) + 1 + len(missing)) as advance:
        for model in [*needed, original]:  # the original last: it stays in memory
            started = time.monotonic()
            caches[model.label] = hook_cache(load(model).model, asked.answers, asked.known)
            if len(caches) == 1:
                _tell(asked, len(needed) + 1, time.monotonic() - started, len(blocks(load(model).model)))
            advance(1, model.label)
        scale = DepthScale(load(original).model, *asked, caches[ORIGINAL], caches[control.label] if control else None)
        found = []
        for model in missing:
            found.append((model.label, scale.depth(caches[model.label])))
            advance(1, f"{model.label}, patched into the original")
    return found


def _tell(asked: _Asked, models: int, seconds: float, blocks: int) -> None:
    """Say how long all will take, at the speed of the first model's reading."""
    read = 4 * asked.tokens + sum(item.start for item in asked.known)  # a backward pass takes about two forward ones
    total = models * (read + blocks * asked.tokens)
    log(f"depth will take about {number(seconds * total / read / 60, digits=1)} minutes")
