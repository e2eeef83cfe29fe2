"""An audit as a certificate: the files of the model that was audited, all that it rests on, and what was not tested."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from stillknows.auditing.findings import out_of_reach_words
from stillknows.certifying.files import audit_files, benchmark_files, digests, fingerprint, model_files
from stillknows.certifying.schema import (
    CLAIM_RESULTS,
    PREDICATE,
    RESULTS,
    STATEMENT,
    AuditedBenchmark,
    AuditedModel,
    Certificate,
    CertifiedClaim,
    Digests,
    NotTested,
    Predicate,
    Resource,
    SigningKey,
)
from stillknows.errors import UserError
from stillknows.ledger import LEDGER, Ledger
from stillknows.registry import bind, plugins
from stillknows.reporting import report as reports
from stillknows.reporting.annex import annex
from stillknows.reporting.report import JSON
from stillknows.reporting.schema import AuditReport, ReportSubject, Unmeasured
from stillknows.specs import chained, parse
from stillknows.types import FULL, UNDEFENDED

AGAIN = "audit the model as it is now"


def certificate(folder: Path, key: SigningKey, label: str | None = None) -> Certificate:
    """Return the certificate of one model of an audit.

    Args:
        folder: what `audit` wrote.
        key: of whoever will sign it.
        label: the model's name in the report; None where the audit judged one alone.

    Raises UserError where the audit's files do not fit its ledger, and where a model is no longer what was audited.
    """
    report, ledger = reports.read(folder), Ledger.read(folder)
    subject = report.chosen(label)
    audited = audit_files(folder, report, ledger)
    for name, file in audited.items():
        if file.name not in (LEDGER, JSON):
            ledger.require(file, name)
    found = digests(audited)
    controls = [resource for s in report.subjects if s.is_control for resource in _named(_model_digests(s), s.name)]
    data = _resources(digests(benchmark_files(report.benchmark)))
    return Certificate(
        type=STATEMENT,
        subject=_resources(_model_digests(subject)),
        predicate_type=PREDICATE,
        predicate=Predicate(
            result=RESULTS[subject.verdict],
            configuration=_resources({name: found[name] for name in (f"audit/{LEDGER}", f"audit/{JSON}")}),
            passed_tests=_tests(subject, "PASSED"),
            warned_tests=_tests(subject, "WARNED"),
            failed_tests=_tests(subject, "FAILED"),
            verdict=subject.verdict,
            variants=subject.variants,
            claims=tuple(
                CertifiedClaim(name=claim.name, verdict=claim.verdict, variants=claim.variants, settle=claim.settle)
                for claim in subject.claims
            ),
            model=_described(subject),
            controls=tuple(_described(s) for s in report.subjects if s.is_control),
            benchmark=AuditedBenchmark(
                spec=report.benchmark, items=ledger.request["benchmark"]["items"], splits=report.splits
            ),
            policy=asdict(report.policy),
            metrics=report.metrics,
            seeds=dict(_seeds(report)),
            software={"stillknows": report.stillknows, **report.repeat.versions},
            command=report.repeat.command,
            created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            resources=(*controls, *data, *_resources(found)),
            not_tested=_not_tested(report, subject),
            annex=annex(report),
            signer=key,
        ),
    )


def _described(subject: ReportSubject) -> AuditedModel:
    return AuditedModel(
        label=subject.name,
        path=subject.path,
        fingerprint=subject.fingerprint,
        quantized=subject.quantized,
        defence=subject.defence,
    )


def _model_digests(subject: ReportSubject) -> dict[str, str]:
    """Return the digests of a model's files. Raises UserError where they are not those that were audited."""
    try:
        found = digests(model_files(subject.path))
    except UserError as error:
        raise UserError(f"the model {subject.name} cannot be certified: {error}", AGAIN) from error
    if fingerprint(found) != subject.fingerprint:
        raise UserError(f"{subject.path} is not the model that was audited as {subject.name}", AGAIN)
    return found


def _resources(found: Mapping[str, str]) -> tuple[Resource, ...]:
    return tuple(Resource(name=name, digest=Digests(sha256=digest)) for name, digest in found.items())


def _named(found: Mapping[str, str], role: str) -> tuple[Resource, ...]:
    return _resources({f"{role}/{name}": digest for name, digest in found.items()})


def _tests(subject: ReportSubject, result: str) -> tuple[str, ...]:
    variants = (variant for variant, verdict in subject.variants.items() if RESULTS[verdict] == result)
    claims = (f"claim: {claim.name}" for claim in subject.claims if CLAIM_RESULTS[claim.verdict] == result)
    return (*variants, *claims)


def _links(report: AuditReport) -> Iterator[tuple[str, str]]:
    """Yield the transforms of every variant, each with its variant."""
    for variant in report.variants:
        yield from ((variant, link) for link in chained(variant) if link != UNDEFENDED)


def _seeds(report: AuditReport) -> Iterator[tuple[str, int]]:
    with contextlib.suppress(UserError):  # a benchmark that was made in Python has a name, and no options
        options = bind("benchmark", report.benchmark).options
        yield from ((report.benchmark, options[name]) for name in options if name == "seed")
    for variant, link in _links(report):
        options = bind("transform", link).options
        yield from ((f"{variant}: {link}", options[name]) for name in options if name == "seed")


def _not_tested(report: AuditReport, subject: ReportSubject) -> NotTested:
    run = {parse(link).name for _, link in _links(report)}
    return NotTested(
        variants=tuple(sorted(plugins("transform").keys() - run - {FULL})),
        left_out=report.left_out,
        cells=sum(isinstance(cell, Unmeasured) for cell in subject.cells),
        open_facts=sum(fact.status == "open" for fact in subject.single_facts),
        out_of_reach=out_of_reach_words(report.out_of_reach),
    )
