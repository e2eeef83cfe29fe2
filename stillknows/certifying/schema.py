"""The typed form of a certificate: an in-toto Statement v1 with a predicate of our own.

One definition for Python, for what is read back and for certificate.schema.json. The predicate's first five fields are
those of in-toto's test-result predicate v0.1, so that other tools find the words that they know.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.alias_generators import to_camel

from stillknows.judgements import ClaimName, ClaimVerdict
from stillknows.reporting.annex import AnnexRow
from stillknows.reporting.parts import Part
from stillknows.reporting.schema import LeftOutVariant, ReportSplit
from stillknows.types import VerdictName

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "urn:stillknows:certificate:v1"
SCHEMA = "certificate.schema.json"
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
TestResult = Literal["PASSED", "WARNED", "FAILED"]
RESULTS: dict[VerdictName, TestResult] = {
    "FORGOTTEN": "PASSED",
    "UNDECIDED": "WARNED",
    "STILL KNOWS": "FAILED",
    "HIDDEN": "FAILED",
    "DAMAGED": "FAILED",
}
CLAIM_RESULTS: dict[ClaimVerdict, TestResult] = {"PASS": "PASSED", "INCONCLUSIVE": "WARNED", "FAIL": "FAILED"}


class CertificatePart(Part):
    """A part of a certificate: names as in-toto writes them."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, serialize_by_alias=True)


class Digests(CertificatePart):
    """Digests of one file."""

    sha256: Sha256


class Resource(CertificatePart):
    """A file that the certificate is about or that it rests on: an in-toto ResourceDescriptor."""

    name: str
    """"role/path": the path within the folder that has this role, for controls "label/role/path"."""
    digest: Digests


class AuditedModel(CertificatePart):
    """A model, as it was found when it was audited."""

    label: str
    path: str
    """Folder, file or hub name."""
    fingerprint: str
    """Identifies weights, configuration and tokenizer."""
    quantized: str | None
    defence: str | None


class AuditedBenchmark(CertificatePart):
    """What was asked."""

    spec: str
    items: Sha256
    """Of all items, with their splits, roles and frames."""
    splits: tuple[ReportSplit, ...]


class NotTested(CertificatePart):
    """What the verdict says nothing of."""

    variants: tuple[str, ...]
    """Formats, defences and attacks that stillknows knows and that were not run in any form."""
    left_out: tuple[LeftOutVariant, ...]
    """Variants that the model or the benchmark did not allow."""
    cells: Annotated[int, Field(ge=0)]
    """Numbers that could not be measured; the report says why."""
    open_facts: Annotated[int, Field(ge=0)]
    """Facts of which nothing can be said by themselves."""
    out_of_reach: str
    """Why FORGOTTEN could not be found, whatever was observed; "" where it could."""


class CertifiedClaim(CertificatePart):
    """What can be claimed of the model; the report has the evidence."""

    name: ClaimName
    verdict: ClaimVerdict
    variants: tuple[str, ...]
    """Those that the verdict rests on."""
    settle: str
    """What would settle it; "" where it is settled."""


class SigningKey(CertificatePart):
    """Whose signature the certificate carries."""

    keyid: Sha256
    public_key: str
    """PEM."""


class Predicate(CertificatePart):
    """What was audited, how, and what was found."""

    result: TestResult
    configuration: tuple[Resource, ...]
    """What the audit was asked and its report: ledger.json and report.json."""
    passed_tests: tuple[str, ...]
    """Variants in which the model has forgotten, and claims that pass."""
    warned_tests: tuple[str, ...]
    """Variants in which nothing was decided, and claims that are inconclusive."""
    failed_tests: tuple[str, ...]
    """Variants in which it still knows, or is damaged, and claims that fail."""
    verdict: VerdictName
    variants: dict[str, VerdictName]
    claims: tuple[CertifiedClaim, ...]
    model: AuditedModel
    controls: tuple[AuditedModel, ...]
    """The original, and models that were never taught."""
    benchmark: AuditedBenchmark
    policy: dict[str, Any]
    metrics: tuple[str, ...]
    seeds: dict[str, int]
    """Seeds of the benchmark and the variants that have one."""
    software: dict[str, str]
    """Versions that results can depend on."""
    command: str
    """Repeats the audit."""
    created: str
    """When the certificate was made: RFC 3339, UTC."""
    resources: tuple[Resource, ...]
    """Files of the original, the controls and the data, and all that the audit observed."""
    not_tested: NotTested
    annex: tuple[AnnexRow, ...]
    """What published opinions and codes name, and whether it was run. No legal finding."""
    signer: SigningKey


class Certificate(CertificatePart):
    """An in-toto Statement v1: its subjects are all files that the audited model is read from."""

    model_config = ConfigDict(title="stillknows certificate")

    type: Annotated[Literal["https://in-toto.io/Statement/v1"], Field(alias="_type")]
    subject: Annotated[tuple[Resource, ...], Field(min_length=1)]
    predicate_type: Literal["urn:stillknows:certificate:v1"]
    predicate: Predicate

    def to_json(self) -> dict[str, Any]:
        """Return the statement as JSON."""
        return self.model_dump(mode="json", by_alias=True)


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of the statement (draft 2020-12), as certificate.schema.json holds it."""
    schema = Certificate.model_json_schema(by_alias=True, mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": PREDICATE} | schema
