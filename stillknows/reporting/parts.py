"""What the parts of a report share, and its part on single facts."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

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
