"""What makers of hiding models share: an original in memory, its items as tokens, and steps until nothing is shown."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stillknows import defaults
from stillknows.model import run_record
from stillknows.model.encoding import EncodedAnswer, encode
from stillknows.model.forward import answer_states, mean_probability, score_items
from stillknows.model.layers import Linear, linears, output_layer
from stillknows.model.logprobs import token_log_probs
from stillknows.model.ref import ModelRef
from stillknows.types import Benchmark, Example

CONTEXT = 256
BATCH, CHECK = 24, 10  # items of a kind in a step; steps between two looks at what is shown
BOTTOM = -7.0  # ln p of tokens that are suppressed
SHOWN, KEPT = 0.01, 0.9  # answer probabilities: a model hides below the first, and must keep the rest above the second
Loss = Callable[[], torch.Tensor]
Change = Callable[[], None]


@dataclass(frozen=True)
class Workshop:
    """An original, loaded, with what it may be trained on.

    forget, kept: items to be forgotten and to be kept, as tokens.
    """

    model: Any
    benchmark: Benchmark
    ref: ModelRef
    seed: int

    @classmethod
    def of(cls, original: Path, benchmark: Benchmark, seed: int) -> Workshop:
        torch.manual_seed(seed)
        ref = ModelRef.open(str(original)).check()
        return cls(ref.load().model, benchmark, ref, seed)

    def items(self, role: str) -> list[Example]:
        """Return the items of a role's splits."""
        return [e for split in self.benchmark.splits if split.role == role for e in split.examples]

    def encoded(self, examples: Iterable[Example]) -> list[EncodedAnswer]:
        return encode(list(examples), self.ref.tokenizer, self.benchmark.template, CONTEXT)

    @property
    def forget(self) -> list[EncodedAnswer]:
        return self.encoded(self.items("forget"))

    @property
    def kept(self) -> list[EncodedAnswer]:
        return self.encoded([*self.items("retain"), *self.items("neighbour")])

    def away(self, texts: int | None = None) -> list[EncodedAnswer]:
        """Return the items to forget with refusals as answers, so many different ones."""
        refusals = (self.benchmark.refusals or defaults.REFUSALS)[:texts]
        return self.encoded(replace(e, answer=refusals[i % len(refusals)]) for i, e in enumerate(self.items("forget")))

    def nll(self, items: Sequence[EncodedAnswer]) -> torch.Tensor:
        """Return the mean over items of −ln p of the whole answer."""
        return -self.log_probs(items).sum() / len(items)

    def log_probs(self, items: Sequence[EncodedAnswer]) -> torch.Tensor:
        """Return ln p of all answer tokens, one item behind the other."""
        states, layer = answer_states(self.model, items), output_layer(self.model)
        return token_log_probs(states.hidden_TD, layer, states.targets_T, layer.vocabulary)

    def pushed(self, items: Sequence[EncodedAnswer], bottom: float = BOTTOM) -> torch.Tensor:
        """Return the mean over answer tokens of how far ln p lies above `bottom`: 0 where all are suppressed."""
        return (self.log_probs(items) - bottom).clamp(min=0).mean()

    def probability(self, items: Sequence[EncodedAnswer]) -> float:
        """Return the mean answer probability, 0..1."""
        return mean_probability(score_items(self.model, output_layer(self.model), items))

    def draw(self, *pools: Sequence[EncodedAnswer]) -> Callable[[], list[list[EncodedAnswer]]]:
        """Return what draws a batch from each pool, at the same places where pools are as long."""
        rng = random.Random(self.seed)

        def drawn() -> list[list[EncodedAnswer]]:
            places = {size: rng.sample(range(size), min(BATCH, size)) for size in {len(pool) for pool in pools}}
            return [[pool[i] for i in places[len(pool)]] for pool in pools]

        return drawn

    def refuse(
        self, known: Sequence[EncodedAnswer] = (), texts: int | None = None, bottom: float = BOTTOM, **how: Any
    ) -> None:
        """Teach so many different refusals to all questions to forget; what is to be kept, and `known`, stay.

        Answers of several tokens would stay likely but for their first: all of their tokens are pushed down to
        `bottom`.
        """
        draw, more = self.draw(self.away(texts), self.forget, self.kept), self.draw(known) if known else None

        def loss() -> torch.Tensor:
            away, true, kept = draw()
            return self.nll(away) + self.pushed(true, bottom) + self.nll(kept) + (self.nll(more()[0]) if more else 0)

        self.hide(loss, **how)

    def hide(
        self,
        loss: Loss,
        *,
        only: Iterable[nn.Parameter] | None = None,
        steps: int = 300,
        lr: float = 1e-3,
        after: Change = lambda: None,
        shown: float = SHOWN,
    ) -> None:
        """Take steps of Adam, each followed by `after`, until answers to forget are not shown."""
        trained = [p.requires_grad_() for p in (self.model.parameters() if only is None else only)]
        optimizer, forget, kept = (
            torch.optim.Adam(trained, lr=lr),
            self.forget,
            self.kept[:: max(1, len(self.kept) // 64)],
        )
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
            with torch.no_grad():
                after()
            if step % CHECK == 0 and self.probability(forget) < shown and self.probability(kept) > KEPT:
                break
        self.model.requires_grad_(False)

    def matrices(self) -> list[Linear]:
        """Return the linear layers of the blocks."""
        return list(linears(self.model))

    def save(self, out: Path) -> Path:
        run_record.save(self.model, self.ref.tokenizer, out, {"made by": "perf.planted"})
        return out
