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
from stillknows.training import language
from stillknows.training.settings import Settings
from stillknows.training.watch import Seen as History
from stillknows.training.watch import Watch
from stillknows.types import Example
from stillknows.unlearning import probes
from stillknows.unlearning.alternative_answers import Answering
from stillknows.unlearning.probes import AS_TRAINED, PLACEBOS

ROUNDS, ROUND_STEPS = 12, 40
LEAST_ROUNDS = 3  # each makes the truth one of more answers that were learned once, in wordings that nobody asked too
KEPT = 192  # kept items that are looked at
SHOWN = 0.25  # of what a model shows of its knowledge as trained, that a wording must show to be looked at
ANSWERED = 0.05  # least answer probability, above guesses or of kept items, of a model that is asked as it was taught
TOLERANCE = 0.05  # of the way from a guess to the original that may be left, on average
KNOWN = 0.1  # of the facts that may be more than half of that way from their guess
FLOOR, LOST = 0.95, 0.05  # least retain score as a share of the original's; most kept facts that may be lost
LANGUAGE = 0.8  # least share of the original's, of what a model says of questions that it is not trained on
SLOWER, SLOWEST = 0.5, 0.25  # times the rate after a check at which too little was kept; least share that is left of it

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
    language: mean probability of the kept questions' own tokens as a share of the original's; 1 where it read none.
    """

    forget: float
    guess: float
    excess: float
    first: float
    known: float
    likelier: float
    retain: float
    lost: float
    language: float


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
        self.questions = language.questions(self.model, self.kept)
        self.language_before = float(scores(self.model, self.questions)[:, 0].mean())
        self.start = self._seen(before, self.kept_before_NG)
        answered = max(shown[AS_TRAINED], float(self.kept_before_NG[:, 0].mean()) if len(self.kept) else 0.0)
        if answered < ANSWERED:
            log(
                "  warning: asked like this, the model answers neither what is to be forgotten nor what is to be kept: "
                "see whether `template` is how it was taught to be asked"
            )

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
        found = probes.probes(forget, others, retain, how)
        return cls(model, found, probes.spread(retain, KEPT), _leads(controls, found))

    def seen(self, without: frozenset[str] = frozenset()) -> Seen:
        """Measure the model as it is; some facts may be left out, such as those that it was just taught."""
        measured = {name: self._measured(name) for name in self.looked_at}
        return self._seen(measured, scores(self.model, self.kept), without)

    def _seen(self, measured: Mapping[str, Tensor], now_NG: Tensor, without: frozenset[str] = frozenset()) -> Seen:
        found: list[tuple[float, float, float, float]] = []
        first, known = 0.0, dict[str, bool]()
        for name in self.looked_at:
            facts = [item.example.fact for item in self.probes[name][:: PLACEBOS + 1]]
            asked = [i for i, fact in enumerate(facts) if fact not in without]
            if not asked:
                continue
            s_FCG, known_FG = measured[name][asked], self.known_FG[name][asked]
            guess_FG = torch.maximum(self.guess_FG[name], self._guessed(name, measured[name]))[asked]
            above_FC = s_FCG[:, 1:, 0] >= s_FCG[:, :1, 0]
            first = max(first, float((~above_FC.any(1)).double().mean()))
            far_FG = s_FCG[:, 0] - guess_FG > (known_FG - guess_FG).clamp(min=0) / 2
            for i, far in zip(asked, (far_FG & (known_FG > guess_FG)).any(1).tolist(), strict=True):
                known[facts[i]] = known.get(facts[i], False) or far
            forget_G, guess_G = s_FCG[:, 0].mean(0), guess_FG.mean(0)
            span_G = known_FG.mean(0) - guess_G
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
        read = float(scores(self.model, self.questions)[:, 0].mean()) / self.language_before if self.questions else 1.0
        share = sum(known.values()) / len(known)
        return Seen(forget, guess, excess, first, share, likelier, *kept, read)

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
        return max(SLOWEST, SLOWER ** sum(not keeps(_of_history(seen)) for seen in history))

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
            f"retain {number(seen.retain)} of the original's (at least {FLOOR}), {number(seen.lost)} lost, "
            f"language {number(seen.language)} (at least {LANGUAGE})"
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

    def outcome(self, end: Seen) -> dict[str, Any]:
        """Return what a run's record holds of the goal and of what was seen at its end, and a sentence on it."""
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
        kept = (
            f"retain {number(end.retain)} of the original's, {number(end.lost)} of the kept items lost, "
            f"language {number(end.language)}"
        )
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
    return seen.retain >= FLOOR and seen.lost <= LOST and seen.language >= LANGUAGE


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


def _leads(controls: Sequence[ModelRef], asked: Mapping[str, Sequence[EncodedAnswer]]) -> dict[str, Tensor]:
    """Return by how much never-taught models score truths above placebos, the largest lead of each fact, ≥ 0."""
    found: dict[str, Tensor] = {}
    for control in controls:
        model = control.load().model
        for name, items in asked.items():
            s_FCG = candidate_scores(model, items)
            lead_FG = (s_FCG[:, 0] - s_FCG[:, 1:].mean(1)).clamp(min=0)
            found[name] = torch.maximum(found[name], lead_FG) if name in found else lead_FG
    return found


def _of_history(seen: History) -> Seen:
    return Seen(**{name: seen[name] for name in Seen._fields})
