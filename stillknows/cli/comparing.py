"""Commands that put audits side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stillknows.cli import options as o
from stillknows.cli.terminal import app, examples, show


@app.command(
    epilog=examples(
        "stillknows compare runs/npo-audit runs/exchange-audit",
        "stillknows compare runs/*-audit --utility 0.95 --plot compare.svg",
        "stillknows compare runs/*-audit --json | jq '.ranked[] | {model, rank}'",
    )
)
def compare(folders: o.Audits, utility: o.LeastUtility = None, plot: o.Plot = None, as_json: o.Json = False) -> None:
    """Rank the models of audits by what they keep in their worst variant, at equal utility.

    Audits of other data, plans, policies, originals or controls than the first are named and not ranked.
    """
    import stillknows as sk
    from stillknows.reporting.comparison import comparison_text

    result = sk.compare(*folders, utility=utility, plot=plot)
    _show(result, as_json, comparison_text(result), plot)


@app.command(
    epilog=examples(
        "stillknows history runs/v1 runs/v2 runs/v3",
        "stillknows history runs/v1 runs/v2 --model unlearned --plot history.svg --json",
    )
)
def history(folders: o.Audits, model: o.Line = None, plot: o.Plot = None, as_json: o.Json = False) -> None:
    """Show a line of models over its releases: verdict, worst variant, what is kept, utility.

    The audits are given in the order of the releases.
    """
    import stillknows as sk
    from stillknows.reporting.comparison import history_text

    result = sk.history(*folders, model=model, plot=plot)
    _show(result, as_json, history_text(result), plot)


def _show(result: dict[str, Any], as_json: bool, text: str, plot: Path | None) -> None:
    show(result, as_json, text, f"wrote {plot}" if plot else "")
