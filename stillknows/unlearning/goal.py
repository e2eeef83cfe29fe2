"""When a run has forgotten enough: what was to be forgotten scores as guesses do, and what is kept stays.

Scores are those that an audit judges by: answer probability and extraction strength. A guess is the score of placebos,
answers that could as well have been true, as the model gives them before it is unlearned or by then, whichever is
higher; where never-taught models are at hand, their own lead of the truth over placebos comes on top. Truth and
placebos are asked in the trained wording, in frames that were not trained on, in the benchmark's other wordings and in
those in which kept facts are asked; the worst counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from stillknows.errors import UserError
from stillknows.formatting import number
from stillknows.lazy import Tensor, nn, torch
from stillknows.model.encoding import EncodedAnswer
from stillknows.model.forward import score_items
from stillknows.model.layers import output_layer
from stillknows.model.ref import ModelRef
from stillknows.progress import log
from stillknows.training.settings import Settings
from stillknows.training.watch import Seen as History
from stillknows.training.watch import Watch
from stillknows.types import Example
from stillknows.unlearning import exchanged_answers, frames, rewording
from stillknows.unlearning.alternative_answers import Answering

ROUNDS, ROUND_STEPS = 12, 40
LEAST_ROUNDS = 3  # each makes the truth one of more answers that were learned once, in wordings that nobody asked too
PLACEBOS = 7
ASKED, KEPT = 64, 192  # facts and kept items that are looked at
PLACEBO_SEED = 7919  # added to the seed, so that placebos are other draws than the answers trained on
SHOWN = 0.25  # of what a model shows of its knowledge as trained, that a wording must show to be looked at
TOLERANCE = 0.05  # of the way from a guess to the original that may be left, on average
KNOWN = 0.1  # of the facts that may be more than half of that way from their guess
FLOOR, LOST = 0.95, 0.05  # least retain score as a share of the original's; most kept facts that may be lost
SLOWER = 0.5  # times the rate after a check at which too little was kept
AS_TRAINED = "as trained"

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

    forget, guess: mean score of the true answers in the wording and by the score where they are farthest above their
    guess, and that guess, 0..1. excess: how far it is from the guess towards the original: 0 as guessed, 1 as the
    original. first: largest share of facts whose truth is likelier than all of its placebos. known: share of facts that
    are more than half of the way from their guess to the original, in some wording, by some score. likelier: share of
    the placebos that are likelier than their truth, ½ as guessed, in the wording of `forget`. retain: score as a share
    of the original's, the lower of the two. lost: share of the kept items of which less than half of a score is left.
    """

    forget: float
    guess: float
    excess: float
    first: float
    known: float
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
class Goal(Watch):
    """The goal of one run, measured on the model as it is at each call. Made before the first step.

    Scores have the letters F facts, C candidates (the truth, then its placebos), G scores, N kept items.

    probes: by wording, each fact's truth, then its placebos. lead: by wording, by how much never-taught models score
    the truth above its placebos, [F, G]; none where there are no such models.
    """

    model: nn.Module
    probes: Mapping[str, Sequence[EncodedAnswer]]
    kept: Sequence[EncodedAnswer]
    lead: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        before = {name: self._measured(name) for name in self.probes}
        self.guess_FG = {name: self._guessed(name, s_FCG) for name, s_FCG in before.items()}
        self.known_FG = {name: s_FCG[:, 0] for name, s_FCG in before.items()}
        shown = {name: float((self.known_FG[name] - self.guess_FG[name])[:, 0].mean()) for name in before}
        least = SHOWN * max(0.0, shown[AS_TRAINED])
        self.looked_at = [name for name in before if name == AS_TRAINED or shown[name] > least]
        self.facts = len(before[AS_TRAINED])
        self.kept_before_NG = scores(self.model, self.kept)
        self.start = self._seen(before, self.kept_before_NG)

    @classmethod
    def of(
        cls, model: nn.Module, forget: Sequence[EncodedAnswer], others: Sequence[Sequence[Example]],
        retain: Sequence[EncodedAnswer], how: Answering, controls: Sequence[ModelRef] = (),
    ) -> Goal:  # fmt: skip
        """Make the goal of a benchmark's items.

        Args:
            others: further wordings of the facts to forget, by split.
            controls: never-taught models, which are loaded one after another.
        """
        examples = [item.example for item in retain]
        wordings = {AS_TRAINED: [item.example for item in forget]}
        wordings |= {f"other wording {k}": found for k, found in enumerate(others, 1)}
        asked = _spread(wordings[AS_TRAINED], ASKED)
        kept_wordings = rewording.rewordings(asked, examples)
        wordings |= {f"worded as kept facts {k}": found for k, found in enumerate(kept_wordings, 1)}
        probes = {name: _encoded(_spread(found, ASKED), examples, how) for name, found in wordings.items()}
        for frame in frames.HELD_OUT:
            if any(frames.changes(frame, e.prompt, how.template) for e in asked):
                probes[frame] = _encoded(asked, examples, how, frame)
        return cls(model, probes, _spread(retain, KEPT), _leads(controls, probes))

    def seen(self) -> Seen:
        """Measure the model as it is."""
        return self._seen({name: self._measured(name) for name in self.looked_at}, scores(self.model, self.kept))

    def _seen(self, measured: Mapping[str, Tensor], now_NG: Tensor) -> Seen:
        found: list[tuple[float, float, float, float]] = []
        first, known_F = 0.0, torch.zeros(self.facts, dtype=torch.bool)
        for name in self.looked_at:
            s_FCG = measured[name]
            guess_FG = torch.maximum(self.guess_FG[name], self._guessed(name, s_FCG))
            above_FC = s_FCG[:, 1:, 0] >= s_FCG[:, :1, 0]
            first = max(first, float((~above_FC.any(1)).double().mean()))
            far_FG = s_FCG[:, 0] - guess_FG > (self.known_FG[name] - guess_FG).clamp(min=0) / 2
            known_F |= (far_FG & (self.known_FG[name] > guess_FG)).any(1)
            forget_G, guess_G = s_FCG[:, 0].mean(0), guess_FG.mean(0)
            span_G = self.known_FG[name].mean(0) - guess_G
            excess_G = torch.where(span_G > 0, (forget_G - guess_G) / span_G, 0.0)
            likelier = float(above_FC.double().mean())
            columns = map(Tensor.tolist, (excess_G, forget_G, guess_G))
            found += [(*row, likelier) for row in zip(*columns, strict=True)]
        excess, forget, guess, likelier = max(found)
        kept = (1.0, 0.0)
        if len(now_NG):
            kept_G = now_NG.sum(0) / self.kept_before_NG.sum(0)
            lost = float((now_NG < self.kept_before_NG / 2).any(1).double().mean())
            kept = float(kept_G[kept_G.isfinite()].min()), lost
        return Seen(forget, guess, excess, first, float(known_F.double().mean()), likelier, *kept)

    def look(self) -> History:
        """Measure the model and say what was seen; for the history of a run."""
        seen = self.seen()
        log(f"  {self.words(seen)}")
        return seen._asdict()

    def enough(self, seen: History) -> str:
        """Return why a run may end after this check, "" while it must go on."""
        if seen["step"] < LEAST_ROUNDS * ROUND_STEPS:
            return ""
        return MET if self.status(_of_history(seen)) == "target met" else ""

    def pace(self, history: Sequence[History]) -> float:
        """Return the share of the rate that is left: it is lowered after every check at which too little was kept."""
        return SLOWER ** sum(not keeps(_of_history(seen)) for seen in history)

    def note(self, loss: float, history: Sequence[History]) -> str:
        """Return where the scores stand, and where they have to be."""
        seen = _of_history(history[-1]) if history else self.start
        return f"forget {number(seen.forget)} (guessed {number(seen.guess)}), retain {number(seen.retain)} (≥ {FLOOR})"

    def status(self, seen: Seen) -> Status:
        """Return what a run has come to; anything but "target met" calls for more steps while there are some."""
        if seen.excess > TOLERANCE or seen.known > KNOWN or seen.first > self._most_first():
            return "step limit"
        return "target met" if keeps(seen) else "floor bound"

    def words(self, seen: Seen) -> str:
        """Return the scores and their targets in a sentence's part."""
        return (
            f"forget {number(seen.forget)} (guessed {number(seen.guess)}), {number(seen.known)} of the facts known "
            f"(at most {KNOWN}), truth first in {number(seen.first)} (at most {number(self._most_first())}); "
            f"retain {number(seen.retain)} of the original's (at least {FLOOR}), {number(seen.lost)} lost"
        )

    def _most_first(self) -> float:
        """Return the share of facts in which a model that guesses has the truth first, and two standard errors."""
        chance = 1 / (PLACEBOS + 1)
        return chance + 2 * math.sqrt(chance * (1 - chance) / self.facts)

    def _measured(self, name: str) -> Tensor:
        return candidate_scores(self.model, self.probes[name])

    def _guessed(self, name: str, s_FCG: Tensor) -> Tensor:
        """Return what can be guessed of every fact, [F, G], given what the model says of all candidates."""
        return s_FCG[:, 1:].mean(1) + self.lead.get(name, torch.zeros(1, 1))

    def outcome(self) -> dict[str, Any]:
        """Return what a run's record holds of the goal, with the model as it is at its end, and a sentence on it."""
        end = self.seen()
        status = self.status(end)
        return {
            "status": status,
            "sentence": self._sentence(status, end),
            "start": self.start._asdict(),
            "end": end._asdict(),
            "guess": {name: float(found_FG[:, 0].mean()) for name, found_FG in self.guess_FG.items()},
            "known": {name: float(found_FG[:, 0].mean()) for name, found_FG in self.known_FG.items()},
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
            f"not forgotten: {score}, {number(end.known)} of the facts are known, and the truth is likelier than "
            f"{PLACEBOS} other answers in {number(end.first)} of them, where {number(self._most_first())} can be "
            f"guessed; {kept}"
        )


def keeps(seen: Seen) -> bool:
    """Tell whether enough is kept, on average and item by item."""
    return seen.retain >= FLOOR and seen.lost <= LOST


def scores(model: nn.Module, items: Sequence[EncodedAnswer]) -> Tensor:
    """Return every item's answer probability, exp(mean ln p), and extraction strength, [N, 2] in float64."""
    found = dict(score_items(model, output_layer(model), items))
    rows = []
    for i, item in enumerate(items):
        hits_A = found[i].hits[:-1] if item.ends else found[i].hits
        tail = int(hits_A.flip(0).long().cumprod(0).sum())
        rows.append([float(found[i].log_probs.double().mean().exp()), tail / max(1, len(hits_A))])
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 2)


def candidate_scores(model: nn.Module, items: Sequence[EncodedAnswer]) -> Tensor:
    """Return the scores of every fact in a wording, [F, C, G]: its truth, then its placebos."""
    return scores(model, items).reshape(-1, PLACEBOS + 1, 2)


def _leads(controls: Sequence[ModelRef], probes: Mapping[str, Sequence[EncodedAnswer]]) -> dict[str, Tensor]:
    """Return by how much never-taught models score truths above placebos, the largest lead of each fact, ≥ 0."""
    found: dict[str, Tensor] = {}
    for control in controls:
        model = control.load().model
        for name, items in probes.items():
            s_FCG = candidate_scores(model, items)
            lead_FG = (s_FCG[:, 0] - s_FCG[:, 1:].mean(1)).clamp(min=0)
            found[name] = torch.maximum(found[name], lead_FG) if name in found else lead_FG
    return found


def _of_history(seen: History) -> Seen:
    return Seen(**{name: seen[name] for name in Seen._fields})


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
