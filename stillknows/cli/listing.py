"""The command that lists what can be named on the command line."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from stillknows.cli.terminal import Json, app, examples, show

LISTS: dict[str, list[str]] = {
    "methods": [
        *("forget", "retain", "mask", "adversary", "combination", "optimizer", "adapter", "curriculum"),
        *("edit", "recipe"),
    ],
    "suppressions": ["suppression"],
    "quantizers": ["quantizer"],
    "attacks": ["attack"],
    "metrics": ["metric"],
    "figures": ["figure"],
    "benchmarks": ["benchmark"],
}


@app.command("list", epilog=examples("stillknows list", "stillknows list methods --json"))
def list_(
    what: Annotated[
        Literal["methods", "suppressions", "quantizers", "attacks", "metrics", "figures", "benchmarks"] | None,
        typer.Argument(help="One kind; all if left out."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List what can be named on the command line, with options, defaults and sources."""
    from stillknows.registry import plugins

    found = {
        name: [_describe(plugin) for kind in LISTS[name] for plugin in plugins(kind).values()]  # type: ignore[arg-type]
        for name in ([what] if what else LISTS)
    }
    lines = []
    for name, entries in found.items():
        lines.append(f"\n{name}")
        for entry in entries:
            options = "".join(f":{key}={_typed(value)}" for key, value in entry["options"].items())
            lines += [f"  {entry['name']}{options}", f"      {entry['summary']}  [{entry['source']}]"]
            lines += [f"      {option}: {', '.join(words)}" for option, words in entry["choices"].items()]
    show(found, as_json, "\n".join(lines).lstrip("\n"))


def _describe(plugin) -> dict[str, Any]:
    return {
        "name": plugin.name,
        "kind": plugin.kind,
        "options": plugin.options,
        "choices": plugin.choices,
        "needs": list(plugin.needs),
        "source": plugin.source,
        "version": plugin.version,
        "summary": plugin.summary,
    }


def _typed(value: Any) -> str:
    """Write an option's default so that it stays on one line and an empty text can be seen."""
    return repr(value) if isinstance(value, str) and (not value or any(c.isspace() for c in value)) else str(value)
