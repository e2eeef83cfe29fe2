"""What the parts of a report share, and its part on single facts."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from stillknows.gate.membership import STABLE
from stillknows.judgements import ClaimName, ClaimVerdict, FactStatus

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Bound = Annotated[float | None, Field(description="Null: no finite bound.")]
Score = Annotated[float | None, Field(description="Null where there is none.")]
Share = Annotated[float, Field(ge=0, le=1)]


class Part(BaseModel):
    """A part of a report: immutable; unknown entries, numbers as texts, NaN and infinity are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class TestedFact(Part):
    """One fact in the placebo test."""

    fact: str
    placebos: Annotated[int, Field(ge=0)]
    likelier: Score
    """Share of the placebos that stand out at least as far as the truth; about ½ on average where never taught."""
    variant: str
    """The one in which the truth stands out most, with an attack's wording."""
    p: Share
    """How likely some truth of a never-taught model stands out as far, all facts taken together."""
    named: bool
    variants: tuple[str, ...]
    """Those that would name the fact by themselves."""
    p_below: Share
    pushed_below: bool
    """Whether the truth lies below its placebos: a trace of unlearning."""
    found: bool | None
    """Whether the fact would be named if it were known as well as by the original."""
    found_half: bool | None
    """Whether it would be if it were known half as well."""
    untestable: str
    """Why nothing can be said of the fact; empty where something can."""


class FactJudged(Part):
    """What the audit says of one fact, over all variants."""

    fact: str
    status: FactStatus
    suspicious: bool
    """Whether it is open and a gate finds it known."""
    known: tuple[str, ...]
    """The variants in which a gate finds it known."""
    original: bool
    """Whether the original shows it."""
    why: str
    """Why it is open; empty where it is not."""


class ClaimMade(Part):
    """One claim and its verdict; the weakest comes first."""

    name: ClaimName
    verdict: ClaimVerdict
    evidence: Text
    variants: tuple[str, ...]
    """Those that the verdict rests on."""
    settle: str
    """What would settle it, and what that costs; empty where it is settled."""


class TestedTogether(Part):
    """How true answers rank among the candidates of their facts, 0..1, ½ where never taught."""

    mean_rank: Share
    p: Share
    facts: Count


class MeasuredSignal(Part):
    """What a signal says of a model's hidden states: knowledge kept, 0 as the never-taught control, 1 as the original,
    over n facts with one-sided bounds, 95 % each."""

    signal: str
    value: Share
    low: float
    high: float
    n: Count
    shows: bool | None
    """Whether it shows knowledge; null where it decides nothing."""
    blocks: tuple[tuple[Score, ...], ...]
    """By decoder block and fact; null where a block tells nothing."""


class UnmeasuredSignal(Part):
    """A signal without a number, and why."""

    signal: str
    not_measured: Text
    shows: None
    blocks: tuple[()]


class DepthSection(Part):
    """How deep in one model knowledge is left."""

    facts: tuple[str, ...]
    """In the order of the columns of `blocks`."""
    shows: bool | None
    """Whether some signal shows knowledge; null where none can tell."""
    signals: tuple[MeasuredSignal | UnmeasuredSignal, ...]

    @property
    def mapped(self) -> tuple[MeasuredSignal, ...]:
        """The signals that have a number for every block and fact."""
        found = (s for s in self.signals if isinstance(s, MeasuredSignal))
        return tuple(s for s in found if s.blocks and len(s.blocks[0]) == len(self.facts))


class TestedExample(Part):
    """What a membership attack says of one example."""

    example: str
    """Its id."""
    score: Share
    """Share of the never-inserted examples of which it says less; above .95 the example is called a member."""
    low: Share
    high: Share
    """One-sided bounds, 95 % each, over draws of the reference models and of never-inserted examples."""
    member: bool
    agreement: Share
    """Share of these draws in which it is called the same."""


class MembershipSection(Part):
    """One membership attack on one model, with reference models."""

    attack: str
    not_measured: Text | None
    """Why it was not; null where it was."""
    auc: Annotated[tuple[Share, Share, Share] | None, Field(description="Value, lower and upper bound.")]
    """How often a true answer scores above a never-inserted one: ½ is chance."""
    examples: tuple[TestedExample, ...]

    @property
    def members(self) -> int:
        """How many examples are called members."""
        return sum(e.member for e in self.examples)

    @property
    def unstable(self) -> int:
        """How many examples are called otherwise in more than 5 % of the draws."""
        return sum(e.agreement < STABLE for e in self.examples)


class PlaceboSection(Part):
    """The placebo test of one model: each fact against answers that could as well have been true."""

    alpha: Share
    """How likely at most any fact of a never-taught model is named."""
    diffuse_alpha: Share
    """How likely at most knowledge spread over facts is found in one."""
    controls: Annotated[int, Field(ge=0)]
    diffuse: TestedTogether | None
    below: TestedTogether | None
    """The same downwards: 1 where all truths lie below all their placebos."""
    facts: tuple[TestedFact, ...]

    @property
    def named(self) -> tuple[TestedFact, ...]:
        """The facts that the model is shown to know."""
        return tuple(fact for fact in self.facts if fact.named)

    @property
    def untestable(self) -> tuple[TestedFact, ...]:
        """The facts of which nothing can be said, and those that the original's knowledge would not name."""
        return tuple(fact for fact in self.facts if fact.untestable or (fact.found is False and not fact.named))


class LeakScores(Part):
    """A fact's score under the original, the control and the model in this variant, and the model in full precision."""

    original: Score
    control: Score
    full: Score
    variant: Score


class LeakedFact(Part):
    """A fact to be forgotten that the model gives away more than the control, in the variant where it keeps most."""

    variant: str
    split: str
    id: str
    question: str
    truth: str
    generated: str | None
    generated_full: str | None
    """The answer in full precision."""
    scores: LeakScores
    known: bool
    """Whether the fact counts as known there."""


class DrawnFact(LeakedFact):
    """A fact that leaks, with what drew it: the question, in the variant where it is given away most."""

    fact: str


class ReportAttack(Part):
    """What an attack took, the same for all models but for seconds, and what it found on this one."""

    steps: Annotated[int, Field(ge=0)]
    """Of optimisation."""
    tokens: Annotated[int, Field(ge=0)]
    """Read with gradients to make it, padding included."""
    forward_tokens: Annotated[int, Field(ge=0)]
    """Read without gradients to make it."""
    flops: Annotated[float, Field(ge=0)]
    """Of these, an estimate."""
    queries: Annotated[int, Field(ge=0)]
    """Answers that it asks for: one for each prompt, and each sample."""
    seconds: Annotated[float, Field(ge=0)]
    found: dict[str, str]
    """What stands in a place of what is read: the text of tokens, or the file of vectors, in the audit's folder."""
