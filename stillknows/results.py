"""What the Python functions return: a report or an unlearned model, easy to read in a notebook and in a program."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillknows.auditing.findings import out_of_reach_words, words
from stillknows.auditing.policy import Policy
from stillknows.auditing.verdict import EXIT_CODES
from stillknows.certifying.verify import Verification as Verification
from stillknows.reporting import report
from stillknows.reporting.overview import summary
from stillknows.reporting.schema import AuditReport, ReportSplit
from stillknows.types import VerdictName

if TYPE_CHECKING:
    from stillknows.certifying.schema import Certificate
    from stillknows.training.loop import FitResult
    from stillknows.training.settings import Settings

PAGE_HEIGHT = 640  # pixels of a report within a notebook


@dataclass(frozen=True)
class Report:
    """An audit's outcome. `data` is all of it, typed, as report.json holds it and report.schema.json describes it."""

    data: AuditReport

    @property
    def verdict(self) -> VerdictName:
        """The worst verdict on an audited model; the controls do not count."""
        return self.data.verdict

    @property
    def exit_code(self) -> int:
        """What the command line ends with for this verdict: 0 for FORGOTTEN alone."""
        return EXIT_CODES[self.verdict]

    @property
    def verdicts(self) -> dict[str, VerdictName]:
        """The verdict on every model, controls included, by its label."""
        return {subject.name: subject.verdict for subject in self.data.subjects}

    @property
    def variants(self) -> tuple[str, ...]:
        """What the models were judged in."""
        return self.data.variants

    @property
    def splits(self) -> tuple[ReportSplit, ...]:
        """The benchmark's splits, with their roles and sizes."""
        return self.data.splits

    @property
    def policy(self) -> Policy:
        """What the verdicts demand."""
        return self.data.policy

    @property
    def out_of_reach(self) -> str:
        """Why no model could be found FORGOTTEN, whatever was observed; "" where one could."""
        return out_of_reach_words(self.data.out_of_reach)

    @property
    def reasons(self) -> list[dict[str, Any]]:
        """What the verdicts rest on, as rows for `pandas.DataFrame`.

        A row has `subject`, the fields of `types.Finding` (None where one does not apply) and `words`, which says the
        same. `outcome` is what the finding is for the verdict: "leak", "damage", "undecided", "pass" or "note".
        """
        return [
            {"subject": subject.name, **asdict(finding), "words": words(finding)}
            for subject in self.data.subjects
            for finding in subject.findings
        ]

    @property
    def cells(self) -> list[dict[str, Any]]:
        """Every number as a row for `pandas.DataFrame`.

        A row has `subject`, `variant`, `split` and `metric`, and `value`, `low`, `high` (one-sided bounds, 95 % each)
        and `n` facts, or `not_measured` with the reason why there is no number.
        """
        return [{"subject": s.name, **cell.model_dump()} for s in self.data.subjects for cell in s.cells]

    def to_json(self) -> dict[str, Any]:
        """Return what report.json holds."""
        return self.data.to_json()

    def save(self, folder: str | Path) -> Path:
        """Write report.json, report.html and report.md into a folder, replacing older ones; return the folder."""
        report.write(self.data, Path(folder))
        return Path(folder)

    def __str__(self) -> str:
        return summary(self.data)

    def __repr__(self) -> str:
        return f"Report(verdicts={self.verdicts!r})"

    def _repr_html_(self) -> str:
        """Return the report's page in a frame of its own, so that a notebook's styles and the page's stay apart."""
        page = html.escape(report.html(self.data), quote=True)
        return f'<iframe srcdoc="{page}" style="width:100%;height:{PAGE_HEIGHT}px;border:0"></iframe>'


@dataclass(frozen=True)
class Scores:
    """What an audit or a log of another project scored again gives; `data` is what `stillknows score --json` prints."""

    data: Mapping[str, Any] = field(repr=False)

    @property
    def cells(self) -> list[dict[str, Any]]:
        """Every number of an audit as a row for `pandas.DataFrame`; none for a log, which names its own."""
        return list(self.data.get("cells", ()))

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know of the numbers."""
        return tuple(self.data.get("notes", ()))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What does not agree with what the log records itself."""
        return tuple(self.data.get("warnings", ()))

    def to_json(self) -> dict[str, Any]:
        """Return all of it."""
        return dict(self.data)

    def __str__(self) -> str:
        from stillknows.reporting.rescore import text

        return text(dict(self.data))


@dataclass(frozen=True)
class Certified:
    """A signed certificate on disk. `data` is its statement, typed, as certificate.schema.json describes it."""

    path: Path
    data: Certificate = field(repr=False)

    @property
    def verdict(self) -> VerdictName:
        """The verdict on the model."""
        return self.data.predicate.verdict

    @property
    def model(self) -> str:
        """Where the audit found the model."""
        return self.data.predicate.model.path

    def to_json(self) -> dict[str, Any]:
        """Return the statement that was signed."""
        return self.data.to_json()

    def __str__(self) -> str:
        found = self.data.predicate
        files = f"{len(self.data.subject)} files, {len(found.resources)} resources"
        return (
            f"{self.path}: {found.verdict} ({found.result}) for {self.model}, {files}, key {found.signer.keyid[:12]}…"
        )


@dataclass(frozen=True)
class Unlearned:
    """An unlearned model on disk. `record` is what run.json holds: all that is needed to repeat the run."""

    path: Path
    record: Mapping[str, Any] = field(repr=False)

    @property
    def method(self) -> str | None:
        """The method's spec; None for a model that was fine-tuned."""
        return self.record.get("method")

    @property
    def settings(self) -> Settings:
        """How it was optimised."""
        from stillknows.training.settings import Settings

        return Settings(**self.record["settings"])

    @property
    def fit(self) -> FitResult:
        """Steps, why they ended, what the checks saw, and the cost."""
        from stillknows.training.loop import FitResult

        return FitResult(**self.record["fit"])

    def load(self) -> tuple[Any, Any]:
        """Return the model, in float32 and evaluation mode, and its tokenizer."""
        from stillknows.model.ref import ModelRef

        target = ModelRef.open(str(self.path)).load()
        return target.model, target.tokenizer

    def __str__(self) -> str:
        told = f"{self.fit.steps} steps in {self.fit.seconds:.0f} s; {self.fit.stopped}"
        sentences = (self.record[part]["sentence"] for part in ("goal", "self_check") if part in self.record)
        return "\n".join((told, *sentences))

    def __fspath__(self) -> str:
        return str(self.path)
