"""For pytest: the fixture `stillknows_audit` audits models within a test, and fails it in the report's own words.

pytest loads this module at every start, so nothing but pytest itself is imported until a test asks for the fixture.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from stillknows.reporting.schema import AuditReport
    from stillknows.results import Report

MARKER = "stillknows_audit"
DEMANDED = "FORGOTTEN"
LONGEST_NAME = 60  # letters of a test's name in that of its folder


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker."""
    config.addinivalue_line(
        "markers",
        f"{MARKER}(*models, verdict={DEMANDED!r}, **options): what the fixture of that name is given where the test "
        "does not say it: models, verdicts that pass, and options of stillknows.audit",
    )


@pytest.fixture
def stillknows_audit(request: pytest.FixtureRequest) -> Callable[..., Report]:
    """Return audit(*models, verdict="FORGOTTEN", **options): `stillknows.audit`, which fails the test.

    It does so when the worst verdict on the models is not `verdict`, or none of several. What neither the call nor the
    nearest marker says, a marker further out does (of the class, of the module). The report and what was observed lie
    in pytest's cache folder, so that a run that is repeated measures only what is new; `out` names another folder.
    """

    def audit(*models: Any, **options: Any) -> Report:
        import stillknows as sk

        __tracebackhide__ = True
        marks = list(request.node.iter_markers(MARKER))
        said: dict[str, Any] = {"overwrite": True}
        for mark in reversed(marks):
            said |= mark.kwargs
        said |= options
        demanded = _verdicts(said.pop("verdict", DEMANDED))
        named = models or next((mark.args for mark in marks if mark.args), ())
        out = Path(said.pop("out", None) or _folder(request))
        report, why = None, ""
        try:
            report = sk.audit(*named, **said, out=out)
        except sk.UserError as error:
            why = f"stillknows cannot audit: {error}"
        if report is None:
            pytest.fail(why, pytrace=False)
        if report.verdict not in demanded:
            pytest.fail(f"{_words(report.data, demanded)}\nsee {out / 'report.html'}", pytrace=False)
        return report

    return audit


def _verdicts(demanded: str | Sequence[str]) -> tuple[str, ...]:
    """Return the verdicts that pass. Raises UsageError for what is none."""
    from stillknows.auditing.verdict import EXIT_CODES

    found = (demanded,) if isinstance(demanded, str) else tuple(demanded)
    unknown = [name for name in found if name not in EXIT_CODES]
    if unknown or not found:
        raise pytest.UsageError(f"verdict={demanded!r} names no verdict; known: {', '.join(EXIT_CODES)}")
    return found


def _folder(request: pytest.FixtureRequest) -> Path:
    """Return where a test's audit lies: in pytest's cache, or in a temporary folder where that is switched off."""
    name = request.node.nodeid
    plain = re.sub(r"\W+", "-", name)[-LONGEST_NAME:].strip("-")
    folder = f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    cache: pytest.Cache | None = getattr(request.config, "cache", None)
    if cache is None:
        return request.getfixturevalue("tmp_path") / folder
    return cache.mkdir("stillknows") / folder


def _words(report: AuditReport, demanded: Sequence[str]) -> str:
    """Say what was demanded, what was found, and what that rests on."""
    from stillknows.auditing.findings import sentences
    from stillknows.reporting.overview import sentence

    lines = [f"{sentence(report)} Demanded: {' or '.join(demanded)}."]
    for subject in report.audited:
        if subject.verdict not in demanded:
            lines += [f"{subject.name}: {subject.verdict}", *(f"  {text}" for text in sentences(subject.findings))]
    return "\n".join(lines)
