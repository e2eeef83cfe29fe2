"""Functions that put audits side by side."""

from __future__ import annotations

from typing import Any

from stillknows.api.inputs import Folder, path_of
from stillknows.arguments import typed
from stillknows.store import write_text


@typed
def compare(*folders: Folder, utility: float | None = None, plot: Folder | None = None) -> dict[str, Any]:
    """Rank the models of audits by what they keep in their worst variant, at equal utility.

    See `reporting.comparison.compare` for what is returned. Audits that differ from the first in data, plan, policy,
    original or controls are named and not ranked.

    Args:
        folders: what `audit` wrote.
        utility: the least share of the original's score on what is to be retained; the policy's floor when None.
        plot: a file for a chart, *.svg.
    """
    from stillknows.reporting import comparison

    result = comparison.compare(folders, utility)
    if (file := path_of(plot)) is not None:
        write_text(file, comparison.comparison_chart(result))
    return result


@typed
def history(*folders: Folder, model: str | None = None, plot: Folder | None = None) -> dict[str, Any]:
    """Follow a line of models over its audits, one for each release, in the order in which they are given.

    See `reporting.comparison.history` for what is returned.

    Args:
        model: its label, where an audit judges several models.
        plot: a file for a chart, *.svg.
    """
    from stillknows.reporting import comparison

    result = comparison.history(folders, model)
    if (file := path_of(plot)) is not None:
        write_text(file, comparison.history_chart(result))
    return result
