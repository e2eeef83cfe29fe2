"""The first page of a report, read in a minute: what was asked, the answer, how sure it is, what was not tested."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from stillknows.formatting import percent
from stillknows.labels import is_control
from stillknows.reporting.schema import AuditReport, ReportSubject
from stillknows.types import VerdictName

ANSWERS: Mapping[VerdictName, str] = {
    "FORGOTTEN": "No: in everything that was tested it gives nothing away, and what was to be kept still works.",
    "STILL KNOWS": "Yes: it gives away what was to be forgotten.",
    "HIDDEN": "Yes, in other forms than the plain one: the knowledge was suppressed, not removed.",
    "DAMAGED": "It gives nothing away, but what was to be kept is damaged.",
    "UNDECIDED": "The audit cannot tell: it neither passes nor leaks.",
}


class BriefAnswer(NamedTuple):
    """What the audit answers for one model: in a sentence, and claim by claim with the evidence of each."""

    name: str
    verdict: VerdictName
    text: str
    claims: tuple[tuple[str, str], ...]
    why: str


class Brief(NamedTuple):
    """What fills the first page."""

    asked: str
    answers: tuple[BriefAnswer, ...]
    sure: tuple[str, ...]
    not_tested: tuple[str, ...]


def brief(report: AuditReport) -> Brief:
    """Return the first page of a report."""
    return Brief(
        _asked(report), tuple(map(_answer, report.audited)), tuple(_sure(report)), tuple(dict.fromkeys(_open(report)))
    )


def _asked(report: AuditReport) -> str:
    forget, kept = ([s for s in report.splits if (s.role == "forget") == wanted] for wanted in (True, False))
    facts, questions = max((s.facts for s in forget), default=0), sum(s.examples for s in forget)
    names = _listed([subject.name for subject in report.audited])
    attacks = len(report.subjects[0].attacks)
    forms, tried = len(report.variants) - attacks, f" and under {_count(attacks, 'attack')}" if attacks else ""
    do, it = ("Does", "it") if len(report.audited) == 1 else ("Do", "they")
    keeps = f" {do} {it} still know what was to be kept ({_listed([s.name for s in kept])})?" if kept else ""
    return (
        f"{do} {names} still know what was to be forgotten: {_count(facts, 'fact')}, asked for in "
        f"{_count(questions, 'question')}, in {_count(forms, 'form')} of the model{tried}?{keeps}"
    )


def _answer(subject: ReportSubject) -> BriefAnswer:
    failed = [claim for claim in subject.claims if claim.verdict == "FAIL"]
    unsettled = [claim for claim in subject.claims if claim.verdict == "INCONCLUSIVE"]
    decides = (failed or unsettled or list(subject.claims))[:1]
    why = decides[0].evidence if decides else ""
    claims = tuple((claim.name, claim.verdict) for claim in subject.claims)
    return BriefAnswer(subject.name, subject.verdict, ANSWERS[subject.verdict], claims, why)


def _sure(report: AuditReport) -> Iterator[str]:
    """Yield what chance and the size of the audit leave open."""
    for subject in report.audited:
        section = subject.facts
        if section is None:
            continue
        half = sum(fact.found_half is True for fact in section.facts)
        whole = sum(fact.found is True for fact in section.facts)
        if subject is report.audited[0]:
            yield f"By chance at most {percent(section.alpha)} of never-taught models are charged with a fact."
        yield (
            f"{subject.name}: of {_count(len(section.facts), 'fact')} {whole} would have been found if it knew them as "
            f"the original does, {half} if half as well; of {len(section.untestable)} nothing can be said one by one."
        )
    controls = sum(is_control(subject.name) for subject in report.subjects)
    yield (
        f"Compared with {_count(controls, 'never-taught control')}."
        if controls
        else "Compared with no never-taught control: what can be guessed is told by answers that could have been true."
    )


def _open(report: AuditReport) -> Iterator[str]:
    """Yield what was not tested: what was left out, what would settle open claims, and what no audit covers."""
    ordered = sorted(report.left_out, key=lambda left: left.because)
    for because, left in groupby(ordered, key=lambda left: left.because):
        yield f"{_listed([one.variant for one in left])}: {because}."
    settles: dict[str, dict[str, None]] = {}
    for subject in report.audited:
        for claim in subject.claims:
            if claim.settle:
                settles.setdefault(claim.settle, {})[claim.name] = None
    for settle, names in settles.items():
        yield f"What would settle “{'”, “'.join(names)}”: {settle}."
    yield "Questions, formats and attacks that this page does not name, and answers that a prompt or a document tells."


def _listed(names: Sequence[str]) -> str:
    *first, last = names or ("nothing",)
    return f"{', '.join(first)} and {last}" if first else last


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
