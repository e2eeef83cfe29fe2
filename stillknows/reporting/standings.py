"""Where models stand over several audits, and whether these audits can be compared at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from stillknows.auditing.evidence import CellKey
from stillknows.errors import UserError
from stillknows.observations import OBSERVATIONS, load_observations
from stillknows.reporting import report
from stillknows.reporting.schema import AuditReport, Measured, ReportSubject, Unmeasured
from stillknows.store import digest, slug
from stillknows.types import FULL, ORIGINAL, VerdictName


class ModelStanding(NamedTuple):
    """One model of one audit.

    kept: what it keeps most of in any variant by any gate, with its bounds; how much of the knowledge, or, `is_raw`,
        the score as it is where the audit has no never-taught control. None where nothing was measured.
    utility: the lowest share of the original's score on what is to be retained; None without.
    """

    audit: str
    model: str
    verdict: VerdictName
    kept: Measured | None
    utility: Measured | None
    is_raw: bool

    def to_json(self) -> dict[str, Any]:
        parts = {"kept": self.kept, "utility": self.utility}
        return self._asdict() | {name: cell and cell.model_dump() for name, cell in parts.items()}


class AuditFolder(NamedTuple):
    """An audit as it lies in a folder, and what has to agree for two of them to be compared: by name, as text."""

    name: str
    report: AuditReport
    basis: dict[str, str]


def read(folder: str | Path) -> AuditFolder:
    """Return what a folder holds. Raises UserError as `report.read` does."""
    path = Path(folder)
    found = report.read(path)
    basis = {
        "data": _data(path, found),
        "plan": digest(sorted(found.variants), sorted(found.placebos)),
        "policy": digest(asdict(found.policy)),
        "original": next((s.fingerprint for s in found.subjects if s.name == ORIGINAL), ""),
        "controls": digest(sorted(s.fingerprint for s in found.subjects if s.is_control and s.name != ORIGINAL)),
    }
    return AuditFolder(str(folder), found, basis)


def read_all(folders: Sequence[str | Path]) -> list[AuditFolder]:
    """Return what several folders hold, once each. Raises UserError without any."""
    if not folders:
        raise UserError("no audit is given", "name folders that `stillknows audit` wrote")
    return [read(folder) for folder in dict.fromkeys(map(str, folders))]


def differences(one: AuditFolder, other: AuditFolder) -> list[str]:
    """Say in what two audits differ that has to agree; nothing where they can be compared."""
    return [f"another {name} than {one.name}" for name, value in one.basis.items() if other.basis[name] != value]


def standings(audit: AuditFolder) -> list[ModelStanding]:
    """Return where each audited model stands; controls are none."""
    return [_standing(audit, subject) for subject in audit.report.audited]


def _standing(audit: AuditFolder, subject: ReportSubject) -> ModelStanding:
    found, policy = audit.report, audit.report.policy
    told = {finding.variant for finding in subject.findings if finding.kind == "answer_told"}
    forget = [(variant, split) for variant in found.variants for split in found.splits_of("forget")]
    suffix = ".kept" if found.is_compared else ""
    kept = _measured(
        subject.by_place.get((variant, split, f"{gate}{suffix}"))
        for variant, split in forget
        if variant not in told
        for gate in policy.gates
    )
    retained = _measured(
        subject.by_place.get((variant, split, f"{policy.utility}.share"))
        for variant in found.variants
        for split in found.splits_of("retain")
    )
    most = max(kept, key=lambda cell: cell.value, default=None)
    least = min(retained, key=lambda cell: cell.value, default=None)
    return ModelStanding(audit.name, subject.name, subject.verdict, most, least, not found.is_compared)


def _measured(cells: Iterator[Measured | Unmeasured | None]) -> list[Measured]:
    return [cell for cell in cells if isinstance(cell, Measured)]


def _data(folder: Path, found: AuditReport) -> str:
    """Return what is equal for audits of the same items: a digest of these, where the observations lie beside the
    report, else what the report says of the benchmark."""
    parts = []
    for split in found.splits:
        place = CellKey(ORIGINAL, FULL, split.name)
        file = folder / OBSERVATIONS / place.model / slug(place.variant) / f"{place.split}.npz"
        seen = load_observations(file)
        if seen is None:
            return digest(found.benchmark, [part.model_dump() for part in found.splits])
        parts.append([split.name, split.role, seen.ids, seen.facts, seen.prompts, seen.answers])
    return digest(parts)
