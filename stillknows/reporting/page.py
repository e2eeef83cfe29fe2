"""A report as one page that needs no network and no script."""

from __future__ import annotations

import re
from importlib.resources import files
from json import JSONEncoder
from typing import NamedTuple

from jinja2 import Environment, StrictUndefined

from stillknows.auditing.comparing import KNOWN_SHARE
from stillknows.auditing.evidence import MIN_GAP
from stillknows.auditing.findings import out_of_reach_words, sentences
from stillknows.depth.outcome import SHOWN
from stillknows.formatting import for_terminal, number, percent
from stillknows.reporting import depth, facts, membership, plots, tables
from stillknows.reporting.annex import NOTICE, annex
from stillknows.reporting.brief import brief
from stillknows.reporting.overview import left_out, sentence
from stillknows.reporting.schema import AuditReport, Unmeasured, expected
from stillknows.stats import LEVEL
from stillknows.types import FULL

TEMPLATE = "report.html.j2"


class UnmeasuredOf(NamedTuple):
    """A number that was not made, and of which model."""

    model: str
    variant: str
    metric: str
    not_measured: str


def html(report: AuditReport) -> str:
    """Return the page; all data in it is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.finalize = lambda value: for_terminal(value) if type(value) is str else value  # bidi codes above all
    environment.filters |= {
        "number": number,
        "value_words": tables.value_words,
        "span": tables.span,
        "percent": percent,
        "pretty": JSONEncoder(indent=1, ensure_ascii=False).encode,
        "name_parts": name_parts,
        "sentences": sentences,
        "seconds_of": "seconds, {}".format,
        "fact_summary": facts.summary_of,
        "fact_power": facts.power,
        "fact_counts": facts.counted,
        "depth_summary": depth.summary_of,
        "membership_words": membership.words,
        "rank_chart": plots.rank_chart,
    }
    grids = tables.grids(report)
    template = environment.from_string(files("stillknows.reporting").joinpath(TEMPLATE).read_text(encoding="utf-8"))
    return template.render(
        report=report,
        sentence=sentence(report),
        brief=brief(report),
        relearning=plots.relearning_charts(report),
        placebo_sources=facts.sources(report),
        out_of_reach=out_of_reach_words(report.out_of_reach),
        left_out=left_out(report),
        unmeasured=unmeasured(report),
        annex=annex(report),
        annex_notice=NOTICE,
        grids=grids,
        axis=tables.axis(grids["recovery"]),
        expected=expected,
        level=LEVEL,
        known_share=KNOWN_SHARE,
        least_gap=MIN_GAP,
        signals=depth.NAMES,
        member_attacks=membership.NAMES,
        shown=SHOWN,
    ).lstrip()


def unmeasured(report: AuditReport) -> list[UnmeasuredOf]:
    """Return the cells without a number, but not recovery in full precision, which has none by definition."""
    return [
        UnmeasuredOf(subject.name, cell.variant, cell.metric, cell.not_measured)
        for subject in report.subjects
        for cell in subject.cells
        if isinstance(cell, Unmeasured) and (cell.variant != FULL or not cell.metric.endswith(".recovery"))
    ]


def name_parts(name: str) -> list[str]:
    """Return a variant's name in the parts between which a line may end: after what joins them, not within a word."""
    return re.split(r"(?<=[:+,])", for_terminal(name))
