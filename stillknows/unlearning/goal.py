"""When a run has forgotten enough: what was to be forgotten scores as guesses do, and what is kept stays.

A guess is the score of placebos: answers that could as well have been true, as the model gives them before it is
unlearned or by then, whichever is higher. Truth and placebos are asked in the trained wording, in frames that were not
trained on, in the benchmark's other wordings and in those in which kept facts are asked; the worst counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from stillknows.errors import UserError
from stillknows.formatting import number
from stillknows.lazy import Tensor, nn, torch
from stillknows.model.encoding import EncodedAnswer
from stillknows.model.forward import score_items
from stillknows.model.layers import output_layer
from stillknows.progress import log
from stillknows.training.settings import Settings
from stillknows.types import Example
from stillknows.unlearning import exchanged_answers, frames, rewording
from stillknows.unlearning.alternative_answers import Answering

ROUNDS, ROUND_STEPS = 12, 40
LEAST_ROUNDS = 3  # each makes the truth one of more answers that were learned once, in wordings that nobody asked too
PLACEBOS = 7
ASKED, KEPT = 64, 192  # facts and kept items that are looked at
PLACEBO_SEED = 7919  # added to the seed, so that placebos are other draws than the answers trained on
SHOWN = 0.25  # of what a model shows of its knowledge as trained, that a wording must show to be looked at
TOLERANCE = 0.05  # of the way from a guess to the original that may be left
FLOOR, LOST = 0.95, 0.05  # least retain score as a share of the original's; most kept facts that may be lost

MET = "the goal was met at a check"  # why training ended; what the model is in the end has a status

Status = Literal["target met", "floor bound", "step limit"]


def require_questions(items: Sequence[EncodedAnswer], benchmark: str) -> None:
    """Raise UserError for plain texts, whose placebos nobody knows."""
    if any(not item.example.prompt for item in items):
        raise UserError(
            f"{benchmark} has plain texts to forget, and guesses are known for answers to questions only",
            "say how long to train with `epochs`",
        )


class Seen(NamedTuple):
    """What a check saw.

    forget, guess: mean answer probability of the true answers in the wording where it is farthest above its guess, and
    that guess, 0..1. excess: how far it is from the guess towards the original: 0 as guessed, 1 as the original.
    first: largest share of facts whose truth is likelier than all of its placebos. likelier: share of the placebos
    that are likelier than their truth, ½ as guessed, in that wording. retain: score as a share of the original's.
    lost: share of the kept items whose answer probability is below half of the original's.
    """

    forget: float
    guess: float
    excess: float
    first: float
    likelier: float
    retain: float
    lost: float


def settings_for(settings: Settings) -> Settings:
    """Return settings of a run that ends when its goal is met: rounds, in each of which the rate falls to 0."""
    return replace(
        settings, schedule="rounds", round_steps=ROUND_STEPS, check_every=ROUND_STEPS, max_steps=ROUNDS * ROUND_STEPS,
        epochs=1e9, retain_batch_size=settings.retain_batch_size or 2 * settings.batch_size,
    )  # fmt: skip


@dataclass
class Goal:
    """The goal of one run, measured on the model as it is at each call. Made before the first step."""

    model: nn.Module
    probes: Mapping[str, Sequence[EncodedAnswer]]  # by wording: each fact's truth, then its placebos
    kept: Sequence[EncodedAnswer]

    def __post_init__(self) -> None:
        before = {name: self._measured(name) for name in self.probes}
        self.guess = {name: float(p_FC[:, 1:].mean()) for name, p_FC in before.items()}
        self.known = {name: float(p_FC[:, 0].mean()) for name, p_FC in before.items()}
        trained, *others = self.probes
        least = SHOWN * max(0.0, self.known[trained] - self.guess[trained])
        self.looked_at = [trained, *(name for name in others if self.known[name] - self.guess[name] > least)]
        self.facts = len(before[trained])
        self.kept_before_N = self._probabilities(self.kept)
        self.start = self._seen(before, self.kept_before_N)

    @classmethod
    def of(
        cls, model: nn.Module, forget: Sequence[EncodedAnswer], others: Sequence[Sequence[Example]],
        retain: Sequence[EncodedAnswer], how: Answering,
    ) -> Goal:  # fmt: skip
        """Make the goal of a benchmark's items.

        Args:
            others: further wordings of the facts to forget, by split.
        """
        examples = [item.example for item in retain]
        wordings = {"as trained": [item.example for item in forget]}
        wordings |= {f"other wording {k}": found for k, found in enumerate(others, 1)}
        asked = _spread(wordings["as trained"], ASKED)
        kept_wordings = rewording.rewordings(asked, examples)
        wordings |= {f"worded as kept facts {k}": found for k, found in enumerate(kept_wordings, 1)}
        probes = {name: _encoded(_spread(found, ASKED), examples, how) for name, found in wordings.items()}
        for frame in frames.HELD_OUT:
            if any(frames.changes(frame, e.prompt, how.template) for e in asked):
                probes[frame] = _encoded(asked, examples, how, frame)
        return cls(model, probes, _spread(retain, KEPT))

    def seen(self) -> Seen:
        """Measure the model as it is."""
        return self._seen({name: self._measured(name) for name in self.looked_at}, self._probabilities(self.kept))

    def _seen(self, measured: Mapping[str, Tensor], now_N: Tensor) -> Seen:
        wordings: list[tuple[float, float, float, float, float]] = []
        for name in self.looked_at:
            p_FC = measured[name]
            forget, guess = float(p_FC[:, 0].mean()), max(self.guess[name], float(p_FC[:, 1:].mean()))
            span = self.known[name] - guess
            above_FC = p_FC[:, 1:] >= p_FC[:, :1]
            first, likelier = float((~above_FC.any(1)).double().mean()), float(above_FC.double().mean())
            wordings.append(((forget - guess) / span if span > 0 else 0.0, forget, guess, first, likelier))
        excess, forget, guess, _, likelier = max(wordings)
        lost = float((now_N < self.kept_before_N / 2).double().mean()) if len(now_N) else 0.0
        retain = float(now_N.sum() / self.kept_before_N.sum()) if len(now_N) else 1.0
        return Seen(forget, guess, excess, max(first for *_, first, _ in wordings), likelier, retain, lost)

    def look(self) -> Mapping[str, float]:
        """Measure the model and say what was seen; for the history of a run."""
        seen = self.seen()
        log(f"  {self.words(seen)}")
        return seen._asdict()

    def enough(self, seen: Mapping[str, float]) -> str:
        """Return why a run may end after this check, "" while it must go on."""
        if seen["step"] < LEAST_ROUNDS * ROUND_STEPS:
            return ""
        status = self.status(Seen(**{name: seen[name] for name in Seen._fields}))
        return MET if status == "target met" else ""

    def status(self, seen: Seen) -> Status:
        """Return what a run has come to; anything but "target met" calls for more steps while there are some."""
        if not (seen.excess <= TOLERANCE and seen.first <= self._most_first()):
            return "step limit"
        return "target met" if seen.retain >= FLOOR and seen.lost <= LOST else "floor bound"

    def words(self, seen: Seen) -> str:
        """Return the scores and their targets in a sentence's part."""
        return (
            f"forget {number(seen.forget)} (guessed {number(seen.guess)}), truth first in {number(seen.first)} "
            f"of the facts (at most {number(self._most_first())}); retain {number(seen.retain)} of the original's "
            f"(at least {FLOOR}), {number(seen.lost)} lost"
        )

    def _most_first(self) -> float:
        """Return the share of facts in which a model that guesses has the truth first, and two standard errors."""
        chance = 1 / (PLACEBOS + 1)
        return chance + 2 * math.sqrt(chance * (1 - chance) / self.facts)

    def _measured(self, name: str) -> Tensor:
        """Return the answer probabilities of every fact in a wording, [F, C]: its truth, then its placebos."""
        return self._probabilities(self.probes[name]).reshape(-1, PLACEBOS + 1)

    def _probabilities(self, items: Sequence[EncodedAnswer]) -> Tensor:
        """Return exp(mean ln p) of every item's answer, [N] in float64."""
        scores = dict(score_items(self.model, output_layer(self.model), items, with_distribution=()))
        found = [scores[i].log_probs.double().mean().exp() for i in range(len(items))]
        return torch.stack(found).cpu() if found else torch.zeros(0, dtype=torch.float64)

    def outcome(self) -> dict[str, Any]:
        """Return what a run's record holds of the goal, with the model as it is at its end, and a sentence on it."""
        end = self.seen()
        status = self.status(end)
        return {
            "status": status,
            "sentence": self._sentence(status, end),
            "start": self.start._asdict(),
            "end": end._asdict(),
            "guess": self.guess,
            "known": self.known,
            "looked_at": self.looked_at,
        }

    def _sentence(self, status: Status, end: Seen) -> str:
        score = f"forget {number(self.start.forget)} → {number(end.forget)}, where {number(end.guess)} is guessed"
        kept = f"retain {number(end.retain)} of the original's, {number(end.lost)} of the kept items lost"
        if status == "target met":
            return f"forgotten to the level of guesses: {score}; {kept}"
        if status == "floor bound":
            return f"forgotten to the level of guesses, but too much was lost with it: {score}; {kept}"
        return (
            f"not forgotten: {score}, and the truth is likelier than {PLACEBOS} other answers in {number(end.first)} "
            f"of the facts, where {number(self._most_first())} can be guessed; {kept}"
        )


def _spread(items: Sequence[Any], most: int) -> list[Any]:
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
