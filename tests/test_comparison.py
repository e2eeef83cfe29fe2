"""Models of several audits ranked at equal utility, followed over releases, and told apart where they cannot be."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stillknows as sk
from stillknows.auditing.verdict import Policy
from stillknows.observations import OBSERVATIONS, save_observations
from stillknows.reporting import chart, standings
from stillknows.reporting.comparison import comparison_chart, comparison_text, history_text
from stillknows.reporting.schema import AuditReport, Measured, ReportSplit, ReportSubject, Unmeasured
from stillknows.types import CONTROL, FULL, ORIGINAL, Finding, Observations

GATE = "answer_probability"
Bounded = tuple[float, float, float]
SPLITS = {"forget": "forget", "retain": "retain"}


def model(name: str, kept: dict[str, Bounded | str], utility: Bounded, verdict: str = "FORGOTTEN") -> Any:
    """A model with what it keeps by variant, and its utility in full precision; 1 in the others."""
    cells: list[Any] = []
    for variant, value in kept.items():
        place: dict[str, Any] = {"variant": variant, "split": "forget", "metric": f"{GATE}.kept"}
        if isinstance(value, str):
            cells.append(Unmeasured(**place, not_measured=value))
        else:
            cells.append(Measured(**place, value=value[0], low=value[1], high=value[2], n=36))
        bounds = utility if variant == FULL else (1.0, 1.0, 1.0)
        retained: dict[str, Any] = {"variant": variant, "split": "retain", "metric": f"{GATE}.share"}
        cells.append(Measured(**retained, value=bounds[0], low=bounds[1], high=bounds[2], n=36))
    return ReportSubject.model_construct(
        name=name, fingerprint=name, verdict=verdict, cells=tuple(cells), findings=(), observations={}
    )


def audit(
    *models: Any, policy: Policy | None = None, original: str = "o", variants: tuple[str, ...] = (FULL, "int4")
) -> Any:
    controls = [
        ReportSubject.model_construct(name=name, fingerprint=mark, verdict="UNDECIDED", cells=(), findings=())
        for name, mark in ((ORIGINAL, original), (CONTROL, "c"))
    ]
    return AuditReport.model_construct(
        benchmark="world", metrics=(GATE,), policy=policy or Policy(gates=(GATE,), utility=GATE), variants=variants,
        placebos={},
        splits=tuple(ReportSplit(name=n, role=r, examples=9, facts=9) for n, r in SPLITS.items()),  # type: ignore[arg-type]
        subjects=(*models, *controls),
    )  # fmt: skip


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return folders(**audits): reports that lie in folders of these names."""

    def lie(**audits: Any) -> None:
        monkeypatch.setattr(standings.report, "read", lambda path: audits[Path(path).name])

    return lie


GOOD = model("good", {FULL: (0.0, -0.1, 0.1), "int4": (0.05, 0.0, 0.1)}, (0.95, 0.9, 1.0))
BAD = model("bad", {FULL: (0.0, -0.1, 0.1), "int4": (0.6, 0.5, 0.7)}, (0.94, 0.9, 1.0), "HIDDEN")
CLOSE = model("close", {FULL: (0.08, 0.0, 0.15), "int4": (0.0, 0.0, 0.1)}, (0.99, 0.95, 1.0))
BROKEN = model("broken", {FULL: (-0.2, -0.3, -0.1), "int4": (-0.2, -0.3, -0.1)}, (0.2, 0.1, 0.3), "DAMAGED")


def test_models_are_ranked_by_their_worst_variant_at_equal_utility(folders: Any) -> None:
    """Whose bounds overlap shares a rank; whose utility is too low is not ranked, however little it keeps."""
    folders(a=audit(GOOD, BAD), b=audit(CLOSE, BROKEN))
    found = sk.compare("a", "b")
    ranks = [(one["model"], *one["rank"]) for one in found["ranked"]]
    assert ranks == [("good", 1, 2), ("close", 1, 2), ("bad", 3, 3)]
    assert found["ranked"][2]["kept"]["variant"] == "int4"
    assert [one["model"] for one in found["ranked"][2]["beaten_by"]] == ["good", "close"]
    assert [one["model"] for one in found["below"]] == ["broken"]
    assert (found["not_measured"], found["incomparable"], found["utility"]) == ([], [], 0.9)
    words = comparison_text(found)
    [line] = [" ".join(line.split()) for line in words.splitlines() if "| bad" in line]
    first, last = "| 3 | bad | a | HIDDEN | 0.60 (0.50 to 0.70) |", "| 0.94 (0.90 to 1.00) | good (a); close (b) |"
    assert (line.startswith(first), line.endswith(last)) == (True, True), line


def test_the_utility_asked_for_decides_who_is_ranked(folders: Any) -> None:
    folders(a=audit(GOOD, BAD, CLOSE))
    assert [one["model"] for one in sk.compare("a", utility=0.97)["ranked"]] == ["close"]
    with pytest.raises(sk.UserError, match="out of range"):
        sk.compare("a", utility=-0.1)
    with pytest.raises(sk.UserError, match="no audit is given"):
        sk.compare()


def test_what_was_not_measured_is_not_ranked_first(folders: Any) -> None:
    blind = model("blind", {FULL: "there is no control", "int4": "there is no control"}, (1.0, 1.0, 1.0))
    folders(a=audit(GOOD, blind))
    found = sk.compare("a")
    assert ([one["model"] for one in found["ranked"]], [one["model"] for one in found["not_measured"]]) == (
        ["good"],
        ["blind"],
    )


def test_a_variant_whose_prompt_tells_the_answer_is_no_models_worst(folders: Any) -> None:
    told = GOOD.model_copy(update={"findings": (Finding("answer_told", "note", "int4"),)})
    folders(a=audit(told))
    assert sk.compare("a")["ranked"][0]["kept"]["variant"] == FULL


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (audit(BAD, policy=Policy(gates=(GATE,), utility=GATE, tolerance=0.2)), "policy"),
        (audit(BAD, original="other"), "original"),
        (audit(BAD, variants=(FULL,)), "plan"),
        (audit(BAD).model_copy(update={"benchmark": "tofu"}), "data"),
    ],
)
def test_audits_that_cannot_be_compared_are_named_and_not_ranked(folders: Any, other: Any, what: str) -> None:
    folders(a=audit(GOOD), b=other)
    found = sk.compare("a", "b")
    assert [one["model"] for one in found["ranked"]] == ["good"]
    assert found["incomparable"] == [{"audit": "b", "because": [f"another {what} than a"]}]
    assert f"Not compared: b: another {what} than a." in comparison_text(found)
    after = sk.history("a", "b")["releases"][1]
    assert (after["change"], after["because"]) == (None, [f"another {what} than a"])


def test_data_are_the_items_where_they_lie_beside_the_report_whatever_the_benchmark_is_called(tmp_path: Path) -> None:
    def write(name: str, answer: str) -> Path:
        for split in SPLITS:
            seen = Observations(("1",), ("f",), ("Where ?",), (answer,), log_probs=(np.array([-1.0]),))
            save_observations(tmp_path / name / OBSERVATIONS / ORIGINAL / FULL / f"{split}.npz", "key", seen)
        return tmp_path / name

    found = audit(GOOD)
    other = found.model_copy(update={"benchmark": "jsonl:forget=/elsewhere/f.jsonl"})
    first = standings._data(write("a", "Rome"), found)
    assert standings._data(write("b", "Rome"), other) == first
    assert standings._data(write("c", "Paris"), found) != first


def test_a_line_of_models_is_followed_over_its_releases(folders: Any) -> None:
    first, second, third = (model("mine", one, (0.95, 0.9, 1.0)) for one in (
        {FULL: (0.5, 0.4, 0.6)}, {FULL: (0.45, 0.35, 0.55)}, {FULL: (0.0, -0.1, 0.1)}
    ))  # fmt: skip
    reports = [audit(one, variants=(FULL,)) for one in (first, second, third)]
    folders(v1=reports[0], v2=reports[1], v3=reports[2], two=audit(GOOD, BAD))
    found = sk.history("v1", "v2", "v3")
    assert [one["change"] for one in found["releases"]] == [None, "", "less kept"]
    assert [one["change"] for one in sk.history("v3", "v1")["releases"]] == [None, "more kept"]
    assert "| mine" in history_text(found)
    with pytest.raises(sk.UserError, match="judges 2 models: good, bad\n  name one with `model`"):
        sk.history("two")
    assert sk.history("two", model="bad")["releases"][0]["verdict"] == "HIDDEN"
    with pytest.raises(sk.UserError, match="no model 'gud'; did you mean 'good'"):
        sk.history("two", model="gud")


def test_the_commands_show_the_same_and_draw_it(folders: Any, cli: Any, tmp_path: Path) -> None:
    folders(a=audit(GOOD, BAD, BROKEN))
    ran = cli("compare", "a", "--plot", tmp_path / "compare.svg", "--utility", "0.5")
    assert (ran.code, "good" in ran.out, "compare.svg" in ran.err) == (0, True, True)
    drawn = ET.fromstring((tmp_path / "compare.svg").read_text())
    assert "bad of a: knowledge kept 0.60" in (drawn.findtext("{*}desc") or "")
    assert cli("history", "a", "--model", "bad", "--plot", tmp_path / "h.svg", "--json").out.startswith('{"releases"')
    assert ET.fromstring((tmp_path / "h.svg").read_text()).tag.endswith("svg")


def test_charts_are_well_formed_whatever_names_hold_and_nothing_lies_outside() -> None:
    y = chart.unit_axis("y <&>", [-0.4, 2.6])
    x = chart.unit_axis("x", [0.5])
    marks = (chart.Mark(0.5, -0.4, None, 2.6, "<b>&\u202e"), chart.Mark(7, 9, 8, 10, 'a"b'))
    drawn = ET.fromstring(chart.chart("t<", "d&", x, y, [chart.Series("s>", marks, joined=True)] * 3, limit=0.1))
    texts = [node.text or "" for node in drawn.iter() if node.tag.endswith("text")]
    assert "<b>&\\u202e" in texts
    assert {"0", "1"} <= set(texts)
    for node in drawn.iter():
        for name, most in (("x", chart.WIDTH), ("cx", chart.WIDTH), ("y", chart.HEIGHT), ("cy", chart.HEIGHT)):
            assert 0 <= float(node.get(name, "0")) <= most


def test_a_ranking_without_controls_says_that_scores_are_raw(folders: Any) -> None:
    found = audit(*map(replace_metric, (GOOD, BAD)))
    found = found.model_copy(update={"subjects": tuple(s for s in found.subjects if s.name != CONTROL)})
    folders(a=found)
    assert "score on what is to be forgotten" in comparison_text(sk.compare("a"))
    assert "utility" in comparison_chart(sk.compare("a"))


def replace_metric(subject: Any) -> Any:
    """The model with its scores as they are in the place of what it keeps."""
    cells = tuple(cell.model_copy(update={"metric": cell.metric.removesuffix(".kept")}) for cell in subject.cells)
    return ReportSubject.model_construct(**{**dict(subject), "cells": cells})
