"""The typed form of report.json: one definition for Python, for what is read back, and for report.schema.json.

Every number comes from saved observations; HTML, Markdown and the terminal show this data and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError, model_validator

from stillknows.auditing.findings import variant_verdict
from stillknows.auditing.policy import Policy
from stillknows.errors import UserError, did_you_mean, first_line
from stillknows.json_text import json_able
from stillknows.labels import is_control, is_reference
from stillknows.reporting.parts import (
    Bound,
    ClaimMade,
    Count,
    DepthSection,
    DrawnFact,
    FactJudged,
    LeakedFact,
    MembershipSection,
    Part,
    PlaceboSection,
    ReportAttack,
    Text,
)
from stillknows.store import AGAIN
from stillknows.types import ORIGINAL, Finding, Role, VerdictName

Json = dict[str, Any]
SCHEMA = "report.schema.json"
SCHEMA_VERSION = 5
NUM_LEAKS = 10
LEAD = "answer_probability"
SEVERITY: tuple[VerdictName, ...] = ("FORGOTTEN", "UNDECIDED", "DAMAGED", "HIDDEN", "STILL KNOWS")


class ReportSplit(Part):
    """A split of the benchmark."""

    name: str
    role: Role
    examples: Count
    facts: Count
    """The units of every interval and test."""


class LeftOutVariant(Part):
    """A deployed format that the models or the benchmark do not allow."""

    variant: str
    because: Text


class CellPlace(Part):
    """Where a number belongs. In the place of a split: "weights", "suite" for published figures, or a general task."""

    variant: str
    split: str
    metric: str


class Measured(CellPlace):
    """A number over n units with its one-sided bounds, 95 % each."""

    value: float
    low: Bound
    high: Bound
    n: Annotated[int, Field(ge=0)]


class Unmeasured(CellPlace):
    """No number, and why."""

    not_measured: Text


class ReportSubject(Part):
    """Everything about one model."""

    name: str
    """The model's label; "original", "control", "control-2", … are what the others are compared with."""
    path: str
    """Folder, .gguf file or hub name."""
    quantized: str | None
    """How the weights are quantized on disk; null where they are not."""
    defence: str | None
    """What stands before or beside the weights; null where nothing does."""
    fingerprint: str
    """Identifies the weights and the tokenizer."""
    verdict: VerdictName
    findings: tuple[Finding, ...]
    """What the verdict rests on."""
    claims: tuple[ClaimMade, ...]
    """What can be claimed of the model, the weakest first; none of the original and the controls."""
    single_facts: tuple[FactJudged, ...]
    """What is said of each fact."""
    variants: dict[str, VerdictName]
    observations: dict[str, dict[str, str]]
    """SHA-256 of what was observed, by variant and split."""
    cells: tuple[Measured | Unmeasured, ...]
    run: dict[str, Any] | None
    """The model's run record, null where there is none."""
    leaks: Annotated[tuple[LeakedFact, ...], Field(max_length=NUM_LEAKS)]
    exposed: tuple[LeakedFact, ...]
    """One fact for each attack under which the model leaks: what was asked and answered."""
    drawn: tuple[DrawnFact, ...]
    """Every fact that leaks, with what drew it."""
    attacks: dict[str, ReportAttack]
    """What each attack took, by variant."""
    facts: PlaceboSection | None
    """The placebo test; null where no placebos were asked for."""
    depth: DepthSection | None
    """Signals from hidden states; null where they were not asked for."""
    membership: tuple[MembershipSection, ...]
    """Attacks with reference models; empty where none are named."""

    @property
    def is_control(self) -> bool:
        return is_reference(self.name)

    @cached_property
    def by_place(self) -> dict[tuple[str, str, str], Measured | Unmeasured]:
        """The cells by variant, split and metric."""
        return {(cell.variant, cell.split, cell.metric): cell for cell in self.cells}


class Repeat(Part):
    """How to make the report again."""

    command: str
    versions: dict[str, str]


class AuditReport(Part):
    """What report.json holds."""

    model_config = ConfigDict(title="stillknows report")

    schema_version: Annotated[int, Field(ge=SCHEMA_VERSION, le=SCHEMA_VERSION)]
    stillknows: str
    """Version that made the report."""
    verdict: VerdictName
    """The worst among the audited models; the controls do not count."""
    benchmark: str
    splits: Annotated[tuple[ReportSplit, ...], Field(min_length=1)]
    variants: Annotated[tuple[str, ...], Field(min_length=1)]
    left_out: tuple[LeftOutVariant, ...]
    out_of_reach: tuple[Finding, ...]
    """Why no model can be found FORGOTTEN here, whatever is observed."""
    metrics: Annotated[tuple[str, ...], Field(min_length=1)]
    placebos: dict[str, tuple[int, int]]
    """How many facts have placebos from each source, and how many placebos these are."""
    policy: Policy
    subjects: Annotated[tuple[ReportSubject, ...], Field(min_length=1)]
    """The audited models, then the controls."""
    repeat: Repeat
    digest: str | None = None
    """SHA-256 of the rest, as JSON with sorted keys."""

    @property
    def lead(self) -> str:
        """The metric that is shown first."""
        return lead_of(self.metrics, self.policy.gates)

    @property
    def audited(self) -> tuple[ReportSubject, ...]:
        """The models that are judged, without the controls."""
        return tuple(subject for subject in self.subjects if not subject.is_control)

    @property
    def has_control(self) -> bool:
        """Whether a never-taught control was audited beside them."""
        return any(is_control(subject.name) for subject in self.subjects)

    @property
    def is_compared(self) -> bool:
        """Whether models are compared with a control, or with placebos that stand in for one."""
        cells = (cell for subject in self.subjects for cell in subject.cells)
        measured = any(isinstance(cell, Measured) and cell.metric == f"{self.lead}.kept" for cell in cells)
        return measured or self.has_control

    def chosen(self, label: str | None) -> ReportSubject:
        """Return the audited model of this name; the only one for None.

        Raises UserError where there is none of this name, or several.
        """
        by_name = {subject.name: subject for subject in self.audited}
        if label is None and len(by_name) == 1:
            return next(iter(by_name.values()))
        if label is None:
            raise UserError(f"the audit judged {len(by_name)} models: {', '.join(by_name)}", "name one with `label`")
        if label not in by_name:
            raise UserError(f"the audit judged no model {label!r}{did_you_mean(label, by_name)}")
        return by_name[label]

    def splits_of(self, *roles: Role) -> list[str]:
        """Return the names of the splits with one of these roles."""
        return [split.name for split in self.splits if split.role in roles]

    def to_json(self) -> Json:
        """Return the data as report.json holds it."""
        return self.model_dump(mode="json")

    @model_validator(mode="after")
    def _require_agreement(self) -> AuditReport:
        """Raise ValueError where parts of a report contradict one another."""
        if not self.splits_of("forget"):
            raise ValueError("it has no forget split")
        if self.verdict != worst((subject.name, subject.verdict) for subject in self.subjects):
            raise ValueError("its verdict is not the worst of its models'")
        for subject in self.subjects:
            if sorted(subject.variants) != sorted(self.variants):
                raise ValueError("its models were judged in other variants")
            for variant, verdict in subject.variants.items():
                if variant_verdict(f for f in subject.findings if f.variant == variant) != verdict:
                    raise ValueError(f"its findings on {subject.name} do not make {variant} {verdict}")
        return self


def expected(name: str) -> VerdictName | None:
    """Return the verdict that an original, or a never-taught control, should have; None for a model that is audited."""
    if not is_reference(name):
        return None
    return "STILL KNOWS" if name == ORIGINAL else "FORGOTTEN"


def lead_of(metrics: Sequence[str], gates: Sequence[str]) -> str:
    """Return the metric that is shown first: the one that a reader grasps at once where it was measured."""
    return LEAD if LEAD in metrics else gates[0]


def worst(verdicts: Iterable[tuple[str, VerdictName]]) -> VerdictName:
    """Return the worst of (model, verdict) pairs without the controls; UNDECIDED without any."""
    judged: list[VerdictName] = [verdict for name, verdict in verdicts if not is_reference(name)]
    return max(judged, key=SEVERITY.index) if judged else "UNDECIDED"


def parsed(content: Json, place: str) -> AuditReport:
    """Return JSON data as a report.

    Raises UserError that names the first place where it does not follow the schema, or says how it contradicts itself,
    and for a report of another version what to type.
    """
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        what = f"{place} is not a report of schema version {SCHEMA_VERSION}"
        raise UserError(what if version is None else f"{what} but of version {version}", _repeated(content))
    written = {"digest": None} | json_able(content)
    try:
        report = AuditReport.model_validate_json(json.dumps(written))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        at = ".".join(map(str, first["loc"]))
        why = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{place} is not a report: {f'{at}: ' if at else ''}{why}", AGAIN) from error
    except UserError as error:  # thresholds that no evidence can meet or miss
        raise UserError(f"{place} is not a report: {first_line(error)}", AGAIN) from error
    if report.to_json() != written:
        raise UserError(f"{place} is not a report: it leaves entries out that the schema asks for", AGAIN)
    return report


def _repeated(content: Json) -> str:
    """Say how to make a report of another version again."""
    how = "make it again with this version; saved observations are used again where they still hold"
    repeat = content.get("repeat")
    command = repeat.get("command") if isinstance(repeat, Mapping) else None
    if not isinstance(command, str) or not command.startswith("stillknows "):
        return how
    needed = command.startswith("stillknows audit ") and "--overwrite" not in command
    return f"{how}: {command}{' --overwrite' * needed}"


def json_schema() -> Json:
    """Return the JSON schema of report.json (draft 2020-12), as report.schema.json holds it."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | AuditReport.model_json_schema(
        mode="serialization"
    )
