"""What a model reads in the place of a question."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence

from stillknows.errors import UserError
from stillknows.model.encoding import CHAT, framed, preceded
from stillknows.registry import register
from stillknows.types import Example
from stillknows.variants.retrieval import words

Rewrite = Callable[[str, str], tuple[str, str]]  # (question, template) -> (question, template)


@register("transform", role="defence", source="arXiv 2310.07579")
def icul(
    forget: Sequence[Example], retain: Sequence[Example], *, flipped: int = 1, kept: int = 4, seed: int = 0
) -> Rewrite:
    """In-context unlearning: questions to forget with wrong answers, then others with their own, come before each.

    The published form puts every item to forget into the context; here each question gets those whose words are most
    like its own, so that many items can be suppressed in a context of any length. Wrong answers are other items'.

    Args:
        flipped: how many questions to forget are shown, each with the answer to another one.
        kept: how many questions to keep follow, with their true answers, drawn by the seed.
        seed: of what is drawn.
    """
    _require(flipped >= 1 and kept >= 0, "icul: flipped must be at least 1 and kept at least 0")
    answers = sorted({e.answer for e in forget})
    _require(len(answers) > 1, "icul: all items to forget have one answer, so that there is no wrong one")
    _require(kept <= len(retain), f"icul: kept={kept}, but there are only {len(retain)} items to retain")
    draw = random.Random(seed)
    wrong = [(e.prompt, draw.choice([a for a in answers if a != e.answer])) for e in forget]
    shown = [(e.prompt, e.answer) for e in draw.sample(list(retain), kept)]
    vocabularies = [set(words(e.prompt)) for e in forget]

    def rewrite(question: str, template: str) -> tuple[str, str]:
        asked = set(words(question))
        overlaps = [len(asked & known) / max(1, len(asked | known)) for known in vocabularies]
        nearest = sorted(range(len(wrong)), key=lambda i: -overlaps[i])
        frame = "{prompt}" if template == CHAT else template
        lines = [f"{framed(q, frame)} {a}" for q, a in (*(wrong[i] for i in nearest[:flipped]), *shown)]
        context = "\n".join(lines)
        return preceded(context, question, template)

    return rewrite


@register(
    "transform",
    role="defence",
    source="arXiv 2406.07933 (a classifier before the model), with a text in the place of noise",
    aliases=("guard",),
)
def input_filter(
    forget: Sequence[Example],
    retain: Sequence[Example],
    *,
    threshold: float = 0.0,
    says: str = "This cannot be answered .",
) -> Rewrite:
    """A filter on the input: a question that looks like those to forget is not shown to the model.

    A naive Bayes classifier of words, ln P(words | forget) − ln P(words | retain) with one count added to each word,
    flags a question whose log-odds are above the threshold. The model is then asked `says` instead.

    Args:
        threshold: log-odds in nats above which a question is withheld; higher lets more through.
        says: what the model reads in the place of a withheld question.
    """
    _require(bool(says.strip()), "input_filter: says must hold words")
    counts = [Counter(word for e in items for word in words(e.prompt)) for items in (forget, retain)]
    vocabulary = len(set().union(*counts))
    _require(vocabulary > 0, "input_filter: the questions to forget and to retain hold no words")
    totals = [count.total() + vocabulary for count in counts]

    def log_odds(question: str) -> float:
        return sum(
            math.log((counts[0][word] + 1) / totals[0]) - math.log((counts[1][word] + 1) / totals[1])
            for word in words(question)
        )

    def rewrite(question: str, template: str) -> tuple[str, str]:
        return (says if log_odds(question) > threshold else question), template

    return rewrite


def _require(good: bool, what: str) -> None:
    if not good:
        raise UserError(what)
