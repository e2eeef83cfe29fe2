"""The report: its data, its page, its text, from an audit that is made by hand."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from stillknows import store
from stillknows.auditing import comparing, evidence
from stillknows.auditing.audit import Audit, AuditConfig
from stillknows.auditing.evidence import CellKey
from stillknows.auditing.verdict import Policy, judge
from stillknows.errors import UserError
from stillknows.formatting import number, percent
from stillknows.model.modelfiles import ModelFiles
from stillknows.model.ref import ModelRef
from stillknows.registry import bind
from stillknows.reporting import report, tables
from stillknows.reporting.build import build
from stillknows.reporting.overview import NOT_ASKED
from stillknows.reporting.page import unmeasured
from stillknows.reporting.schema import (
    NUM_LEAKS,
    SCHEMA,
    SCHEMA_VERSION,
    SEVERITY,
    AuditReport,
    Measured,
    ReportSplit,
    json_schema,
    parsed,
)
from stillknows.reporting.tables import NO_FORMAT
from stillknows.types import (
    CONTROL,
    FULL,
    ORIGINAL,
    Benchmark,
    Cell,
    Example,
    Finding,
    Interval,
    Observations,
    Outcome,
    Role,
    Split,
)

ROOT = Path(__file__).parents[1]
FACTS = 40
LEAKING = (7, 3, 21)  # the facts that "brittle" gives away most under int4, the worst first
NASTY = "<script>alert('x')</script> & \"more\" | http://elsewhere.example"
NO_CONTROL = comparing.NO_CONTROL
VARIANTS = (FULL, "bf16", "int4")
SUBJECTS = {"clean": "runs/clean", "brittle": "runs/<b>brittle</b>", "broken": "runs/broken"}


def make_examples(role: str) -> tuple[Example, ...]:
    """Two questions per fact; the ids sort in another order than the facts come in."""
    return tuple(
        Example(f"{role}{i}.{wording}", f"{role} question {i} in wording {wording} ?", f"truth {i}", f"{role} fact {i}")
        for i in range(FACTS)
        for wording in (0, 1)
    )


def probability(model: str, variant: str, role: str, fact: int) -> float:
    """How likely the true answer is."""
    if model == "broken":
        return 0.001
    if role == "retain" or model == ORIGINAL:
        return 0.9
    if model == "brittle" and variant == "int4":
        return 0.89 - 0.01 * LEAKING.index(fact) if fact in LEAKING else 0.6
    return 0.01


def observe(model: str, variant: str, split: Split) -> Observations:
    chances = [probability(model, variant, split.role, i // 2) for i in range(2 * FACTS)]
    # The second wording is the likelier one, by a little.
    log_probs = tuple(np.full(3, math.log(p) + (0.005 if i % 2 else -0.005)) for i, p in enumerate(chances))
    said = {"clean": "nothing much", "brittle": NASTY if variant == "int4" else "I forgot"}.get(model, "truth")
    return Observations(
        ids=tuple(e.id for e in split.examples),
        facts=tuple(e.fact for e in split.examples),
        prompts=tuple(e.prompt for e in split.examples),
        answers=tuple(e.answer for e in split.examples),
        log_probs=log_probs,
        hits=tuple(np.full(3, p > 0.5) for p in chances),
        ends=np.ones(2 * FACTS, dtype=bool),
        generations=tuple(f"{said} {i}" if split.role == "forget" else None for i in range(2 * FACTS)),
    )


def make_cells(table: evidence.Table, label: str) -> Iterator[Cell]:
    for variant in VARIANTS:
        for split, role in table.roles.items():
            place, metric = CellKey(label, variant, split), "answer_probability"
            if role == "retain":
                yield Cell(*place, f"{metric}.share", evidence.share(table, place, metric))
                continue
            yield Cell(*place, metric, evidence.mean(table, place, metric))
            compared = comparing.compare(table, place, metric)
            kept, known = (compared, compared) if isinstance(compared, str) else (compared.kept, compared.known)
            yield Cell(*place, f"{metric}.kept", kept)
            yield Cell(*place, f"{metric}.known_facts", known)
            yield Cell(*place, f"{metric}.recovery", evidence.recovery(table, place, metric))
        yield Cell(label, variant, "weights", "update.surviving", Interval(0.25, 0.25, 0.25, 1000))
        yield Cell(label, variant, "weights", "update.crossing", Interval(0.00002, 0.00002, 0.00002, 1000))
        for layer, surviving in ((0, 0.125), (1, 0.375)):
            if label == "brittle" and (layer, variant) != (1, "bf16"):
                name = f"model.layers.{layer}"
                yield Cell(label, variant, "weights", f"update.surviving.{name}", Interval(*[surviving] * 3, 500))
                yield Cell(label, variant, "weights", f"update.crossing.{name}", Interval(0.03, 0.03, 0.03, 500))


RECORDS = {"brittle": {"method": "npo <i>", "settings": {"lr": math.nan}}}


def make_audit(*, control: bool = True) -> Audit:
    splits = tuple(Split(role, role, make_examples(role)) for role in ("forget", "retain"))
    policy = Policy(gates=("answer_probability",))
    request = AuditConfig(
        "runs/original",
        SUBJECTS,
        Benchmark("by-hand", splits),
        ("runs/control",) if control else (),
        ",".join(VARIANTS),
        "answer_probability",
        policy,
    )
    observations = {
        CellKey(model, variant, split.name): observe(model, variant, split)
        for model in request.models
        for variant in VARIANTS
        for split in splits
    }
    metrics = {"answer_probability": bind("metric", "answer_probability")}
    table = evidence.tabulate(observations, metrics, {split.name: split.role for split in splits})
    cells = tuple(cell for label in request.models for cell in make_cells(table, label))
    return Audit(
        request,
        {label: ModelRef(name, ModelFiles(Path(name))) for label, name in request.models.items()},
        {label: f"print-of-{label}" for label in request.models},
        {label: RECORDS.get(label) for label in request.models},
        {"torch": "2.13.0"},
        observations,
        table,
        cells,
        tuple(judge(table, label, VARIANTS, policy) for label in request.models),
    )


def make_report(audit: Audit) -> AuditReport:
    return build(audit, "stillknows audit --original 'a<b'")


def schema() -> Draft202012Validator:
    content = json.loads(files("stillknows.reporting").joinpath(SCHEMA).read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(content)
    return Draft202012Validator(content)


class Page(HTMLParser):
    """Collects a page's tags with their attributes, and the text of its table cells."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def audit() -> Audit:
    return make_audit()


@pytest.fixture(scope="module")
def built(audit: Audit) -> AuditReport:
    return make_report(audit)


def test_verdicts_are_the_audits_and_the_worst_counts(built: AuditReport) -> None:
    verdicts = {subject.name: subject.verdict for subject in built.subjects}
    assert verdicts == {
        "clean": "FORGOTTEN",
        "brittle": "HIDDEN",
        "broken": "DAMAGED",
        ORIGINAL: "STILL KNOWS",
        CONTROL: "FORGOTTEN",
    }
    assert built.verdict == "HIDDEN"  # not the original's


def test_splits_count_examples_and_facts(built: AuditReport) -> None:
    assert built.splits[0] == ReportSplit(name="forget", role="forget", examples=2 * FACTS, facts=FACTS)


def test_report_follows_its_schema_and_is_json(built: AuditReport) -> None:
    schema().validate(built.to_json())
    content = built.to_json()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert parsed(content, "it") == built


@pytest.mark.parametrize(
    "damage",
    [
        lambda r: r | {"verdict": "FORGOT"},
        lambda r: r | {"schema_version": 1},
        lambda r: r | {"extra": 1},
        lambda r: r | {"subjects": [r["subjects"][0] | {"verdict": "hidden"}]},
        lambda r: r | {"subjects": [r["subjects"][0] | {"cells": [{"variant": "v", "split": "s", "metric": "m"}]}]},
    ],
)
def test_schema_rejects_what_is_not_a_report(built: AuditReport, damage) -> None:
    content = damage(built.to_json())
    assert not schema().is_valid(content)
    with pytest.raises(UserError, match="it is not a report"):
        parsed(content, "it")


def test_the_schema_that_is_shipped_is_that_of_the_models() -> None:
    code = "from stillknows import store; from stillknows.reporting import schema; from pathlib import Path; "
    code += "store.write_json(Path('stillknows/reporting/report.schema.json'), schema.json_schema())"
    assert schema().schema == json_schema(), f'type: python -c "{code}"'


@pytest.mark.parametrize("role", get_args(Role))
def test_splits_of_every_role_fit_the_schema(built: AuditReport, role: str) -> None:
    content = built.to_json()
    content["splits"].append(content["splits"][0] | {"role": role})
    schema().validate(content)
    assert parsed(content, "it").splits[-1].role == role


def test_figures_and_general_tasks_are_shown_in_their_own_units(audit: Audit) -> None:
    added = (
        Cell("brittle", "int4", "suite", "privleak", Interval(-99.8, -99.9, -99.61, 100)),
        Cell("brittle", "int4", "words", "perplexity", Interval(12.345, 11, math.inf, 7)),
        Cell("brittle", FULL, "words", "perplexity", "lm-eval returned NaN (n=7)"),
    )
    built = make_report(replace(audit, cells=(*audit.cells, *added)))
    schema().validate(built.to_json())
    page, text = report.html(built), report.markdown(built)
    parts = [(page, "<h2>Published figures</h2>", "<h2>General utility</h2>", "<h2>What rounding")]
    parts.append((text, "## Published figures", "## General utility", "In brackets"))
    for shown, figures, general, end in parts:
        suite = shown[shown.index(figures) : shown.index(general)]
        tasks = shown[shown.index(general) : shown.index(end)]
        for words in ("privleak", "−99.8", "−99.9 to −99.6"):
            assert words in suite
        for words in ("words: perplexity", "12.3", "11 to ∞", "returned NaN (n=7)"):
            assert words in tasks
    assert {s.verdict for s in built.subjects} == {s.verdict for s in make_report(audit).subjects}


def test_an_update_is_mapped_by_layer_where_there_are_several(built: AuditReport) -> None:
    page = report.html(built)
    assert page.count(" by layer</figcaption>") == 1
    map_of_layers = page[page.index("brittle by layer</figcaption>") :]
    first, second = re.findall(r"<span>model\.layers\.\d</span>.*?</tr>", map_of_layers, re.DOTALL)
    assert (first.count("0.12<small>3 % crossed"), first.count("--share:0.125")) == (3, 3)
    assert (second.count("0.38<small>3 % crossed"), second.count("not measured")) == (2, 1)
    assert "nothing that the format rounds was changed here" in map_of_layers
    assert not any("layers" in c.metric for c in unmeasured(built))


def test_sections_without_numbers_are_left_out(built: AuditReport) -> None:
    for shown in (report.html(built), report.markdown(built)):
        assert "Published figures" not in shown
        assert "General utility" not in shown


def test_unbounded_and_undefined_numbers_become_null(audit: Audit) -> None:
    cells = tuple(
        replace(cell, result=Interval(0.5, -math.inf, math.inf, 3)) if cell.metric.endswith(".recovery") else cell
        for cell in audit.cells
    )
    built = make_report(replace(audit, cells=cells))
    schema().validate(built.to_json())
    brittle = next(subject for subject in built.subjects if subject.name == "brittle")
    unbounded = next(cell for cell in brittle.cells if cell.metric.endswith(".recovery"))
    assert (unbounded.low, unbounded.high) == (None, None)
    assert (brittle.run or {})["settings"]["lr"] is None
    assert "−∞ to ∞" in report.html(built)
    assert "−∞ to ∞" in report.markdown(built)


def test_leaks_are_the_facts_with_the_largest_gain_in_the_worst_variant(built: AuditReport) -> None:
    leaks = next(subject.leaks for subject in built.subjects if subject.name == "brittle")
    assert len(leaks) == NUM_LEAKS
    assert [leak.id for leak in leaks[:3]] == [f"forget{fact}.1" for fact in LEAKING]  # the likelier wording
    first = leaks[0]
    assert first.variant == "int4"
    assert first.question == f"forget question {LEAKING[0]} in wording 1 ?"
    assert first.truth == f"truth {LEAKING[0]}"
    assert first.generated == f"{NASTY} {2 * LEAKING[0] + 1}"
    assert first.generated_full == f"I forgot {2 * LEAKING[0] + 1}"
    assert first.scores.model_dump() == pytest.approx(
        {"original": 0.9, "control": 0.01, "full": 0.01, "variant": 0.89}, rel=1e-3
    )
    assert first.known


def test_controls_and_models_at_the_control_have_no_leaks(built: AuditReport) -> None:
    assert {s.name: bool(s.leaks) for s in built.subjects} == {
        "clean": False,
        "brittle": True,
        "broken": False,
        ORIGINAL: False,
        CONTROL: False,
    }


def test_page_is_well_formed_and_fetches_nothing(built: AuditReport) -> None:
    text = report.html(built)
    page = Page(text)
    assert text.startswith("<!doctype html>")
    assert page.open == []
    assert {tag for tag, _ in page.tags} & {"script", "img", "link", "iframe", "object", "embed", "base"} == set()
    for _, attributes in page.tags:
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    assert re.findall("https?://[^ &<]*", text.replace("http://elsewhere.example", "")) == []
    assert "url(" not in text
    assert "@import" not in text


def test_every_table_scrolls_with_a_sign_that_is_not_printed(built: AuditReport) -> None:
    text = report.html(built)
    assert text.count("<table") == len(re.findall(r'<div class="scroll[^>]*>\s*<table', text)) > 3
    sign = re.search(r"\.scroll::after \{[^}]*position: sticky[^}]*opacity: 0;", text)  # seen only where it scrolls
    assert sign
    assert "animation-timeline: scroll(nearest inline)" in text
    assert ".scroll::after { display: none; }" in text[text.index("@media print") :]


def test_the_page_says_how_to_read_it_and_links_within_itself(built: AuditReport) -> None:
    page = Page(report.html(built))
    targets = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    links = [str(attributes["href"]) for _, attributes in page.tags if "href" in attributes]
    assert "#reasons" in links
    assert {link.removeprefix("#") for link in links} <= targets
    guide = "docs/reading-a-report.md"
    assert guide in report.html(built)
    for file in (guide, "docs/report.png"):
        assert (ROOT / file).is_file()
    assert guide in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_guide_names_all_verdicts_and_every_field_of_a_finding() -> None:
    text = (ROOT / "docs/reading-a-report.md").read_text(encoding="utf-8")
    for name in (*SEVERITY, *get_args(Outcome), *(field.name for field in fields(Finding) if field.name != "model")):
        assert f"`{name}`" in text or f"| {name} |" in text, name


def test_text_from_models_and_users_is_escaped(built: AuditReport) -> None:
    text = report.html(built)
    assert "<script" not in text
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp;" in text
    assert "runs/&lt;b&gt;brittle&lt;/b&gt;" in text
    assert "npo &lt;i&gt;" in text
    assert "a&lt;b" in text


def test_page_shows_every_verdict_in_words_and_its_limits(built: AuditReport) -> None:
    text = report.html(built)
    for name in SEVERITY:
        assert name in text
    assert "“absent from the weights” never means “cannot be told in the prompt”" in text
    assert "The worst verdict on 3 models is HIDDEN: brittle." in text
    assert "print-of-brittle" in text


def test_unmeasured_cells_show_their_reason_and_no_number() -> None:
    built = make_report(make_audit(control=False))
    schema().validate(built.to_json())
    assert built.verdict == "UNDECIDED"
    text = report.html(built)
    kept = text[text.index("<h2>Knowledge kept</h2>") : text.index("Raw scores")]
    cells = re.findall(r"<td[^>]*>.*?</td>", kept, re.DOTALL)
    assert len(cells) == 4 * len(VARIANTS)
    for cell in cells:
        assert cell == f'<td class="missing" title="{NO_CONTROL}">not measured<sup>1</sup></td>'
    assert f"<li>{NO_CONTROL}</li>" in kept
    assert "facts could not be compared with the control" in text
    assert f"[1] {NO_CONTROL}" in report.markdown(built)
    assert "not measured [1]" in report.markdown(built)


def test_pages_show_raw_scores_where_there_is_no_control_and_mark_low_utility(audit: Audit) -> None:
    built = make_report(make_audit(control=False))
    page, text = report.html(built), report.markdown(built)
    for shown in (page, text):
        assert "Raw scores, since there is no control to compare with" in shown
        assert "Raw scores" not in (report.html if shown == page else report.markdown)(make_report(audit))
    assert text.count("0.62 (") == 1  # what brittle scores under int4
    assert re.search(r"<td[^>]*>0.62<small>", page)
    assert re.search(r"\| broken +\| 0.00! \(0.00 to 0.00\) \|", text)
    assert len(re.findall(r"<td[^>]*>0.00!<small>", page)) == len(VARIANTS)
    assert "1.00!" not in page + text


def test_the_page_says_that_a_missing_control_is_why_nothing_is_decided(audit: Audit) -> None:
    built = make_report(make_audit(control=False))
    page, why = (
        report.html(built),
        "There is no never-taught control, so nothing is decided but that a recited fact is a leak.",
    )
    assert page.count(why) == 1 + len(built.subjects)
    assert "this benchmark cannot show a leak" not in page
    assert why not in report.html(make_report(audit))
    built = built.model_copy(update={"variants": built.variants[:1]})
    assert "covers the one variant that was tested: full." in report.html(built)


def test_names_of_variants_break_between_their_parts_and_are_escaped(audit: Audit) -> None:
    built = make_report(audit)
    built = built.model_copy(update={"variants": (*built.variants, "rtn:bits=3+<b>")})
    for subject in built.subjects:
        subject.variants["rtn:bits=3+<b>"] = "UNDECIDED"
    assert "<span>rtn:<wbr>bits=3+<wbr>&lt;b&gt;</span>" in report.html(built)


def test_cells_that_are_absent_are_not_measured(audit: Audit) -> None:
    text = report.html(make_report(replace(audit, cells=())))
    assert NOT_ASKED in text
    assert NO_FORMAT in text
    assert "0.00" not in text[text.index("<h2>Knowledge kept</h2>") : text.index("<h2>Answers beside")]


def test_forest_axis_holds_all_bounds_and_always_0_and_1() -> None:
    cell = Measured(variant="v", split="s", metric="m", value=-0.5, low=-1.2, high=None, n=3)
    axis = tables.axis([tables.Grid("m", "s", [("a", [cell])], [])])
    assert (axis.low, axis.high) == (-1.2, 1.0)
    assert {0.0, 1.0} <= set(axis.ticks)
    assert 0 < axis.at(-1.2) < axis.at(0) < axis.at(1) < 100
    assert axis.at(None, 100) == 100
    assert tables.axis([]).ticks == [0, 0.25, 0.5, 0.75, 1]


def test_what_the_verdicts_rest_on_is_data_and_every_medium_words_it(built: AuditReport) -> None:
    brittle = next(subject for subject in built.subjects if subject.name == "brittle")
    [leak] = [f for f in brittle.findings if f.outcome == "leak"]
    cell = next(c for c in brittle.cells if (c.variant, c.metric) == ("int4", "answer_probability.kept"))
    where = {"variant": "int4", "split": "forget", "metric": "answer_probability", "threshold": 0.1}
    assert leak.kind == "knowledge_kept"
    assert asdict(leak).items() >= (where | {key: getattr(cell, key) for key in ("value", "low", "high", "n")}).items()
    text = f"int4: answer_probability on forget: keeps {number(leak.value)} of the knowledge"
    for shown in (report.html(built), report.markdown(built)):
        assert shown.count(text) == 1


def test_what_is_out_of_reach_is_data_and_shown() -> None:
    built = make_report(replace(make_audit(control=False), out_of_reach=(Finding("no_control", "undecided"),)))
    assert [finding.kind for finding in built.out_of_reach] == ["no_control"]
    for shown in (report.html(built), report.markdown(built)):
        assert "FORGOTTEN is out of reach here: there is no never-taught control." in shown


def test_markdown_has_the_verdicts_and_survives_pipes(built: AuditReport) -> None:
    text = report.markdown(built)
    assert text.startswith("# stillknows: HIDDEN\n")
    for subject in built.subjects:
        assert re.search(rf"^\| {subject.name} +\| {subject.verdict} ", text, re.MULTILINE)
    assert "0.69 (" in text  # brittle's knowledge kept under int4
    renamed = built.model_copy(update={"subjects": (built.subjects[0].model_copy(update={"name": "a|b\nc"}),)})
    assert "| a\\|b c |" in report.markdown(renamed)


def test_one_model_makes_a_plain_sentence(built: AuditReport) -> None:
    brittle = next(subject for subject in built.subjects if subject.name == "brittle")
    assert ">brittle is HIDDEN.<" in report.html(built.model_copy(update={"subjects": (brittle,)}))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "0.50"), (-0.001, "0.00"), (-0.25, "−0.25"), (-10.001, "−10.00"), (None, "?")],
)
def test_numbers_have_two_decimals_and_no_negative_zero(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("share", "text"), [(0.1, "10 %"), (0, "0 %"), (1, "100 %"), (0.0004, "0.04 %"), (1e-7, "under 0.01 %")]
)
def test_small_shares_are_not_shown_as_nothing(share: float, text: str) -> None:
    assert percent(share) == text


def test_written_reports_can_be_read_and_are_the_same_bytes_twice(built: AuditReport, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        report.write(make_report(make_audit()), tmp_path / folder)
    names = ["report.html", "report.json", "report.md"]
    assert sorted(file.name for file in (tmp_path / "a").glob("report*")) == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert report.read(tmp_path / "a").to_json() == store.sealed(built.to_json())
    assert report.html(report.read(tmp_path / "a")) == report.html(built)


@pytest.mark.parametrize("content", [None, "not json", "[]", '{"schema_version": 4}'])
def test_reading_what_is_no_report_is_the_users_error(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(UserError, match=r"report\.json"):
        report.read(tmp_path)


@pytest.mark.parametrize(
    ("command", "typed"),
    [
        ("stillknows audit m --out a", ": stillknows audit m --out a --overwrite"),
        ("stillknows audit m --overwrite", ": stillknows audit m --overwrite"),
        ("stillknows demo --seed 1", ": stillknows demo --seed 1"),
        ("rm -r /", ""),
        (None, ""),
    ],
)
def test_a_report_of_another_version_is_refused_with_what_to_type(
    command: str | None, typed: str, tmp_path: Path
) -> None:
    store.write_sealed(tmp_path / "report.json", {"schema_version": 1, "repeat": {"command": command, "versions": {}}})
    with pytest.raises(
        UserError, match=f"is not a report of schema version {SCHEMA_VERSION} but of version 1"
    ) as refused:
        report.read(tmp_path)
    assert str(refused.value).endswith(f"saved observations are used again where they still hold{typed}")


def test_a_report_whose_findings_do_not_make_its_verdict_is_refused(built: AuditReport) -> None:
    content = built.to_json()
    leaks = [f for subject in content["subjects"] for f in subject["findings"] if f["outcome"] == "leak"]
    leaks[0]["outcome"] = "pass"
    with pytest.raises(UserError, match="its findings on brittle do not make int4 STILL KNOWS"):
        parsed(content, "it")


def test_the_order_of_entries_in_json_does_not_matter(built: AuditReport) -> None:
    shuffled = parsed(json.loads(json.dumps(built.to_json(), sort_keys=True)), "it")
    assert list(shuffled.subjects[0].variants) != list(shuffled.variants)
    assert report.markdown(shuffled) == report.markdown(built)


def test_report_needs_neither_torch_nor_transformers() -> None:
    code = "import sys; from stillknows.reporting import build, report; "
    code += "print({'torch', 'transformers'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"
