"""What can be asked: answers scored, prompts continued, gradients taken. A model in memory is one kind of it."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from stillknows.lazy import enable_grad, nn, no_grad, torch
from stillknows.model.alone import require_greedy_alone, require_scores_alone
from stillknows.model.encoding import EncodedAnswer
from stillknows.model.forward import ItemScores, answer_states, score_items
from stillknows.model.generate import end_tokens, generate, greedy, sampled
from stillknows.model.layers import output_layer
from stillknows.model.logprobs import token_log_probs
from stillknows.types import Floats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Capability = Literal["score", "generate", "gradients"]


class Target(Protocol):
    """That which can be asked. `capabilities` names the methods that work: not every target gives gradients."""

    @property
    def name(self) -> str:
        """Its name in reports."""
        ...

    @property
    def fingerprint(self) -> str:
        """Text that is equal for targets that answer alike."""
        ...

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What it can do."""
        ...

    def score(
        self, items: Sequence[EncodedAnswer], with_distribution: Container[int] | None = None
    ) -> Mapping[int, ItemScores]:
        """Return the scores of every item's answer by its index; see `forward.score_items`."""
        ...

    def generate(
        self, items: Sequence[EncodedAnswer], limits: Sequence[int], temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """Return what follows each item's prompt, up to so many tokens: the likeliest, or sampled above temperature 0.

        An item's sample depends on the seed and on its place among the items, never on how they are batched.
        """
        ...

    def gradient_norms(self, items: Sequence[EncodedAnswer]) -> Floats:
        """Return |∇θ NLL| of every item's answer, [N], NLL its mean over tokens in nats."""
        ...


@dataclass(frozen=True)
class LocalTarget:
    """A model in memory with its tokenizer.

    path, fingerprint: where it came from, and what identifies its weights and its tokenizer there.
    """

    name: str
    model: Any  # a PreTrainedModel, or what stands for one
    tokenizer: PreTrainedTokenizerBase
    path: Path = Path()
    fingerprint: str = ""

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Everything."""
        return frozenset({"score", "generate", "gradients"})

    @no_grad
    def score(
        self, items: Sequence[EncodedAnswer], with_distribution: Container[int] | None = None
    ) -> Mapping[int, ItemScores]:
        """See `Target.score`. One item in a hundred is read alone besides; UserError where that gives other numbers."""
        layer = output_layer(self.model)
        scores = dict(score_items(self.model, layer, items, with_distribution=with_distribution))
        require_scores_alone(self.model, layer, items, scores)
        return scores

    @no_grad
    def generate(
        self, items: Sequence[EncodedAnswer], limits: Sequence[int], temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """See `Target.generate`. Of greedy ones, one in a hundred is read alone besides, as in `score`."""
        layer, prompts = output_layer(self.model), [item.ids[: item.start] for item in items]
        ends = end_tokens(self.model, self.tokenizer, items)
        rows = generate(self.model, layer, prompts, limits, ends, sampled(temperature, seed) if temperature else greedy)
        if not temperature:
            require_greedy_alone(self.model, layer, prompts, rows, limits, ends)
        return [str(self.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]

    @enable_grad
    def gradient_norms(self, items: Sequence[EncodedAnswer]) -> Floats:
        """See `Target.gradient_norms`. The parameters are left as they were."""
        model: nn.Module = self.model
        layer, before = output_layer(model), {p: p.requires_grad for p in model.parameters()}
        parameters = list(model.requires_grad_(True).parameters())
        norms = []
        for item in items:
            states = answer_states(model, [item])
            nll = -token_log_probs(states.hidden_TD, layer, states.targets_T, layer.vocabulary).mean()
            gradients = torch.autograd.grad(nll, parameters, allow_unused=True)
            norms.append(torch.stack([g.double().norm() for g in gradients if g is not None]).norm().item())
        for p, needed in before.items():
            p.requires_grad_(needed)
        return np.array(norms)
