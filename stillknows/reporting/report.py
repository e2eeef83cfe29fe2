"""Reports on disk: JSON for programs, one self-contained HTML page for people, Markdown for terminals and logs.

Everything that is shown is made from the JSON data, so a saved report can be rendered again without the models.
"""

from __future__ import annotations

from pathlib import Path

from stillknows.auditing.evidence import CellKey
from stillknows.errors import UserError
from stillknows.ledger import LEDGER, Ledger
from stillknows.observations import OBSERVATIONS, load_observations, observations_digest, observations_path
from stillknows.reporting.markdown import markdown
from stillknows.reporting.page import html
from stillknows.reporting.schema import AuditReport, parsed
from stillknows.store import AGAIN, REPORT, locked, read_sealed, write_sealed, write_text

JSON, HTML, MARKDOWN = REPORT, "report.html", "report.md"


def write(report: AuditReport, folder: Path) -> AuditReport:
    """Write report.json, report.html and report.md into a folder, each in one step; return the report as written.

    The ledger of the audit in the folder, where there is one, is closed with it.
    """
    with locked(folder):
        write_text(folder / HTML, html(report))
        write_text(folder / MARKDOWN, markdown(report))
        written = write_sealed(folder / JSON, report.to_json())
        if (folder / LEDGER).is_file():
            Ledger.open(folder).close(written)
        return parsed(written, str(folder / JSON))


def read(folder: Path) -> AuditReport:
    """Return the report that a folder holds.

    Raises UserError when there is none, when it is of another version, was changed since or does not follow
    report.schema.json. Where observations lie beside it, they and the report must be those of the folder's ledger, and
    the observations those that the report names. A report alone is taken as it is.
    """
    report = parsed(read_sealed(folder / JSON), str(folder / JSON))
    if not (folder / OBSERVATIONS).is_dir():
        return report
    ledger = Ledger.read(folder)
    if report.digest != ledger.report:
        raise UserError(f"{folder / JSON} is not the report that {LEDGER} names", AGAIN)
    for digest, file in zip(observed(report).values(), observed_files(report, folder), strict=True):
        ledger.require(file, JSON)
        seen = load_observations(file)
        if seen is None or observations_digest(seen) != digest:
            raise UserError(f"{file} is not what {JSON} was made of", AGAIN)
    return report


def observed_files(report: AuditReport, folder: Path) -> list[Path]:
    """Return where the observations lie that a report was made of, in the order of `observed`."""
    defended = {subject.name for subject in report.subjects if subject.defence}
    return [observations_path(folder, *place, is_defended=place.model in defended) for place in observed(report)]


def observed(report: AuditReport) -> dict[CellKey, str]:
    """Return the digests of the observations that a report was made of."""
    return {
        CellKey(subject.name, variant, split): digest
        for subject in report.subjects
        for variant, splits in subject.observations.items()
        for split, digest in splits.items()
    }
