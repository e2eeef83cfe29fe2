"""`stillknows explain`: the kind of residue from the pattern of what brings knowledge back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from stillknows.auditing.findings import SAME_WEIGHTS
from stillknows.auditing.verdict import Policy
from stillknows.registry import plugins
from stillknows.reporting.residue import FAMILIES, MEANINGS, residues, text
from stillknows.reporting.schema import AuditReport, ReportSubject, Unmeasured
from stillknows.types import FULL, UNDEFENDED, WEIGHTS, Finding

TRIED = [FULL, "int4", "frame", "paraphrase", "frame+int4", "sample:n=5", "prune", "relearn", "alias", UNDEFENDED]


def leak(variant: str) -> Finding:
    return Finding(
        "knowledge_kept", "leak", variant, "forget", "answer_probability", None, 0.9, 0.8, 1.0, 0.1, 0.01, 40
    )


def report_of(exposing: Sequence[str], verdict: str = "HIDDEN", defence: Any = None, said: str | None = None) -> Any:
    """Return a report on one model; said: its answers where the layers that formats round are the original's."""
    cell = Unmeasured(variant="int4", split=WEIGHTS, metric="update.surviving", not_measured=SAME_WEIGHTS)
    leaks = [] if said is None else [type("Leak", (), {"generated_full": said})] * 3
    subject = ReportSubject.model_construct(
        name="mine",
        defence=defence,
        verdict=verdict,
        findings=tuple(map(leak, exposing)),
        variants={name: "STILL KNOWS" if name in exposing else "FORGOTTEN" for name in TRIED},
        cells=() if said is None else (cell,),
        leaks=leaks,
    )
    return AuditReport.model_construct(subjects=(subject,), policy=Policy())


@pytest.mark.parametrize(
    ("exposing", "kinds"),
    [
        (["frame"], ["frame"]),
        (["paraphrase"], ["refusal"]),
        (["int4", "frame+int4"], ["precision"]),
        (["frame+int4"], ["frame"]),
        (["sample:n=5"], ["sampling"]),
        (["prune"], ["small_weights"]),
        (["relearn"], ["relearnable"]),
        (["alias"], ["names"]),
        (["relearn", "frame", "int4"], ["precision", "frame", "relearnable"]),
        ([FULL, "frame", "int4"], ["known"]),
        ([UNDEFENDED], ["open"]),  # without a defence this is the model itself
    ],
)
def test_the_kind_follows_from_what_brings_knowledge_back(exposing: list[str], kinds: list[str]) -> None:
    found = residues(report_of(exposing, "UNDECIDED" if exposing == [UNDEFENDED] else "HIDDEN"))
    assert [r.kind for r in found] == kinds
    for r in found:
        assert {f.variant for f in r.cells} == ({*r.variants} if r.kind != "open" else set())


def test_a_defended_model_whose_weights_know_is_a_wrapper() -> None:
    assert [r.kind for r in residues(report_of([UNDEFENDED], defence="input_filter"))] == ["wrapper"]
    assert residues(report_of([FULL, UNDEFENDED], defence="input_filter"))[0].kind == "wrapper"


@pytest.mark.parametrize(("said", "kind"), [("Who is at home ?", "last_layer"), ("Tarenmar", "names")])
def test_a_change_outside_of_the_layers_that_formats_round_is_named(said: str, kind: str) -> None:
    [found] = residues(report_of(["frame", "prune"], said=said))
    assert (found.kind, found.variants) == (kind, ("frame", "prune"))


@pytest.mark.parametrize(("verdict", "kind"), [("FORGOTTEN", "absent"), ("UNDECIDED", "open")])
def test_where_nothing_brings_it_back_it_is_absent_only_if_that_was_shown(verdict: str, kind: str) -> None:
    assert [r.kind for r in residues(report_of([], verdict))] == [kind]


def test_the_words_name_the_cells_and_what_to_try_next() -> None:
    shown = text([r.to_json() for r in residues(report_of(["frame"]))])
    assert shown.splitlines() == [
        "mine: bound to the frame: asked otherwise, the same question is answered",
        "  frame: answer_probability on forget: keeps 0.90 of the knowledge (bounds 0.80 to 1.00)",
        "  next: frame with each style alone",
    ]
    assert all(meaning.says and meaning.next for meaning in MEANINGS.values())


def test_families_name_kinds_that_exist() -> None:
    assert set(FAMILIES.values()) <= MEANINGS.keys()
    assert {"frame", "alias", "prune"} <= FAMILIES.keys() & plugins("transform").keys()


def test_the_page_holds_every_kind_with_its_words() -> None:
    page = (Path(__file__).parents[1] / "docs" / "explain.md").read_text(encoding="utf-8")
    for kind, meaning in MEANINGS.items():
        assert f"`{kind}`" in page
        assert meaning.says in page
        assert meaning.next in page
