"""The ledger of an audit: which files it wrote itself, what it was asked, and which report it made of them.

A file of observations carries a digest of itself, and so does a report. That keeps nobody from putting another model's
file, sealed as well, in the place of one. What the ledger does not hold is measured again by an audit, and refused by
whatever reads its result. Who writes a new ledger too is found out by a signed certificate, and by measuring again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillknows.checksums import content_digest
from stillknows.errors import UserError
from stillknows.observations import load_observations
from stillknows.store import AGAIN, DIGEST, read_sealed, recall, write_sealed
from stillknows.types import Observations

LEDGER = "ledger.json"
VERSION = 1


class Ledger:
    """What one audit wrote into a folder.

    files: the SHA-256 of each file, by its path within the folder.
    request: what was asked, enough to ask it again; {} before an audit says so.
    report: the digest that the report carries which was made of the files; None before there is one.
    """

    def __init__(self, folder: Path, content: Mapping[str, Any] | None = None) -> None:
        content = content or {}
        self.folder = folder
        self.files: dict[str, str] = dict(content.get("files", {}))
        self.request: dict[str, Any] = dict(content.get("request", {}))
        self.report: str | None = content.get("report")

    @classmethod
    def open(cls, folder: Path) -> Ledger:
        """Return a folder's ledger to go on with, an empty one where there is none or where it was changed."""
        try:
            return cls.read(folder)
        except UserError:
            return cls(folder)

    @classmethod
    def read(cls, folder: Path) -> Ledger:
        """Return a folder's ledger. Raises UserError where there is none, and where it was changed."""
        path = folder / LEDGER
        if not path.is_file():
            raise UserError(f"{folder} has no {LEDGER}: an earlier version wrote it, or it was removed", AGAIN)
        content = read_sealed(path)
        if content.get("version") != VERSION:
            raise UserError(f"{path} is of another version", AGAIN)
        return cls(folder, content)

    def write(self) -> None:
        """Write ledger.json."""
        content = {"version": VERSION, "request": self.request, "files": self.files, "report": self.report}
        write_sealed(self.folder / LEDGER, content)

    def holds(self, file: Path) -> bool:
        """Tell whether a file lies there as the audit wrote it."""
        return file.is_file() and self.files.get(self._name(file)) == content_digest(file)

    def require(self, file: Path, result: str) -> None:
        """Raise UserError unless a file lies there as the audit wrote it, of which it made this result."""
        if not file.is_file():
            raise UserError(f"{file} is missing, and {result} was made of it", AGAIN)
        if not self.holds(file):
            raise UserError(f"{file} is not what {result} was made of", AGAIN)

    def add(self, file: Path) -> None:
        """Enter a file that the audit has just written."""
        self.files[self._name(file)] = content_digest(file)
        self.write()

    def load(self, file: Path, cache_key: str) -> Observations | None:
        """Return observations of this key that the audit wrote; None for any others, and where there are none."""
        return load_observations(file, cache_key) if self.holds(file) else None

    def recall(self, file: Path, cache_key: str) -> dict[str, Any] | None:
        """Return numbers of this key that the audit wrote with `write_sealed`; None for any others."""
        return recall(file, cache_key) if self.holds(file) else None

    def ask(self, request: Mapping[str, Any]) -> None:
        """Enter what an audit is asked, which has no report yet."""
        self.request, self.report = dict(request), None
        self.write()

    def close(self, report: Mapping[str, Any]) -> None:
        """Enter the report, as `write_sealed` returned it, that was made of the files."""
        self.report = str(report[DIGEST])
        self.write()

    def _name(self, file: Path) -> str:
        return file.relative_to(self.folder).as_posix()
