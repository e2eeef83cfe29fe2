"""What the Python functions return: a report or an unlearned model, easy to read in a notebook and in a program."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stillknows.auditing.findings import words
from stillknows.auditing.verdict import EXIT_CODES
from stillknows.reporting import report
from stillknows.types import Finding, VerdictName

PAGE_HEIGHT = 640  # pixels of a report within a notebook


@dataclass(frozen=True)
class Report:
    """An audit's outcome. `data` is all of it, as report.json holds it and report.schema.json describes it."""

    data: Mapping[str, Any]

    @property
    def verdict(self) -> VerdictName:
        """The worst verdict on an audited model; the controls do not count."""
        return self.data["verdict"]

    @property
    def exit_code(self) -> int:
        """What the command line ends with for this verdict: 0 for FORGOTTEN alone."""
        return EXIT_CODES[self.verdict]

    @property
    def verdicts(self) -> dict[str, VerdictName]:
        """The verdict on every model, controls included, by its label."""
        return {subject["name"]: subject["verdict"] for subject in self.data["subjects"]}

    @property
    def reasons(self) -> list[dict[str, Any]]:
        """What the verdicts rest on, as rows for `pandas.DataFrame`.

        A row has `subject`, the fields of `types.Finding` (None where one does not apply) and `words`, which says the
        same. `outcome` is what the finding is for the verdict: "leak", "damage", "undecided", "pass" or "note".
        """
        return [
            {"subject": subject["name"], **finding, "words": words(Finding(**finding))}
            for subject in self.data["subjects"]
            for finding in subject["findings"]
        ]

    @property
    def cells(self) -> list[dict[str, Any]]:
        """Every number as a row for `pandas.DataFrame`.

        A row has `subject`, `variant`, `split` and `metric`, and `value`, `low`, `high` (one-sided bounds, 95 % each)
        and `n` facts, or `not_measured` with the reason why there is no number.
        """
        return [{"subject": subject["name"], **cell} for subject in self.data["subjects"] for cell in subject["cells"]]

    def save(self, folder: str | Path) -> Path:
        """Write report.json, report.html and report.md into a folder, replacing older ones; return the folder."""
        report.write(dict(self.data), Path(folder))
        return Path(folder)

    def __str__(self) -> str:
        return report.summary(dict(self.data))

    def __repr__(self) -> str:
        return f"Report(verdicts={self.verdicts!r})"

    def _repr_html_(self) -> str:
        """Return the report's page in a frame of its own, so that a notebook's styles and the page's stay apart."""
        page = html.escape(report.html(dict(self.data)), quote=True)
        return f'<iframe srcdoc="{page}" style="width:100%;height:{PAGE_HEIGHT}px;border:0"></iframe>'


@dataclass(frozen=True)
class Unlearned:
    """An unlearned model on disk. `record` is what run.json holds: all that is needed to repeat the run."""

    path: Path
    record: Mapping[str, Any] = field(repr=False)

    def load(self) -> tuple[Any, Any]:
        """Return the model, in float32 and evaluation mode, and its tokenizer."""
        from stillknows.model import checkpoints

        subject = checkpoints.load(checkpoints.locate(str(self.path)))
        return subject.model, subject.tokenizer

    def __fspath__(self) -> str:
        return str(self.path)
