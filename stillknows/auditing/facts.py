"""What an audit says of each single fact: leaked, cleared, or open."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stillknows.auditing.comparing import Scored, is_known, scored
from stillknows.auditing.evidence import MIN_GAP, CellKey, Table
from stillknows.auditing.fact_test import belongs
from stillknows.gate.placebo import FactResult, PlaceboTest
from stillknows.judgements import FactVerdict
from stillknows.stats import at_least
from stillknows.types import FULL, Floats

SILENT = (
    0.25  # of a fact with placebos: part of what the original gives beyond the controls, up to which a fact is not said
)
ENOUGH_TOLD = 0.8  # of the facts that the original knows: so many must be cleared, or the rest could hide a leak
LUCK = 0.01  # guesses explain so many suspicious facts as they show more often than this
GUESSABLE = "it stands out, and kept data give its answer to the same question, which is what models guess"
Gates = Mapping[str, Sequence[str]]  # by variant


class FactVerdicts(NamedTuple):
    """All facts of one model. luck: how likely as many would be suspicious of one that guesses, 0..1."""

    facts: tuple[FactVerdict, ...]
    luck: float = 1.0

    @property
    def leaked(self) -> list[FactVerdict]:
        """The facts that the model recites."""
        return [fact for fact in self.facts if fact.status == "leaked"]

    @property
    def suspicious(self) -> list[FactVerdict]:
        """The facts that it seems to know and of which nothing can be said."""
        return [fact for fact in self.facts if fact.suspicious]

    @property
    def is_luck(self) -> bool:
        """Whether guesses explain the suspicious facts."""
        return self.luck > LUCK

    @property
    def told(self) -> float:
        """The share of the facts that the original shows of which something can be said, 0..1."""
        shown = [fact.status != "open" for fact in self.facts if fact.original]
        return float(np.mean(shown)) if shown else 0.0

    @property
    def is_told(self) -> bool:
        """Whether the facts, taken one by one, are enough to judge by."""
        return self.told >= ENOUGH_TOLD


class _Seen(NamedTuple):
    """What gates show of the facts of one model.

    known: by variant. seeming: of those, the ones that tell something of a single fact. blind: facts known where
        they have no placebos. silent: that no usual gate finds said. original: that the original shows. parts: of each
        fact's truth and placebos, what all gates of a variant find said on a split, 1 as by the original, where that
        is most.
    """

    known: dict[str, set[str]]
    seeming: dict[str, set[str]]
    blind: set[str]
    silent: set[str]
    original: set[str]
    parts: dict[str, Floats]


def fact_verdicts(
    table: Table,
    subject: str,
    gates: Gates,
    usual: Sequence[str],
    test: PlaceboTest | None,
    *,
    half: bool = False,
    guesses_pass: bool = True,
) -> FactVerdicts:
    """Judge each fact by the placebo test and by the gates of all variants.

    Args:
        gates: by variant. usual: those of the policy; an attack's own metrics tell single facts only where they score
            placebos as well, since a choice among four is guessed.
        guesses_pass: a fact is not known that a control gives as well; otherwise it is, if it lies above its placebos
            or the control has as much as the original.
        half: a fact must be one that would be named if it were known half as well as by the original.
    """
    seen = _seen(table, subject, gates, usual, guesses_pass)
    results = {fact.fact: fact for fact in test.facts} if test else {}
    names = dict.fromkeys(
        f for place, facts in table.facts.items() if place.split in table.forget_splits for f in facts
    )
    facts = tuple(_verdict(fact, results.get(fact), seen, half, fact in table.guessable) for fact in names)
    return FactVerdicts(facts, _luck(facts, seen))


def _luck(facts: Sequence[FactVerdict], seen: _Seen) -> float:
    """Return how likely as many facts would be said as clearly as the suspicious ones, were each truth one of its
    placebos; 0 where one of them has none, or is a guess that stands out from its placebos.

    The clearest is compared with the clearest guesses, the two clearest with two of them, and so on; the least likely
    counts, times their number.
    """
    suspicious = [fact.fact for fact in facts if fact.suspicious]
    if any(fact.why == GUESSABLE for fact in facts):
        return 0.0
    if any(name in seen.blind or name not in seen.parts for name in suspicious):
        return 0.0
    others = [seen.parts[fact.fact][1:] for fact in facts if fact.status != "leaked" and fact.fact in seen.parts]
    levels = sorted((float(seen.parts[name][0]) for name in suspicious), reverse=True)
    found = [
        at_least(count, [float(np.mean(own >= level)) for own in others if own.size])
        for count, level in enumerate(levels, 1)
    ]
    return min(1.0, len(found) * min(found, default=1.0)) if found else 1.0


def _is_tested(result: FactResult | None, half: bool) -> bool:
    """Tell whether the placebo test would name a fact that is known as well as by the original, or half as well."""
    return result is not None and not result.untestable and bool(result.found_half if half else result.found)


def _verdict(fact: str, result: FactResult | None, seen: _Seen, half: bool, guessable: bool) -> FactVerdict:
    known = tuple(variant for variant, facts in seen.known.items() if fact in facts)
    original = fact in seen.original
    if result and result.named and any(belongs(name, v) for v in known for name in result.variants):
        if guessable:
            return FactVerdict(fact, "open", True, known, original, GUESSABLE)
        return FactVerdict(fact, "leaked", False, known, original)
    seeming = any(fact in facts for facts in seen.seeming.values())
    if not seeming and (_is_tested(result, half) or fact in seen.silent):
        return FactVerdict(fact, "cleared", False, known, original)
    return FactVerdict(fact, "open", seeming, known, original, _why(result, original))


def _why(result: FactResult | None, original: bool) -> str:
    if not original:
        return "the original does not show it"
    if result is None:
        return "it has no placebos"
    if not result.untestable and result.found:
        return "it seems to be known, and does not stand out from its placebos"
    return result.untestable or "it would not be named even if it were known as before"


def _seen(table: Table, subject: str, gates: Gates, usual: Sequence[str], guesses_pass: bool) -> _Seen:
    known: dict[str, set[str]] = {variant: set() for variant in gates}
    seeming: dict[str, set[str]] = {variant: set() for variant in gates}
    blind, said, told, original = set[str](), set[str](), set[str](), set[str]()
    parts: dict[str, dict[CellKey, Floats]] = {}
    for variant, place, gate in _places(table, subject, gates):
        found, names = scored(table, place, gate), np.array(table.facts[place], dtype=object)
        is_usual = tuple(gates[variant]) == tuple(usual)
        known[variant] |= {*names[found.known]}
        if not guesses_pass and is_usual:
            known[variant] |= {*names[_guessed(found)]}
        seeming[variant] |= known[variant] & {*names[found.relative | is_usual]}
        for f in np.flatnonzero(found.relative):
            own, at = found.part_FC[f][~np.isnan(found.part_FC[f])], parts.setdefault(names[f], {})
            at[place] = _shortest(np.minimum, at[place], own) if place in at else own
        if not is_usual:
            continue
        blind |= {*names[found.known & ~found.relative]}
        said |= {*names[_said(found)]}
        if variant == FULL or FULL not in gates:
            told |= {*names[found.relative & (found.o - found.c > MIN_GAP)]}
            original |= {*names[found.o > MIN_GAP]}
    largest = {
        fact: functools.reduce(functools.partial(_shortest, np.maximum), at.values()) for fact, at in parts.items()
    }
    return _Seen(known, seeming, blind, told - said, original, largest)


def _shortest(combine: Callable[..., Floats], one: Floats, other: Floats) -> Floats:
    """Combine what two cells say of a fact's candidates, as far as both have them."""
    count = min(len(one), len(other))
    return combine(one[:count], other[:count])


def _guessed(found: Scored) -> NDArray[np.bool_]:
    """Tell which facts would be known without the controls, by any question: an answer's form is no guess at one."""
    alone, any_question = (is_known(s, np.zeros_like(found.c), found.o) for s in (found.s, found.most))
    return np.where(found.relative, any_question, alone & found.comparable & (found.o - found.c <= MIN_GAP))


def _said(found: Scored) -> NDArray[np.bool_]:
    """Tell of which facts a gate cannot exclude that they are said; NaN is one of them."""
    most = np.maximum(SILENT * (found.o - found.c), MIN_GAP)
    return ~(found.comparable & (found.s - found.c <= most))


def _places(table: Table, subject: str, gates: Gates) -> Iterator[tuple[str, CellKey, str]]:
    for variant, names in gates.items():
        for split in table.forget_splits:
            yield from ((variant, CellKey(subject, variant, split), gate) for gate in names)
