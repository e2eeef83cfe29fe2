"""What objectives are given: the names of their parameters turned into tensors, of the model and of its teachers.

A name reads from left to right: whose numbers they are (a teacher's, or the trained model's own), of which answer to
the item's question (a companion, or the item's own), and which numbers: `reference_refusal_log_probs`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import NamedTuple

from stillknows.lazy import Tensor, nn, torch
from stillknows.model.encoding import EncodedAnswer
from stillknows.model.forward import AnswerStates, answer_states, answer_tokens, score_items
from stillknows.model.layers import OutputLayer, blocks, layer_number, output_layer
from stillknows.model.logprobs import Logits, token_kl, token_log_probs, token_mean_log_probs
from stillknows.needs import COMPANIONS, COMPANIONS_OR_OWN, PLAIN, TEACHERS
from stillknows.registry import Bound


class Draw(NamedTuple):
    """An item in a batch. epoch: how often the term's items have been passed through before, or
    which round it is."""

    item: int
    epoch: int


@dataclass(frozen=True)
class Term:
    """One summand of the loss: the mean of an objective over a batch drawn from `items`.

    `companions` holds for each item other answers to its question, by kind; a draw uses one of them, in turn.
    """

    objective: Bound
    items: Sequence[EncodedAnswer]
    companions: Mapping[str, Sequence[Sequence[EncodedAnswer]]] = field(default_factory=dict)

    def answers(self, companion: str, draws: Sequence[Draw]) -> list[EncodedAnswer]:
        """Return the items of these draws, or the companions whose turn it is."""
        if not companion:
            return [self.items[i] for i, _ in draws]
        choices = self.companions[companion]
        return [choices[i][(i + epoch) % len(choices[i])] for i, epoch in draws]


class InputSpec(NamedTuple):
    """An objective's parameter taken apart; "" stands for the model itself and for the item's own answer."""

    name: str
    teacher: str
    companion: str
    field: str

    @classmethod
    def of(cls, name: str) -> InputSpec:
        teacher, rest = _prefix(name, TEACHERS)
        companion, rest = _prefix(rest, COMPANIONS)
        return cls(name, teacher, companion, rest)


def _prefix(name: str, known: Sequence[str]) -> tuple[str, str]:
    for prefix in known:
        if name.startswith(f"{prefix}_"):
            return prefix, name.removeprefix(f"{prefix}_")
    return "", name


class Inputs:
    """Computes what one term's objective asks for; teachers are asked before training starts, and not kept."""

    def __init__(
        self,
        model: nn.Module,
        layer: OutputLayer,
        term: Term,
        teachers: Mapping[str, nn.Module],
        draws: Iterable[Draw],
    ) -> None:
        self.model, self.layer, self.term = model, layer, term
        self.needs = [InputSpec.of(name) for name in term.objective.plugin.needs]
        self.number = 0
        if any(need.field == "hidden" for need in self.needs):
            self.number = layer_number(model, term.objective.options["layer"])
        self.tokens = 0
        asked = {need.teacher for need in self.needs if need.teacher}
        wanted = sorted(set(draws)) if asked else []
        self.teachers = {name: self._ask(name, teachers.get(name, model), wanted) for name in asked}

    def _ask(self, name: str, model: nn.Module, draws: Sequence[Draw]) -> _Teacher:
        teacher = _Teacher(model, self.number)
        for companion in COMPANIONS_OR_OWN:
            fields = {need.field for need in self.needs if (need.teacher, need.companion) == (name, companion)}
            if fields:
                teacher.visit(dict.fromkeys(self.term.answers(companion, draws)), fields)
        teacher.leave()
        return teacher

    def __call__(self, draws: Sequence[Draw]) -> dict[str, Tensor | Logits]:
        """Run the model once over the items, and once over each kind of companion that it is needed for."""
        found: dict[str, Tensor | Logits] = {}
        self.tokens = 0
        for companion in COMPANIONS_OR_OWN:
            here = [need for need in self.needs if need.companion == companion]
            if not here:
                continue
            items = self.term.answers(companion, draws)
            found |= self._plain(here, items)
            here = [need for need in here if need.name not in found]
            if not here:
                continue
            states = self._states(here, items)
            for need in here:
                teacher = self.teachers.get(need.teacher)
                found[need.name] = (
                    teacher.value(need.field, items, states, self.layer) if teacher else self._own(need, states)
                )
        return found

    def _states(self, needs: Sequence[InputSpec], items: Sequence[EncodedAnswer]) -> AnswerStates:
        """Run the model over the items; where teachers alone are asked, and not compared with it, only lay them out."""
        if all(need.teacher and need.field != "kl" for need in needs):
            places, targets_T = answer_tokens(items, next(self.model.parameters()).device)
            return AnswerStates(torch.empty(0, device=targets_T.device), targets_T, places)
        self.tokens += sum(len(item.ids) for item in items)
        return answer_states(self.model, items, _block(self.model, self.number))

    def _plain(self, needs: Sequence[InputSpec], items: Sequence[EncodedAnswer]) -> dict[str, Tensor]:
        places, targets_T = answer_tokens(items, next(self.model.parameters()).device)
        values = {"mask": places.mask_BA, "targets": places.pad(targets_T)}
        return {need.name: values[need.field] for need in needs if not need.teacher and need.field in PLAIN}

    def _own(self, need: InputSpec, states: AnswerStates) -> Tensor | Logits:
        places, vocabulary = states.places, self.layer.vocabulary
        if need.field == "log_probs":
            return places.pad(token_log_probs(states.hidden_TD, self.layer, states.targets_T, vocabulary))
        if need.field == "mean_log_probs":
            return places.pad(token_mean_log_probs(states.hidden_TD, self.layer, vocabulary))
        if need.field == "logits":
            return Logits(states.hidden_TD, self.layer, states.targets_T, places)
        if need.field == "hidden" and states.inner_TD is not None:
            return places.pad(states.inner_TD)
        raise ValueError(f"nothing provides {need.name!r}, which {self.term.objective.plugin.name} asks for")


class _Teacher:
    """What another state of the model said of the items to come: kept, so that it need not run in every step."""

    def __init__(self, model: nn.Module, number: int) -> None:
        self.model, self.number, self.layer = model, number, output_layer(model)
        self.log_probs: dict[EncodedAnswer, Tensor] = {}
        self.last: dict[EncodedAnswer, Tensor] = {}
        self.inner: dict[EncodedAnswer, Tensor] = {}

    def visit(self, items: Iterable[EncodedAnswer], fields: Set[str]) -> None:
        """Ask for what these fields are made of."""
        items = list(items)
        if "log_probs" in fields:
            for i, scores in score_items(self.model, self.layer, items, with_distribution=()):
                self.log_probs[items[i]] = scores.log_probs
        if fields <= {"log_probs"}:
            return
        block = _block(self.model, self.number)
        for item in items:
            with torch.no_grad():
                states = answer_states(self.model, [item], block)
            if fields & {"kl", "logits"}:
                self.last[item] = states.hidden_TD.cpu()
            if states.inner_TD is not None:
                self.inner[item] = states.inner_TD.cpu()

    def leave(self) -> None:
        """Let go of the model; where its logits will be wanted, its output layer is kept as it is now."""
        if self.last:
            self.layer = self.layer.frozen()
        del self.model

    def value(
        self, field: str, items: Sequence[EncodedAnswer], states: AnswerStates, layer: OutputLayer
    ) -> Tensor | Logits:
        """Return what was kept, laid out like the trained model's; `kl` is KL(teacher ‖ model), by token."""
        places, hidden_TD = states.places, states.hidden_TD

        def kept(by_item: Mapping[EncodedAnswer, Tensor]) -> Tensor:
            return torch.cat([by_item[item] for item in items]).to(hidden_TD.device)

        if field == "log_probs":
            return places.pad(kept(self.log_probs))
        if field == "hidden":
            return places.pad(kept(self.inner))
        if field == "logits":
            return Logits(kept(self.last), self.layer, states.targets_T, places)
        if field == "kl":
            return places.pad(token_kl(hidden_TD, layer, kept(self.last), self.layer, layer.vocabulary))
        raise ValueError(f"a teacher gives no {field!r}")


def _block(model: nn.Module, number: int) -> nn.Module | None:
    return blocks(model)[number - 1] if number else None
