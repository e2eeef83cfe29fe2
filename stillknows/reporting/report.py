"""Reports on disk: JSON for programs, one self-contained HTML page for people, Markdown for terminals and logs.

Everything that is shown is made from the JSON data, so a saved report can be rendered again without the models.
"""

from __future__ import annotations

from pathlib import Path

from stillknows.auditing.evidence import CellKey
from stillknows.errors import UserError
from stillknows.observations import OBSERVATIONS, load_observations, observations_digest
from stillknows.reporting.markdown import markdown
from stillknows.reporting.page import html
from stillknows.reporting.schema import AuditReport, parsed
from stillknows.store import AGAIN, REPORT, locked, read_sealed, slug, write_sealed, write_text

JSON, HTML, MARKDOWN = REPORT, "report.html", "report.md"


def write(report: AuditReport, folder: Path) -> AuditReport:
    """Write report.json, report.html and report.md into a folder, each in one step; return the report as written."""
    with locked(folder):
        write_text(folder / HTML, html(report))
        write_text(folder / MARKDOWN, markdown(report))
        return parsed(write_sealed(folder / JSON, report.to_json()), str(folder / JSON))


def read(folder: Path) -> AuditReport:
    """Return the report that a folder holds.

    Raises UserError when there is none, when it is of another version, was changed since or does not follow
    report.schema.json, and when the observations beside it are not those that it was made of.
    """
    report = parsed(read_sealed(folder / JSON), str(folder / JSON))
    for place, digest in observed(report).items():
        file = folder / OBSERVATIONS / place.model / slug(place.variant) / f"{place.split}.npz"
        seen = load_observations(file)
        if file.is_file() and (seen is None or observations_digest(seen) != digest):
            raise UserError(f"{file} is not what {JSON} was made of", AGAIN)
    return report


def observed(report: AuditReport) -> dict[CellKey, str]:
    """Return the digests of the observations that a report was made of."""
    return {
        CellKey(subject.name, variant, split): digest
        for subject in report.subjects
        for variant, splits in subject.observations.items()
        for split, digest in splits.items()
    }
