"""The command that lists what can be named on the command line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stillknows.cli.options import Json
from stillknows.cli.terminal import app, examples, show

if TYPE_CHECKING:
    from stillknows.registry import Plugin


@app.command("list", epilog=examples("stillknows list", "stillknows list attacks", "stillknows list methods --json"))
def list_(
    what: Annotated[
        str | None,
        typer.Argument(help="One kind (`metrics`), one role (`attacks`, `formats`) or `methods`; all if left out."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List what can be named on the command line, with options, defaults and sources."""
    from stillknows.errors import UserError, did_you_mean
    from stillknows.kinds import KINDS, LISTS, RENAMED_LISTS
    from stillknows.registry import plugins

    wanted = [RENAMED_LISTS.get(what, what)] if what else [f"{kind}s" for kind in KINDS]
    found: dict[str, list[dict[str, Any]]] = {}
    for name in wanted:
        if name not in LISTS:
            raise UserError(f"nothing is listed as {name!r}{did_you_mean(name, LISTS)}", "stillknows list")
        kinds, role = LISTS[name]
        found[name] = [_described(plugin) for kind in kinds for plugin in plugins(kind, role).values()]
    show(found, as_json, "\n".join(line for name, entries in found.items() for line in _lines(name, entries)).strip())


def _described(plugin: Plugin) -> dict[str, Any]:
    from stillknows.options import type_name

    return {
        "name": plugin.name,
        "kind": plugin.kind,
        "role": plugin.role,
        "level": plugin.level,
        "needs": list(plugin.needs),
        "options": plugin.options,
        "types": {name: type_name(kind) for name, kind in plugin.types.items()},
        "choices": plugin.choices,
        "budget": plugin.budget,
        "unspent": plugin.unspent if plugin.budget else None,
        "judged_by": plugin.judged_by if plugin.judged_by is None else list(plugin.judged_by),
        "source": plugin.source,
        "version": plugin.version,
        "summary": plugin.summary,
    }


def _lines(heading: str, entries: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a heading and what stands under it, by kind and role where it holds several."""
    yield from ("", heading)
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(entry["role"] or entry["kind"], []).append(entry)
    for group, members in groups.items():
        if len(groups) > 1:
            yield f"  {group}"
        for entry in members:
            options = "".join(f":{key}={_typed(value)}" for key, value in entry["options"].items())
            level = f"  ({entry['level']})" if entry["level"] else ""
            yield from (f"    {entry['name']}{options}{level}", f"        {entry['summary']}  [{entry['source']}]")
            yield from (f"        {option}: {', '.join(words)}" for option, words in entry["choices"].items())


def _typed(value: Any) -> str:
    """Write an option's default so that it stays on one line and an empty text can be seen."""
    return repr(value) if isinstance(value, str) and (not value or any(c.isspace() for c in value)) else str(value)
