"""Audits side by side: models ranked at equal utility, and one line of models over its releases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stillknows.errors import UserError, did_you_mean
from stillknows.formatting import for_markdown, number, table_of_texts
from stillknows.reporting.chart import ChartAxis, Mark, Series, chart, unit_axis
from stillknows.reporting.schema import Measured
from stillknows.reporting.standings import AuditFolder, ModelStanding, differences, read_all, standings

KEPT = {False: "knowledge kept", True: "score on what is to be forgotten"}  # whether the scores are raw
Json = dict[str, Any]


def compare(folders: Sequence[str | Path], utility: float | None = None) -> Json:
    """Rank the models of several audits by what they keep in their worst variant, at equal utility.

    Ranked are models that keep at least `utility` (the policy's floor when None) of what is to be retained. A model's
    rank is a range: it is behind all whose upper bound is below its lower bound, and ahead of all whose lower bound is
    above its upper bound; models whose bounds overlap share ranks. `beaten_by` names the models that keep less of what
    is to be forgotten and no less of what is to be retained, by their values.

    Returns:
        `utility`: the level. `ranked`, `below` (the level) and `not_measured`: the models, each as
        `standings.ModelStanding.to_json` has it, the ranked ones with `rank` (first and last) and `beaten_by`.
        `incomparable`: audits that differ from the first in data, plan, policy, original or controls, and in what.
    """
    audits = read_all(folders)
    level = audits[0].report.policy.utility_floor if utility is None else utility
    if not level >= 0:
        raise UserError(f"`utility` {level} is out of range", "it must be at least 0")
    apart = {audit.name: differences(audits[0], audit) for audit in audits}
    models = [standing for audit in audits if not apart[audit.name] for standing in standings(audit)]
    whole = [one for one in models if one.kept is not None and one.utility is not None]
    fit = sorted((one for one in whole if _value(one.utility) >= level), key=lambda one: _value(one.kept))
    return {
        "utility": level,
        "ranked": [_ranked(one, fit) for one in fit],
        "below": [one.to_json() for one in whole if one not in fit],
        "not_measured": [one.to_json() for one in models if one not in whole],
        "incomparable": [{"audit": name, "because": why} for name, why in apart.items() if why],
    }


def _value(cell: Measured | None) -> float:
    return float("nan") if cell is None else cell.value


def _ranked(one: ModelStanding, others: Sequence[ModelStanding]) -> Json:
    """Return a model with its rank among others and the models that beat it."""
    ahead = [other for other in others if _is_ahead(other, one)]
    behind = [other for other in others if _is_ahead(one, other)]
    beaten_by = [
        {"audit": other.audit, "model": other.model}
        for other in others
        if _value(other.kept) < _value(one.kept) and _value(other.utility) >= _value(one.utility)
    ]
    return one.to_json() | {"rank": [1 + len(ahead), len(others) - len(behind)], "beaten_by": beaten_by}


def _is_ahead(one: ModelStanding, other: ModelStanding) -> bool:
    """Tell whether bounds show that one keeps less than another."""
    high, low = one.kept and one.kept.high, other.kept and other.kept.low
    return high is not None and low is not None and high < low


def history(folders: Sequence[str | Path], model: str | None = None) -> Json:
    """Follow one line of models over its audits, in the order in which these are given.

    Args:
        model: its label where audits judge several models.

    Returns:
        `releases`: each as `standings.ModelStanding.to_json` has it, with `change` against the release before: "more
        kept" or "less kept" where bounds show it, "" where they do not, None for the first one and where the two audits
        cannot be compared; `because` says in what they differ then.
    """
    audits, releases = read_all(folders), []
    before: tuple[AuditFolder, ModelStanding] | None = None
    for audit in audits:
        now = _of_line(audit, model)
        why = differences(before[0], audit) if before else []
        change = _change(before[1], now) if before and not why else None
        releases.append(now.to_json() | {"change": change, "because": why})
        before = audit, now
    return {"releases": releases}


def _of_line(audit: AuditFolder, model: str | None) -> ModelStanding:
    found = {one.model: one for one in standings(audit)}
    if model is None and len(found) == 1:
        return next(iter(found.values()))
    if model is None:
        raise UserError(f"{audit.name} judges {len(found)} models: {', '.join(found)}", "name one with `model`")
    if model not in found:
        raise UserError(f"{audit.name} judges no model {model!r}{did_you_mean(model, found)}")
    return found[model]


def _change(before: ModelStanding, now: ModelStanding) -> str:
    return "less kept" if _is_ahead(now, before) else "more kept" if _is_ahead(before, now) else ""


def comparison_text(result: Mapping[str, Any]) -> str:
    """Return a ranking as Markdown."""
    rows = [[_rank(one["rank"]), *_cells(one), _beaten(one["beaten_by"])] for one in result["ranked"]]
    rows += [["below", *_cells(one), "–"] for one in result["below"]]
    rows += [["not measured", *_cells(one), "–"] for one in result["not_measured"]]
    what = KEPT[any(one["is_raw"] for one in result["ranked"])]
    legend = f"Ranked by the {what} in the worst variant, among models with at least {result['utility']:g} of the "
    legend += "original's score on what is to be retained. Models that bounds do not part share ranks."
    parts = [for_markdown(legend)]
    header = ["rank", "model", "audit", "verdict", what, "in", "utility", "beaten by"]
    parts += [table_of_texts(header, rows)] if rows else ["No model was measured."]
    return "\n\n".join([*parts, *map(for_markdown, _apart(result["incomparable"]))])


def _beaten(by: Sequence[Mapping[str, Any]]) -> str:
    return "; ".join(f"{one['model']} ({one['audit']})" for one in by) or "–"


def _apart(incomparable: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"Not compared: {one['audit']}: {', '.join(one['because'])}." for one in incomparable]


def _rank(rank: Sequence[int]) -> str:
    return str(rank[0]) if rank[0] == rank[1] else f"{rank[0]} to {rank[1]}"


def _cells(one: Mapping[str, Any]) -> list[str]:
    kept, utility = one["kept"], one["utility"]
    where = f"{kept['variant']}, {kept['metric'].removesuffix('.kept')}" if kept else "–"
    return [one["model"], one["audit"], one["verdict"], _bounded(kept), where, _bounded(utility)]


def _bounded(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "not measured"
    return f"{number(cell['value'])} ({number(cell['low'], '−∞')} to {number(cell['high'], '∞')})"


def history_text(result: Mapping[str, Any]) -> str:
    """Return a line of models as Markdown."""
    rows = [[*_cells(one), one["change"] or "–"] for one in result["releases"]]
    what = KEPT[any(one["is_raw"] for one in result["releases"])]
    table = table_of_texts(["model", "audit", "verdict", what, "in", "utility", "against the one before"], rows)
    apart = [
        f"{one['audit']} cannot be compared with the release before: {', '.join(one['because'])}."
        for one in result["releases"]
        if one["because"]
    ]
    return "\n\n".join([table, *map(for_markdown, apart)])


def comparison_chart(result: Mapping[str, Any]) -> str:
    """Return the models as points: utility across, what is kept upwards."""
    groups = {"ranked": result["ranked"], "below the utility asked for": result["below"]}
    series = [
        Series(name, tuple(_mark(one, one["utility"]["value"]) for one in found)) for name, found in groups.items()
    ]
    marks = [mark for one in series for mark in one.marks]
    what = KEPT[any(one["is_raw"] for one in result["ranked"])]
    description = "; ".join(
        f"{one['model']} of {one['audit']}: {what} {_bounded(one['kept'])}, utility {_bounded(one['utility'])}"
        for found in groups.values()
        for one in found
    )
    x = unit_axis("utility: share of the original's score on what is to be retained", [mark.x for mark in marks])
    y = unit_axis(f"{what}, worst variant", [mark.y for mark in marks])
    return chart("Models at their utility", description, x, y, series)


def history_chart(result: Mapping[str, Any]) -> str:
    """Return a line of models over its releases: what is kept, and utility."""
    releases = list(enumerate(result["releases"]))
    what = KEPT[any(one["is_raw"] for one in result["releases"])]
    series = [
        Series(name, tuple(_mark(one, i, key) for i, one in releases if one[key]), joined=True)
        for name, key in ((f"{what}, worst variant", "kept"), ("utility", "utility"))
    ]
    names = tuple((float(i), Path(one["audit"]).name) for i, one in releases)
    x = ChartAxis("release", -0.5, max(len(names) - 0.5, 0.5), names)
    y = unit_axis("share", [mark.y for one in series for mark in one.marks])
    description = "; ".join(
        f"{one['audit']}: {one['verdict']}, {what} {_bounded(one['kept'])}, utility {_bounded(one['utility'])}"
        for _, one in releases
    )
    return chart("Releases", description, x, y, series)


def _mark(one: Mapping[str, Any], x: float, key: str = "kept") -> Mark:
    cell = one[key]
    return Mark(x, cell["value"], cell["low"], cell["high"], one["model"] if key == "kept" else "")
