"""What the goal of a run asks: every fact's truth beside its placebos, in wordings and frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stillknows.model.encoding import EncodedAnswer
from stillknows.types import Example
from stillknows.unlearning import exchanged_answers, frames, rewording
from stillknows.unlearning.alternative_answers import Answering

AS_TRAINED = "as trained"
PLACEBOS = 7
ASKED = 64  # facts that are asked for
PLACEBO_SEED = 7919  # added to the seed, so that placebos are other draws than the answers trained on


def probes(
    forget: Sequence[EncodedAnswer],
    others: Sequence[Sequence[Example]],
    retain: Sequence[EncodedAnswer],
    how: Answering,
) -> dict[str, list[EncodedAnswer]]:
    """Return by wording the truth and the placebos of every fact, one after another: as trained, in the benchmark's
    other wordings, in those in which kept facts are asked, and in frames that are not trained on.

    Args:
        others: further wordings of the facts to forget, by split.
    """
    examples = [item.example for item in retain]
    wordings = {AS_TRAINED: [item.example for item in forget]}
    wordings |= {f"other wording {k}": found for k, found in enumerate(others, 1)}
    asked = spread(wordings[AS_TRAINED], ASKED)
    kept_wordings = rewording.rewordings(asked, examples)
    wordings |= {f"worded as kept facts {k}": found for k, found in enumerate(kept_wordings, 1)}
    found = {name: _encoded(spread(texts, ASKED), examples, how) for name, texts in wordings.items()}
    for frame in frames.HELD_OUT:
        if any(frames.changes(frame, e.prompt, how.template) for e in asked):
            found[frame] = _encoded(asked, examples, how, frame)
    return found


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most so many of the items, evenly over all of them."""
    return [items[len(items) * k // most] for k in range(most)] if len(items) > most else list(items)


def _encoded(
    asked: Sequence[Example], others: Sequence[Example], how: Answering, frame: str = frames.AS_ASKED
) -> list[EncodedAnswer]:
    """Return every fact's question with its truth and its placebos, in a frame."""
    placebos = exchanged_answers.draws(asked, others, PLACEBOS, how.seed + PLACEBO_SEED)
    return [
        how.framed(example, text, frame)
        for example, found in zip(asked, placebos, strict=True)
        for text in (example.answer, *found)
    ]
