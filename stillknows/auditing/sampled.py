"""Probabilities estimated by asking often, for models that do not say them: the same way for all models of an audit."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from stillknows.lazy import torch
from stillknows.model.encoding import EncodedAnswer
from stillknows.model.forward import ItemScores
from stillknows.model.target import Capability, Target
from stillknows.types import Floats
from stillknows.variants.secrets import holds

EXTRA_TOKENS = 8  # that an answer may be longer than the longest one that it is compared with


@dataclass
class SampledTarget:
    """A target whose answers are judged by what it says: each prompt is continued `samples` times at temperature 1.

    The probability of an answer is the share of continuations that hold it, (k + ½)/(samples + 1), and it counts as hit
    where the greedy continuation holds it: one number for each answer, in the place of one for each of its tokens. All
    answers to a prompt, the true one and placebos, are looked for in the same texts. A text without a prompt has none.
    """

    target: Target
    samples: int

    @property
    def name(self) -> str:
        """See `Target.name`."""
        return self.target.name

    @property
    def fingerprint(self) -> str:
        """See `Target.fingerprint`."""
        return self.target.fingerprint

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Generating, and scoring by it."""
        return frozenset({"score", "generate"})

    def score(
        self, items: Sequence[EncodedAnswer], with_distribution: Container[int] | None = None
    ) -> Mapping[int, ItemScores]:
        """Return the estimates, each of one value."""
        asked: dict[tuple[int, ...], list[int]] = {}
        for i, item in enumerate(items):
            if item.example.prompt:
                asked.setdefault(item.ids[: item.start], []).append(i)
        first = [items[places[0]] for places in asked.values()]
        limits = [max(len(items[i].ids) - items[i].start for i in places) + EXTRA_TOKENS for places in asked.values()]
        greedy = self.target.generate(first, limits)
        often = [item for item in first for _ in range(self.samples)]
        drawn = self.target.generate(often, [limit for limit in limits for _ in range(self.samples)], 1.0)
        found = dict.fromkeys(range(len(items)), _estimate(math.nan, False))
        for k, places in enumerate(asked.values()):
            said = drawn[k * self.samples : (k + 1) * self.samples]
            for i in places:
                answer = items[i].example.answer
                share = (sum(holds(text, answer) for text in said) + 0.5) / (self.samples + 1)
                found[i] = _estimate(math.log(share), holds(greedy[k], answer))
        return found

    def generate(
        self, items: Sequence[EncodedAnswer], limits: Sequence[int], temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """See `Target.generate`."""
        return self.target.generate(items, limits, temperature, seed)

    def gradient_norms(self, items: Sequence[EncodedAnswer]) -> Floats:
        """See `Target.gradient_norms`."""
        return self.target.gradient_norms(items)


def _estimate(log_prob: float, hit: bool) -> ItemScores:
    nothing = torch.empty(0)
    return ItemScores(torch.tensor([log_prob], dtype=torch.float64), torch.tensor([hit]), nothing, nothing)
