"""A report's first page, its charts, and whether everybody can read the page."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from typing import Any

import pytest
from test_report import Page, make_audit, make_report

from stillknows.judgements import FactVerdict
from stillknows.reporting import chart, parts, report
from stillknows.reporting.brief import ANSWERS, brief
from stillknows.reporting.parts import PlaceboSection, ReportAttack
from stillknows.reporting.plots import rank_chart, relearning_charts
from stillknows.reporting.schema import AuditReport, Measured, ReportSplit, ReportSubject
from stillknows.types import CONTROL, ORIGINAL


@pytest.fixture(scope="module")
def built() -> AuditReport:
    audit = make_audit()
    found = make_report(audit)
    subjects = tuple(one.model_copy(update={"facts": section()}) for one in found.subjects)
    return found.model_copy(update={"subjects": subjects, "placebos": {"kind": (4, 36)}})


def section() -> PlaceboSection:
    """Four facts: one that is named, one untestable, one below its placebos, one among them."""

    def fact(name: str, likelier: float | None, **how: Any) -> parts.TestedFact:
        usual: dict[str, Any] = {
            "placebos": 9, "variant": "int4", "p": 0.5, "named": False, "variants": (), "p_below": 0.5,
            "pushed_below": False, "found": True, "found_half": False, "untestable": "",
        }  # fmt: skip
        return parts.TestedFact(fact=name, likelier=likelier, **usual | how)

    return PlaceboSection(
        alpha=0.05, diffuse_alpha=0.005, controls=1, diffuse=None, below=None,
        facts=(
            fact("<b>named</b>", 0.0, named=True, found_half=True, p=0.01, variants=("int4",)),
            fact("among", 0.5),
            fact("below", 1.0, pushed_below=True),
            fact("alone", None, placebos=0, found=None, found_half=None, untestable="it has no placebos"),
        ),
    )  # fmt: skip


def test_the_first_page_says_what_was_asked_the_answer_how_sure_it_is_and_what_was_not_tested(
    built: AuditReport,
) -> None:
    found = brief(built)
    assert found.asked.startswith("Do clean, brittle and broken still know")
    assert "40 facts, asked for in 80 questions, in 3 forms of the model?" in found.asked
    assert "what was to be kept (retain)" in found.asked
    assert [(one.name, one.text) for one in found.answers] == [
        (subject.name, ANSWERS[subject.verdict]) for subject in built.audited
    ]
    assert {name for one in found.answers for name, _ in one.claims} == {
        *("suppressed", "removed", "absent", "influence erased")
    }
    assert found.sure[0].startswith("By chance at most 5 %")
    assert any("of 4 facts 3 would have been found" in line and "1 if half as well" in line for line in found.sure)
    assert found.sure[-1] == "Compared with 1 never-taught control."
    assert any(
        line.startswith("What would settle “removed”, “absent”, “influence erased”: ") for line in found.not_tested
    )
    assert len(found.not_tested) == len(set(found.not_tested))
    assert found.not_tested[-1].startswith("Questions, formats and attacks that this page does not name")
    text = report.html(built)
    assert text.index('id="brief"') < text.index('id="claims"')
    for term in ("Asked", "Answer", "How sure", "Not tested"):
        assert f"<dt>{term}</dt>" in text
    assert "#brief { break-after: page; }" in text[text.index("@media print") :]


def test_every_leaked_fact_is_shown_with_what_drew_it() -> None:
    """In the variant where the model knows most of it."""
    audit = make_audit()
    judged = (
        FactVerdict("forget fact 7", "leaked", False, ("bf16", "int4"), True),
        FactVerdict("forget fact 3", "leaked", False, ("int4",), True),
        FactVerdict("forget fact 1", "open", True, ("int4",), True, "why"),
    )
    verdicts = tuple(replace(v, facts=judged if v.subject == "brittle" else ()) for v in audit.verdicts)
    found = make_report(replace(audit, verdicts=verdicts))
    [brittle] = [one for one in found.audited if one.name == "brittle"]
    assert [(one.fact, one.variant, one.truth) for one in brittle.drawn] == [
        ("forget fact 7", "int4", "truth 7"),
        ("forget fact 3", "int4", "truth 3"),
    ]
    assert brittle.drawn[0].question == "forget question 7 in wording 1 ?"
    assert all(one.drawn == () for one in found.subjects if one.name != "brittle")


def test_ranks_of_facts_are_drawn_beside_those_of_controls(built: AuditReport) -> None:
    drawn = ET.fromstring(rank_chart(built.audited[0], built))
    texts = [node.text for node in drawn.iter("text")]
    assert "<b>named</b>" in texts
    assert {built.audited[0].name, CONTROL, "never taught, on average"} <= set(texts)
    assert "3 facts of" in (drawn.findtext("desc") or "")
    blind = built.audited[0].model_copy(update={"facts": None})
    assert rank_chart(blind, built) == ""


def test_relearning_is_drawn_by_steps_where_several_lengths_were_tried() -> None:
    def subject(name: str, scores: tuple[float, ...]) -> Any:
        variants = ("full", "relearn:steps=5", "relearn:steps=50", "int4")
        cells = tuple(
            Measured(variant=v, split="forget", metric="answer_probability", value=s, low=s, high=s, n=9)
            for v, s in zip(variants, scores, strict=True)
        )
        took = {
            v: ReportAttack(steps=n, tokens=1, forward_tokens=0, flops=0.0, queries=1, seconds=1.0, found={})
            for v, n in zip(variants[1:3], (5, 50), strict=True)
        }
        return ReportSubject.model_construct(name=name, cells=cells, attacks=took)

    made = AuditReport.model_construct(
        variants=("full", "int4", "relearn:steps=5", "relearn:steps=50", "relearn:data=retain:steps=5"),
        splits=(ReportSplit(name="forget", role="forget", examples=9, facts=9),), metrics=("answer_probability",),
        subjects=(subject("mine", (0.1, 0.5, 0.9, 0.1)), subject(ORIGINAL, (0.9, 0.9, 0.9, 0.9))),
        policy=make_report(make_audit()).policy,
    )  # fmt: skip
    [found] = relearning_charts(made)
    assert "mine: 0.10 after 0, 0.50 after 5, 0.90 after 50" in (ET.fromstring(found).findtext("desc") or "")


def test_the_page_can_be_read_by_everybody(built: AuditReport) -> None:
    """One first heading and none left out below it; names for pictures and for what scrolls; headers of tables."""
    page = Page(report.html(built))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert dict(page.tags)["html"]["lang"] == "en"
    for tag, attributes in page.tags:
        if tag == "svg":
            assert attributes.get("aria-hidden") == "true" or attributes.get("aria-label"), attributes
        if tag == "th":
            assert attributes.get("scope") in ("col", "row")
        if tag == "div" and "scroll" in (attributes.get("class") or "").split():
            assert (attributes.get("tabindex"), bool(attributes.get("aria-label"))) == ("0", True), attributes
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_stands_out_from_what_lies_behind_it_in_light_and_in_dark(built: AuditReport) -> None:
    """At least 4.5 : 1, as WCAG 2 asks for text."""
    text = report.html(built)
    blocks = re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    schemes = [dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", block)) for block in blocks]
    assert len(schemes) == 2
    for colours in schemes:
        for name in ("ink", "soft", "forgotten", "still-knows", "hidden", "damaged", "undecided"):
            for behind in ("paper", "panel"):
                assert contrast(colours[name], colours[behind]) >= 4.5, (name, behind)
    assert all(contrast(colour, "#ffffff") >= 4.5 for colour in (*chart.COLOURS, "#222222", "#333333"))
