"""`stillknows explain`: the kind of residue from the pattern of what brings knowledge back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from stillknows.auditing.verdict import Policy
from stillknows.registry import plugins
from stillknows.reporting.residue import FAMILIES, MEANINGS, residues, text
from stillknows.reporting.schema import AuditReport, Measured, ReportSubject
from stillknows.types import FULL, UNDEFENDED, WEIGHTS, Finding

TRIED = [FULL, "int4", "frame", "hint", "paraphrase", "frame+int4", "sample:n=5", "prune", "relearn", "interpolate"]
TRIED += ["ablate", "alias", UNDEFENDED]
EVERYWHERE = {"embeddings": 0.1, "blocks": 0.1, "output_layer": 0.1, "matrices": 1.0, "low_rank": 0.3}
INSIDE = EVERYWHERE | {"embeddings": 0.0, "output_layer": 0.0}


def leak(variant: str, kept: float = 0.9) -> Finding:
    return Finding(
        "knowledge_kept",
        "leak",
        variant,
        "forget",
        "answer_probability",
        None,
        kept,
        kept - 0.1,
        kept + 0.1,
        0.1,
        0.01,
        40,
    )


def report_of(
    exposing: Mapping[str, float] | Sequence[str],
    verdict: str = "HIDDEN",
    defence: Any = None,
    said: str = "Tarenmar",
    changed: Mapping[str, float] = EVERYWHERE,
) -> Any:
    """Return a report on one model.

    Args:
        exposing: the variants that find it to know, with the share of the knowledge that they bring back.
        said: its answers in full precision.
        changed: where its weights differ from the original's.
    """
    kept = exposing if isinstance(exposing, Mapping) else dict.fromkeys(exposing, 0.9)
    cells = [
        Measured(variant=FULL, split=WEIGHTS, metric=f"change.{name}", value=value, low=value, high=value, n=1)
        for name, value in changed.items()
    ]
    subject = ReportSubject.model_construct(
        name="mine",
        defence=defence,
        verdict=verdict,
        findings=tuple(leak(name, share) for name, share in kept.items()),
        variants={name: "STILL KNOWS" if name in kept else "FORGOTTEN" for name in TRIED},
        cells=tuple(cells),
        leaks=[type("Leak", (), {"generated_full": said})] * 3,
    )
    return AuditReport.model_construct(subjects=(subject,), policy=Policy())


def kinds(*given: Any, **options: Any) -> list[str]:
    return [r.kind for r in residues(report_of(*given, **options))]


@pytest.mark.parametrize(
    ("exposing", "expected"),
    [
        (["frame"], ["frame"]),
        (["paraphrase"], ["refusal"]),
        (["int4", "frame+int4"], ["precision"]),
        (["frame+int4"], ["frame"]),
        (["sample:n=5"], ["sampling"]),
        (["hint"], ["beginning"]),
        (["prune"], ["small_weights"]),
        (["ablate"], ["direction"]),
        (["relearn", "interpolate"], ["relearnable"]),
        (["alias"], ["names"]),
        (["relearn", "frame", "int4"], ["frame", "precision", "relearnable"]),
        ([FULL, "frame", "int4"], ["known"]),
        ([UNDEFENDED], ["open"]),  # without a defence this is the model itself
    ],
)
def test_the_kind_follows_from_what_brings_knowledge_back(exposing: list[str], expected: list[str]) -> None:
    found = residues(report_of(exposing, "UNDECIDED" if exposing == [UNDEFENDED] else "HIDDEN"))
    assert [r.kind for r in found] == expected
    for r in found:
        assert {f.variant for f in r.cells} == ({*r.variants} if r.kind != "open" else set())


def test_kinds_that_bring_back_much_come_first() -> None:
    assert kinds({"frame": 0.2, "int4": 0.9, "relearn": 0.9}) == ["precision", "frame", "relearnable"]


def test_of_formats_and_pruning_what_brings_back_more_comes_first() -> None:
    assert kinds({"int4": 1.0, "prune": 0.6}) == ["precision", "small_weights"]
    assert kinds({"int4": 0.6, "prune": 1.0}) == ["small_weights", "precision"]


def test_a_small_share_in_full_precision_that_samples_find_is_a_tail() -> None:
    assert kinds({FULL: 0.15, "sample:n=5": 0.9}) == ["sampling"]
    assert kinds({FULL: 0.9, "sample:n=5": 0.9}) == ["known"]
    assert kinds({FULL: 0.15}) == ["known"]


def test_a_model_that_refuses_and_only_training_brings_back_is_a_refusal() -> None:
    assert kinds({"relearn": 0.9, "frame": 0.1}, said="Who is at home ?") == ["refusal", "frame", "relearnable"]
    assert kinds({"relearn": 0.9}, said="I don't know.") == ["refusal", "relearnable"]
    assert kinds({"frame": 0.9}, said="I don't know.") == ["frame"]


def test_a_defended_model_whose_weights_know_is_a_wrapper() -> None:
    assert kinds([UNDEFENDED], defence="input_filter") == ["wrapper"]
    assert kinds([FULL, UNDEFENDED], defence="input_filter")[0] == "wrapper"


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ({"embeddings": 0.0, "blocks": 0.0, "output_layer": 2.0, "matrices": 0.0}, "last_layer"),
        ({"embeddings": 0.5, "blocks": 0.0, "output_layer": 0.0, "matrices": 0.0}, "names"),
        (INSIDE | {"low_rank": 1.0}, "detachable"),
        (INSIDE | {"low_rank": 1.0, "matrices": 0.1}, "direction"),
    ],
)
def test_where_the_weights_differ_comes_first(changed: dict[str, float], kind: str) -> None:
    assert kinds(["frame", "prune"], changed=changed)[0] == kind
    assert kinds([], "FORGOTTEN", changed=changed) == ["absent"]


def test_a_change_of_high_rank_or_outside_of_the_blocks_is_no_adapter() -> None:
    for changed in (INSIDE, EVERYWHERE | {"low_rank": 1.0}):
        assert kinds(["relearn"], changed=changed) == ["relearnable"]


@pytest.mark.parametrize(("verdict", "kind"), [("FORGOTTEN", "absent"), ("UNDECIDED", "open")])
def test_where_nothing_brings_it_back_it_is_absent_only_if_that_was_shown(verdict: str, kind: str) -> None:
    assert kinds([], verdict) == [kind]


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
