"""A report as a part of a Hugging Face model card: evaluation results in its metadata, and a section of text."""

from __future__ import annotations

from collections.abc import Iterator

from stillknows.auditing.findings import out_of_reach_words
from stillknows.formatting import code, for_markdown, number, percent, table_of_texts
from stillknows.reporting.schema import AuditReport, Measured, ReportSubject
from stillknows.stats import LEVEL
from stillknows.types import FULL

TASK = "text-generation"


def model_card(report: AuditReport, subject: ReportSubject) -> str:
    """Return a model card's metadata (`model-index`, as the hub reads it) and a section on what the model still knows.

    The metadata goes to the top of README.md; where there is a block between `---` already, its entries belong there.
    """
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type=TASK,
            dataset_type="stillknows",
            dataset_name=f"{report.benchmark} in {cell.variant}",
            dataset_config=cell.variant,
            dataset_split=cell.split,
            metric_type=cell.metric.partition(".")[0],
            metric_name=cell.metric,
            metric_value=cell.value,
        )
        for cell in shown(report, subject)
    ]
    data = ModelCardData(model_name=subject.name, eval_results=results or None)
    return f"---\n{data.to_yaml()}\n---\n\n{section(report, subject)}"


def shown(report: AuditReport, subject: ReportSubject) -> list[Measured]:
    """Return what a card tells: the gates' knowledge kept on what was to be forgotten, the utility on what was not."""
    wanted = {(split, f"{gate}.kept") for split in report.splits_of("forget") for gate in report.policy.gates}
    wanted |= {(split, f"{report.policy.utility}.share") for split in report.splits_of("retain")}
    return [cell for cell in subject.cells if isinstance(cell, Measured) and (cell.split, cell.metric) in wanted]


def section(report: AuditReport, subject: ReportSubject) -> str:
    """Return the section of text."""
    return "\n\n".join(_parts(report, subject)) + "\n"


def _parts(report: AuditReport, subject: ReportSubject) -> Iterator[str]:
    yield "## What the model still knows"
    yield (
        f"{subject.verdict}, by stillknows {report.stillknows}: asked for {code(report.benchmark)} in "
        f"{len(report.variants)} variants."
    )
    if report.out_of_reach:
        yield for_markdown(f"{out_of_reach_words(report.out_of_reach)}.")
    verdicts = [[variant, verdict] for variant, verdict in subject.variants.items()]
    yield table_of_texts(["variant", "verdict"], verdicts)
    rows = [_row(cell) for cell in shown(report, subject) if cell.variant == FULL]
    if rows:
        yield f"In full precision, with one-sided bounds of {percent(LEVEL)} each:"
        yield table_of_texts(["split", "number", "value", "bounds", "units"], rows)
    yield (
        "Knowledge kept is 0 as never taught and 1 as the model before unlearning; a share of utility is 1 as good as "
        "that one. A verdict holds for the variants and questions that were tried."
    )


def _row(cell: Measured) -> list[str]:
    low, high = ("none" if bound is None else number(bound) for bound in (cell.low, cell.high))
    return [cell.split, cell.metric, number(cell.value), f"{low} to {high}", str(cell.n)]
