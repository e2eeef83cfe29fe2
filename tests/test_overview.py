"""The table of the terminal: knowledge kept beside utility, raw scores where there is no control, 80 columns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillknows.auditing import collect
from stillknows.auditing.verdict import Policy
from stillknows.experiments import demo
from stillknows.reporting.overview import overview, unattacked
from stillknows.reporting.schema import AuditReport, Measured, ReportSplit, ReportSubject, Unmeasured, expected
from stillknows.types import CONTROL, FULL, ORIGINAL
from stillknows.variants.variant import expand

LEAD = "answer_probability"


def made(
    scores: dict[str, dict[str, dict[str, float | str]]], roles: dict[str, Any], verdicts: dict[str, Any]
) -> AuditReport:
    """A report with these cells, by model, variant and "split.metric"."""

    def cell(variant: str, place: str, value: float | str) -> Measured | Unmeasured:
        split, _, metric = place.partition(".")
        if isinstance(value, str):
            return Unmeasured(variant=variant, split=split, metric=metric, not_measured=value)
        return Measured(variant=variant, split=split, metric=metric, value=value, low=0, high=1, n=9)

    subjects = tuple(
        ReportSubject.model_construct(
            name=name,
            verdict=verdicts.get(name, expected(name) or "UNDECIDED"),
            cells=tuple(cell(v, place, value) for v, cells in variants.items() for place, value in cells.items()),
        )
        for name, variants in scores.items()
    )
    return AuditReport.model_construct(
        policy=Policy(gates=(LEAD,), utility=LEAD),
        metrics=(LEAD,),
        variants=tuple(next(iter(scores.values()))),
        splits=tuple(ReportSplit(name=name, role=role, examples=1, facts=1) for name, role in roles.items()),
        subjects=subjects,
    )


ROLES = {"forget": "forget", "retain": "retain", "neighbour": "neighbour"}


def cells(kept: float | str, utility: float | str) -> dict[str, float | str]:
    return {f"forget.{LEAD}.kept": kept, f"retain.{LEAD}.share": utility, f"forget.{LEAD}": 0.31}


def lines(found: AuditReport) -> list[str]:
    return "\n\n".join(overview(found)).split("\n")


def test_utility_stands_beside_knowledge_kept_and_is_marked_below_the_floor() -> None:
    model = {"full": cells(-0.004, 1.0), "nf4": cells(0.34, 0.41), "int8": cells(0.05, 0.9)}
    controls = {ORIGINAL: {"full": cells(1, 1)}, CONTROL: {"full": cells(0, 0.97)}}
    found = lines(made({"npo": model, **controls}, ROLES, {"npo": "DAMAGED", CONTROL: "UNDECIDED"}))
    assert found == [
        "Knowledge kept / utility, by answer_probability.",
        "Knowledge kept: 0 as never taught, 1 as the original.",
        "Utility: 1 as the original; ! below the floor of 0.9.",
        "",
        "| variant | npo          |",
        "| ------- | ------------ |",
        "| verdict | DAMAGED      |",
        "| full    | 0.00 / 1.00  |",
        "| nf4     | 0.34 / 0.41! |",
        "| int8    | 0.05 / 0.90  |",
        "",
        "Controls: original STILL KNOWS, control UNDECIDED (should be FORGOTTEN).",
    ]


def test_a_pass_without_any_attack_is_told() -> None:
    found = made({"npo": {FULL: cells(0.0, 1.0)}}, ROLES, {})
    for verdict, attacks, told in (("FORGOTTEN", {}, True), ("FORGOTTEN", {"frame": 1}, False), ("HIDDEN", {}, False)):
        subjects = tuple(subject.model_copy(update={"attacks": attacks}) for subject in found.subjects)
        report = found.model_copy(update={"verdict": verdict, "subjects": subjects})
        assert bool(unattacked(report)) == told


def test_without_a_control_raw_scores_are_shown_beside_the_originals() -> None:
    scores = {"full": cells("there is no never-taught control", 0.5)}
    found = lines(made({"npo": scores, ORIGINAL: scores}, ROLES, {}))
    assert "| variant | npo          | original     |" in found
    assert "| full    | 0.31 / 0.50! | 0.31 / 0.50! |" in found
    assert found[0] == "Raw answer_probability / utility."
    assert found[1].startswith("Without a never-taught control only recited facts are decided")
    assert not any("[1]" in line or "Controls" in line for line in found)


@pytest.mark.parametrize(("score", "told"), [(0.1, True), (0.11, False)])
def test_an_original_that_shows_no_knowledge_is_told_where_there_is_no_control(score: float, told: bool) -> None:
    """The gap that a control must leave to the original cannot be larger than the original's score."""
    scores = {"full": cells("there is no never-taught control", 1.0) | {f"forget.{LEAD}": score}}
    found = lines(made({"npo": scores, ORIGINAL: scores}, ROLES, {}))
    words = "The original scores 0.10 on forget: asked like this, it shows no knowledge."
    assert (words in found) == told
    assert max(map(len, found)) <= 80


def test_the_worst_of_several_splits_is_shown() -> None:
    roles = {"forget": "forget", "recall": "forget", "retain": "retain", "facts": "retain", "neighbour": "neighbour"}
    more = {f"recall.{LEAD}.kept": 0.6, f"facts.{LEAD}.share": 0.7, f"neighbour.{LEAD}.share": 0.1}
    found = lines(made({"npo": {"full": cells(0.2, 0.95) | more}, CONTROL: {"full": cells(0, 1)}}, roles, {}))
    assert "| full    | 0.60 / 0.70! |" in found
    assert found[0] == "Knowledge kept / utility, by answer_probability (the highest of forget, recall)."


def test_what_was_not_measured_says_why_and_never_0() -> None:
    why = "positive control failed"
    scores = {"full": cells(why, "no fact has a score"), "nf4": cells(why, 0.4)}
    found = lines(made({"npo": scores, CONTROL: scores}, ROLES, {}))
    assert [line for line in found if line.startswith(("| full", "| nf4", "["))] == [
        "| full    | [1] / [2]   |",
        "| nf4     | [1] / 0.40! |",
        f"[1] not measured: {why}",
        "[2] not measured: no fact has a score",
    ]
    roles = {"forget": "forget"}
    assert "| full    | 0.20      |" in lines(made({"npo": {"full": cells(0.2, 1)}, CONTROL: {"full": {}}}, roles, {}))


@pytest.mark.parametrize(
    "names",
    [
        list(demo.SUBJECTS),
        [f"model-{i}" for i in range(9)],
        [*(f"SmolLM2-135M-Instruct-{i}.gguf" for i in range(3)), "a", "b", "c", "d", "e"],
    ],
)
def test_it_fits_into_80_columns(names: list[str]) -> None:
    variants = dict.fromkeys(expand(demo.VARIANTS)[1], cells(-0.06, 0.45))
    found = lines(
        made(dict.fromkeys((*names, ORIGINAL, CONTROL), variants), ROLES, dict.fromkeys(names, "STILL KNOWS"))
    )
    assert max(map(len, found)) <= 80
    shown = [name for line in found if line.startswith("| variant") for name in line.split()[3::2]]
    assert shown == names


def test_an_audit_says_what_is_out_of_reach_before_it_observes(
    cli: Callable[..., Any], save_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, subject = save_model("original"), save_model("subject", seed=1)
    for name, answer in (("f", "Ada"), ("r", "Rome")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": f"who is {name}", "answer": answer}))
    spec = f"jsonl:forget={tmp_path / 'f.jsonl'},retain={tmp_path / 'r.jsonl'}"
    monkeypatch.setattr(collect, "observe", lambda *_, **__: pytest.fail("observed"))
    with pytest.raises(pytest.fail.Exception, match="observed"):
        cli(
            "audit", subject, "--original", original, "--benchmark", spec, "--variants", "full", "--out", tmp_path / "a"
        )
    monkeypatch.undo()
    ran = cli(
        "audit", subject, "--original", original, "--benchmark", spec, "--variants", "full", "--out", tmp_path / "a"
    )
    assert (
        "FORGOTTEN is out of reach here: there is no never-taught control; "
        "forget has 1 of the 29 facts that it takes to exclude 10 %\n" in ran.err
    )
