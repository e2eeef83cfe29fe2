"""The placebo test in words: for the page, for Markdown."""

from __future__ import annotations

from typing import get_args

from stillknows.formatting import percent
from stillknows.judgements import FactStatus
from stillknows.reporting.parts import PlaceboSection, TestedFact
from stillknows.reporting.schema import AuditReport, ReportSubject


def sources(report: AuditReport) -> str:
    """Say where placebos come from; "" where there are none."""
    found = [f"{source} for {facts} facts" for source, (facts, _) in report.placebos.items()]
    return f"Placebos: {', '.join(found)}." if found else ""


def counted(subject: ReportSubject) -> str:
    """Say how many facts are leaked, cleared and open, and name those that are leaked or suspicious."""
    judged = subject.single_facts
    parts = [f"{sum(f.status == status for f in judged)} {status}" for status in get_args(FactStatus)]
    leaked, seeming = [f.fact for f in judged if f.status == "leaked"], [f.fact for f in judged if f.suspicious]
    told = [f"{what}: {', '.join(names)}" for what, names in (("leaked", leaked), ("seem known", seeming)) if names]
    return f"Of {len(judged)} facts {', '.join(parts)}. {'; '.join(told)}".rstrip()


def summary_of(section: PlaceboSection) -> str:
    """Say how many facts the test names and what it would have found."""
    count, named = len(section.facts), len(section.named)
    parts = [f"{named} of {count} facts named"]
    if section.untestable:
        parts.append(f"{len(section.untestable)} could not have been, whatever the model knows")
    half = [fact for fact in section.facts if fact.found_half]
    parts.append(f"{len(half)} would be if they were known half as well as before")
    if section.diffuse is not None:
        parts.append(f"true answers beat {percent(section.diffuse.mean_rank)} of their placebos, by chance 50 %")
    pushed = [fact for fact in section.facts if fact.pushed_below]
    if pushed:
        parts.append(f"{len(pushed)} true answers lie below all guesses, a trace of unlearning")
    return f"{'; '.join(parts)}."


def power(fact: TestedFact) -> str:
    """Say how well a fact would have to be known to be named."""
    if fact.untestable:
        return f"untestable: {fact.untestable}"
    if fact.found is None:
        return "not measured"
    return "half as well" if fact.found_half else "as well" if fact.found else "untestable: not even then"
