"""The compliance annex: a table of data, looked up in a report; and the part for a model card."""

from __future__ import annotations

from typing import Any

import pytest
from huggingface_hub import ModelCard
from test_report import make_audit, make_report

from stillknows.errors import UserError
from stillknows.registry import plugins
from stillknows.reporting.annex import NOTICE, annex, table
from stillknows.reporting.markdown import markdown
from stillknows.reporting.model_card import model_card, section
from stillknows.reporting.page import html
from stillknows.reporting.schema import AuditReport, Measured

WORDS = {"placebos", "control", "attack:*", "format:*"}


@pytest.fixture(scope="module")
def built() -> AuditReport:
    return make_report(make_audit())


def status(report: AuditReport) -> dict[str, tuple[str, tuple[str, ...]]]:
    return {row.about: (row.status, row.by) for row in annex(report)}


def changed(report: AuditReport, **parts: Any) -> AuditReport:
    return report.model_copy(update=parts)


def test_every_entry_of_the_table_is_something_that_an_audit_can_hold() -> None:
    known = {f"{'attack' if p.role == 'attack' else 'format'}:{name}" for name, p in plugins("transform").items()}
    known |= {f"metric:{name}" for name in plugins("metric")} | WORDS
    entries = {entry for row in table() for entry in row.get("done_by", ())}
    assert {entry for entry in entries - known if not entry.startswith("figure:")} == set()
    for row in table():
        assert {"source", "about"} < row.keys() <= {"source", "about", "done_by", "not_applicable"}
        assert ("done_by" in row) != ("not_applicable" in row)


def test_a_row_is_done_by_what_the_audit_held(built: AuditReport) -> None:
    """Formats, a control and the answer probability; neither attacks nor placebos."""
    found = status(built)
    assert found["the model in the forms in which it is deployed"] == ("done", ("format:*",))
    assert found["capability measured, compared with a model that lacks the knowledge"] == ("done", ("control",))
    assert {found[f"{kind} inference"] for kind in ("attribute", "membership")} == {("not run", ())}
    assert found["infringing uses prohibited in terms of use"] == ("not applicable", ())
    plain = changed(built, variants=("full",), subjects=tuple(s for s in built.subjects if s.name != "control"))
    assert {row.status for row in annex(plain)} == {"not run", "not applicable"}


@pytest.mark.parametrize(
    ("parts", "about", "by"),
    [
        ({"variants": ("full", "int4+relearn:steps=5")}, "reconstruction", ("attack:relearn",)),
        ({"variants": ("frame(style=all)",)}, "elicitation by prompts", ("attack:frame",)),
        ({"metrics": ("min_k:k=0.2",)}, "membership inference", ("metric:min_k",)),
        (
            {"metrics": ("rouge_l:score=recall",)},
            "outputs that reproduce training content, as users ask",
            ("metric:rouge_l",),
        ),
    ],
)
def test_chains_options_and_both_spellings_count(
    parts: dict[str, Any], about: str, by: tuple[str, ...], built: AuditReport
) -> None:
    assert status(changed(built, **parts))[about] == ("done", by)


def test_a_published_figure_counts_where_it_was_measured(built: AuditReport) -> None:
    number = {"variant": "full", "split": "suite", "value": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    cell = Measured(metric="min_k.auc", **number)
    [first, *others] = built.subjects
    more = changed(built, subjects=(first.model_copy(update={"cells": (*first.cells, cell)}), *others))
    assert status(more)["membership inference"] == ("done", ("figure:auc",))


def test_the_annex_stands_in_the_report_and_finds_nothing_legal(built: AuditReport) -> None:
    for shown in (html(built), markdown(built)):
        assert NOTICE in shown
        for row in annex(built):
            assert row.source in shown
            assert row.about in shown
    assert "no legal finding" in NOTICE


def test_a_model_card_is_read_by_the_hub(built: AuditReport) -> None:
    card = ModelCard(model_card(built, built.chosen("brittle")))
    results = card.data.eval_results
    assert results is not None
    assert card.data.model_name == "brittle"
    found = {(r.dataset_config, r.dataset_split, r.metric_name): r.metric_value for r in results}
    assert found.keys() == {
        (variant, split, f"answer_probability.{number}")
        for variant in built.variants
        for split, number in (("forget", "kept"), ("retain", "share"))
    }
    for subject in built.audited:
        for cell in subject.cells:
            if subject.name == "brittle" and (cell.variant, cell.split, cell.metric) in found:
                assert isinstance(cell, Measured)
                assert found[cell.variant, cell.split, cell.metric] == pytest.approx(cell.value)
    assert "".join(card.text.split()).count("|int4|STILLKNOWS|") == 1
    assert section(built, built.chosen("clean")).startswith("## What the model still knows\n\nFORGOTTEN, by stillknows")


def test_the_model_of_a_card_is_named_where_there_are_several(built: AuditReport) -> None:
    with pytest.raises(UserError, match=r"judged 3 models: clean, brittle, broken\n.*`label`"):
        built.chosen(None)
