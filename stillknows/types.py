"""The data that flows through stillknows: frozen dataclasses without behaviour beyond look-ups and checks.

Shape letters, the one legend of the project: B batch, L length, A answer length (longest in the batch), T answer
tokens of a batch (flat), V vocabulary, D hidden, O/I out/in features, N examples, F facts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stillknows.errors import UserError
from stillknows.judgements import Claim, FactVerdict

Role = Literal["forget", "retain", "neighbour", "utility", "member", "holdout"]
Floats = NDArray[np.float64]
Ragged = Sequence[NDArray[Any]]  # one array per example, of different lengths
FULL = "full"  # the variant in which nothing is done to the model; the others are compared with it
UNDEFENDED = "undefended"  # the variant in which no defence stands before or beside the weights
WEIGHTS = "weights"  # in the place of a split: numbers that come from the weights alone
SUITE = "suite"  # in the place of a split: figures that a benchmark makes of several splits
CHAT = "chat"  # in the place of a template: the tokenizer's own chat template
PLACE = "{prompt}"  # of the question in a template
ORIGINAL, CONTROL = "original", "control"  # names of controls in tables and reports; further ones: `labels`


@dataclass(frozen=True)
class Example:
    """One question with its true answer, or plain text (empty prompt, the text as the answer).

    `fact` groups the examples that ask for the same thing in other words: facts, not examples, are the units of
    every interval and test. `paraphrase` is the true answer in other words, `wrong` are false answers of its form (the
    other choices of a multiple-choice question); both are scored as answers to the same prompt.
    """

    id: str
    prompt: str
    answer: str
    fact: str
    paraphrase: str | None = None
    wrong: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decoding:
    """How a prompt is continued: up to `new_tokens` (None: the true answer's length and a little more), cut before the
    first of the texts in `stop`; once greedily and, where samples are asked for, `samples` times at `temperature`, or
    at each of `temperatures` in turn."""

    new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    samples: int = 20
    temperature: float = 1.0
    seed: int = 0
    temperatures: tuple[float, ...] = ()


@dataclass(frozen=True)
class Split:
    """Examples with one role in the assessment.

    Roles: "forget" must be gone, "retain" and "neighbour" must stay, "utility" is knowledge that the unlearning never
    touched, "member" and "holdout" are texts that the original was and was not trained on, for membership attacks.

    `template` frames its prompts where the benchmark's own does not. `answer_tokens` keeps that many tokens of each
    true answer, `piece_tokens` cuts plain texts into pieces of at most so many.

    Attacks say more before an answer: `turns` are questions and answers that stand before each prompt, which takes the
    place of "{prompt}" in them; `opening` is a text that every answer begins with and that is given; `given_tokens` is
    how many of each answer's own first tokens are given. What is given is not scored. `before` and `after` are how many
    tokens of an attack's own stand before and after each question; see `model.own_tokens`.
    """

    name: str
    role: Role
    examples: tuple[Example, ...]
    template: str | None = None
    decoding: Decoding = Decoding()
    answer_tokens: int | None = None
    piece_tokens: int | None = None
    turns: tuple[tuple[str, str], ...] = ()
    opening: str = ""
    given_tokens: int = 0
    before: int = 0
    after: int = 0


@dataclass(frozen=True)
class Edge:
    """What a benchmark knows of its own facts: the `relation` of `entity` is `value`; `fact` is the items' name for it.

    In words, "the birthplace of Ada is Rome"; questions name the entity as it stands here.
    """

    fact: str
    entity: str
    relation: str
    value: str


def require_place(template: str) -> None:
    """Raise UserError for a template in words that does not show the question, or that no file could hold."""
    if template != CHAT and PLACE not in template:
        raise UserError(
            f"the template {template!r} does not show the question",
            f'write "{PLACE}" where it belongs, as in `template` "Question: {PLACE}\\nAnswer:"',
        )
    try:
        template.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the template {template!r} holds half a character", "correct it") from error


@dataclass(frozen=True)
class Benchmark:
    """What to forget, what to keep, and how both are asked for.

    `splits` are measured. `training` is what an unlearning run sees of a role, where that is not what is measured.
    `template` turns a prompt into what the model reads; its last "{prompt}" is replaced. The answer follows after one
    space.
    `figures` are the published numbers that the benchmark is reported with, `refusals` answers that give nothing away.
    `graph` holds the facts of all splits, where they are known: what attacks need that ask through other entities.
    """

    spec: str
    splits: tuple[Split, ...]
    template: str = "Question: {prompt}\nAnswer:"
    training: tuple[Split, ...] = ()
    figures: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    graph: tuple[Edge, ...] = ()

    def split(self, role: Role) -> Split:
        """Return what to train on for this role, else the first split with it; LookupError when there is none."""
        for split in (*self.training, *self.splits):
            if split.role == role:
                return split
        raise LookupError(f"{self.spec} has no {role} split")

    def require_usable(self) -> None:
        """Raise UserError for splits without items, for items that are to be forgotten and kept, and for templates
        that `require_place` refuses."""
        splits = (*self.training, *self.splits)
        for split in splits:
            if not split.examples:
                raise UserError(f"the {split.name} split of {self.spec} is empty", "give it at least one item")
        forget = {(e.prompt, e.answer) for s in splits if s.role == "forget" for e in s.examples}
        for split in splits:
            both = [e.id for e in split.examples if (e.prompt, e.answer) in forget]
            if both and split.role not in ("forget", "member"):
                raise UserError(
                    f"{len(both)} items are in the forget and in the {split.name} split, the first: {both[0]!r}",
                    "an item cannot be forgotten and kept; remove it from one of them",
                )
            if any(example.prompt for example in split.examples):
                require_place(split.template or self.template)


@dataclass(frozen=True)
class Observations:
    """Everything a metric may look at: what one model did on one split. N examples, in the split's order.

    `log_probs[i]`, `hits[i]`, `entropies[i]` and `spreads[i]` hold, for each answer token of example i, teacher-forced:
    the natural log-probability of the true token, whether it was the most likely one, and the entropy and the standard
    deviation of ln p under the model's own distribution p at that place. The last token is the end of sequence where
    `ends[i]` is true. `paraphrase_log_probs` and `wrong_log_probs` are the same for the other answers to the prompt
    (empty where there are none), `placebo_log_probs` and `placebo_hits` for the answers in `placebos[i]`, which could
    have been true, `lowered_log_probs` for the answer in lower case. `generations[i]` is the greedy
    continuation of the prompt, `samples[i]` are sampled ones. `gradient_norms[i]` is |∇θ NLL| of the answer.

    `wordings[i]` names how an attack words the prompt; of a fact's wordings the one counts that shows most.

    None where it was not observed, for the whole split or for one item.
    """

    ids: tuple[str, ...]
    facts: tuple[str, ...]
    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    log_probs: tuple[Floats, ...] | None = None
    hits: tuple[NDArray[np.bool_], ...] | None = None
    entropies: tuple[Floats, ...] | None = None
    spreads: tuple[Floats, ...] | None = None
    ends: NDArray[np.bool_] | None = None
    paraphrase_log_probs: tuple[Floats, ...] | None = None
    wrong_log_probs: tuple[tuple[Floats, ...], ...] | None = None
    placebos: tuple[tuple[str, ...], ...] | None = None
    placebo_log_probs: tuple[tuple[Floats, ...], ...] | None = None
    placebo_hits: tuple[tuple[NDArray[np.bool_], ...], ...] | None = None
    lowered_log_probs: tuple[Floats, ...] | None = None
    gradient_norms: Floats | None = None
    generations: tuple[str | None, ...] | None = None
    samples: tuple[tuple[str, ...] | None, ...] | None = None
    wordings: tuple[str, ...] | None = None


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


FindingKind = Literal[
    "knowledge_kept",
    "facts_known",
    "not_compared",
    "answer_told",
    "no_score",
    "utility",
    "utility_not_measured",
    "items_lost",
    "split_proves_nothing",
    "full_not_measured",
    "weights_unchanged",
    "served_differently",
    "no_control",
    "no_retain_split",
    "too_few_facts",
    "fact_named",
    "facts_suspicious",
    "facts_untold",
    "facts_need_control",
    "facts_open",
    "facts_traced",
    "facts_together",
    "facts_below",
    "control_failed",
    "verbatim",
    "policy_unmet",
]
Outcome = Literal["leak", "damage", "undecided", "pass", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing that a verdict rests on, as data; `auditing.findings.words` says it in a sentence.

    outcome: what it is for the verdict. "note" decides nothing; everything but "pass" and "note" excludes FORGOTTEN.
    variant, split, metric: where it was found; None where it concerns the model or the whole audit.
    model: the model whose score is missing (`no_score`), or the control that is none (`control_failed`).
    value, low, high: a number with its one-sided bounds; a bound is None, or infinite, where there is none.
    threshold: what the bounds are compared with.
    p: of the hypothesis that at most `threshold` is kept, after Holm's correction; for `fact_named` and
        `facts_together` of the one that the model was never taught the facts.
    n: the units that the number was made of.
    detail: why something could not be measured, what differs, or which fact is named.
    """

    kind: FindingKind
    outcome: Outcome
    variant: str | None = None
    split: str | None = None
    metric: str | None = None
    model: str | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None
    threshold: float | None = None
    p: float | None = None
    n: int | None = None
    detail: str | None = None


@dataclass(frozen=True)
class Verdict:
    """The answer for one subject, the findings that it rests on, and the claims that these allow."""

    subject: str
    name: VerdictName
    findings: tuple[Finding, ...]
    variants: dict[str, VerdictName] = field(default_factory=dict[str, VerdictName])
    claims: tuple[Claim, ...] = ()
    facts: tuple[FactVerdict, ...] = ()
