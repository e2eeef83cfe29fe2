"""The data that flows through stillknows: frozen dataclasses without behaviour beyond look-ups.

Shape letters, the one legend of the project: B batch, L length, A answer length (longest in the batch), T answer
tokens of a batch (flat), V vocabulary, D hidden, O/I out/in features, N examples, F facts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Role = Literal["forget", "retain", "neighbour", "utility"]
Floats = NDArray[np.float64]
Ragged = Sequence[NDArray[Any]]  # one array per example, of different lengths
FULL = "full"  # the variant in which nothing is done to the model; the others are compared with it
WEIGHTS = "weights"  # in the place of a split: numbers that come from the weights alone
ORIGINAL, CONTROL = "original", "control"  # names of the two controls in tables and reports


@dataclass(frozen=True)
class Example:
    """One question with its true answer, or plain text (empty prompt, the text as the answer).

    `fact` groups the examples that ask for the same thing in other words: facts, not examples, are the units of
    every interval and test.
    """

    id: str
    prompt: str
    answer: str
    fact: str


@dataclass(frozen=True)
class Split:
    """Examples with one role in the assessment."""

    name: str
    role: Role
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Benchmark:
    """What to forget, what to keep, and how both are asked for.

    `template` turns a prompt into what the model reads; "{prompt}" is replaced. The answer follows after one space.
    """

    spec: str
    splits: tuple[Split, ...]
    template: str = "Question: {prompt}\nAnswer:"

    def split(self, role: Role) -> Split:
        """Return the first split with this role; LookupError when there is none."""
        for split in self.splits:
            if split.role == role:
                return split
        raise LookupError(f"{self.spec} has no {role} split")


@dataclass(frozen=True)
class Subject:
    """A model under test with its tokenizer. `fingerprint` identifies the weights and the tokenizer on disk."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    path: Path
    fingerprint: str


@dataclass(frozen=True)
class Observations:
    """Everything a metric may look at: what one model did on one split. N examples, in the split's order.

    `log_probs[i]` and `hits[i]` hold, for each answer token of example i, the natural log-probability of the true
    token and whether it was the most likely one, teacher-forced. The last token is the end of sequence where
    `ends[i]` is true. `generations[i]` is the greedy continuation of the prompt, None where the item has no prompt.
    """

    ids: tuple[str, ...]
    facts: tuple[str, ...]
    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    log_probs: tuple[Floats, ...]
    hits: tuple[NDArray[np.bool_], ...]
    ends: NDArray[np.bool_]
    generations: tuple[str | None, ...]


class Interval(NamedTuple):
    """A measured number over n units with its one-sided lower and upper bounds."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Cell:
    """One place of the report: what was measured there, or the reason why nothing was (never 0 instead)."""

    subject: str
    variant: str
    split: str
    metric: str
    result: Interval | str

    def to_json(self) -> dict[str, Any]:
        key = {"subject": self.subject, "variant": self.variant, "split": self.split, "metric": self.metric}
        if isinstance(self.result, str):
            return key | {"not_measured": self.result}
        return key | self.result._asdict()


VerdictName = Literal["FORGOTTEN", "STILL KNOWS", "HIDDEN", "DAMAGED", "UNDECIDED"]


@dataclass(frozen=True)
class Verdict:
    """The answer for one subject. `reasons` say in words which cells it rests on."""

    subject: str
    name: VerdictName
    reasons: tuple[str, ...]
    variants: dict[str, VerdictName] = field(default_factory=dict)
