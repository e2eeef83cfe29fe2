"""A run's first look at what an audit will ask: does its goal hold in 4 bits and after a short relearning too?

It asks by the goal's own scores and words, in a minute and on the model in memory. It decides nothing: the audit does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stillknows.formatting import number
from stillknows.lazy import nn
from stillknows.model.encoding import EncodedAnswer
from stillknows.model.parameters import Snapshot, restored
from stillknows.progress import log
from stillknows.training.finetune import finetune
from stillknows.training.settings import Settings
from stillknows.unlearning.goal import TOLERANCE, Goal, Seen
from stillknows.variants.compress import compressed, parse_variant
from stillknows.variants.fitting import fitted

FORMAT = "int4"
RELEARNING = Settings(1e-4, 5.0, 5)  # as an audit's relearn(steps=5)


def self_check(model: nn.Module, goal: Goal, forget: Sequence[EncodedAnswer], end: Seen) -> dict[str, Any]:
    """Return what the goal sees in full precision, in 4 bits and after relearning half of the facts, and a sentence.

    Args:
        end: what it saw of the model as it is.
    """
    log("  looking at it in 4 bits, and after a short relearning")
    found = {"full": end}
    name, chain = fitted(model, parse_variant(FORMAT), FORMAT, exact=False)
    with compressed(model, chain):
        found[name] = goal.seen()
    taught = list(dict.fromkeys(item.example.fact for item in forget))[::2]
    with restored(model, Snapshot(model)):
        finetune(model, [item for item in forget if item.example.fact in taught], RELEARNING, label="relearning")
        found["relearn:steps=5"] = goal.seen(without=frozenset(taught))
    return {"seen": {name: seen._asdict() for name, seen in found.items()}, "sentence": _sentence(found)}


def _sentence(found: dict[str, Seen]) -> str:
    kept = ", ".join(f"{name} {number(max(0.0, seen.excess))}" for name, seen in found.items())
    shown = [name for name, seen in found.items() if seen.excess > 2 * TOLERANCE]
    if shown:
        return f"the audit would find knowledge in {' and '.join(shown)} (kept above guesses: {kept})"
    return f"the audit would find no knowledge in these (kept above guesses: {kept})"
