"""What the Python functions are given, as the library takes it: models, benchmarks, settings and folders."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_type_hints

from stillknows import defaults
from stillknows.arguments import require_type
from stillknows.errors import UserError, blamed_on, did_you_mean
from stillknows.registry import bind
from stillknows.store import write_text
from stillknows.types import Benchmark, Example, Role

if TYPE_CHECKING:
    from stillknows.auditing.policy import Policy
    from stillknows.training.settings import Settings

Folder: TypeAlias = str | Path
Model: TypeAlias = str | os.PathLike[str] | tuple[Any, Any]
Rows: TypeAlias = Mapping[str, Sequence[Mapping[str, Any]]]
Items: TypeAlias = str | Benchmark | Rows
LongItems: TypeAlias = Literal["error", "truncate"]
Save: TypeAlias = Literal["model", "adapter"]
WeightType: TypeAlias = Literal["float32", "bfloat16"]


def model_folder(model: Model) -> str:
    """Return a model's folder or hub name; a loaded one, (model, tokenizer), is written to a temporary folder first."""
    if not isinstance(model, tuple):
        return os.fspath(model)
    from stillknows.model import saving

    loaded: Any
    tokenizer: Any
    loaded, tokenizer = model
    if not hasattr(loaded, "save_pretrained") or not hasattr(loaded, "state_dict"):
        raise UserError(f"{type(loaded).__name__} is no model", "give a folder, or a pair (model, tokenizer)")
    name = Path(str(getattr(loaded, "name_or_path", ""))).name or "model"
    folder = result_folder(None) / name
    folder.mkdir()
    saving.save(loaded, tokenizer, folder)
    return str(folder)


def benchmark_of(
    what: Items,
    *,
    data: Folder | None = None,
    template: str | None = None,
    refusals: Folder | Sequence[str] | None = None,
) -> Benchmark:
    """Return a benchmark, with what is given in the place of its own.

    Args:
        what: a name as on the command line, a benchmark, or lists of dictionaries by role, which are written to
            temporary files.
        data: folder with the files of a benchmark that is named.
        refusals: a text file with one answer on each line, or the answers.
    """
    if isinstance(what, Benchmark) and data is not None:
        raise UserError("`data` applies to a benchmark that is named", "leave it out")
    found = what if isinstance(what, Benchmark) else _named(what if isinstance(what, str) else _written(what), data)
    if template:
        found = replace(found, template=template)
    if refusals is None:
        return found
    if isinstance(refusals, str | Path):
        from stillknows.benchmarks.files import read_refusals

        refusals = read_refusals(Path(refusals))
    return replace(found, refusals=tuple(refusals))


def _named(spec: str, data: Folder | None) -> Benchmark:
    bound = bind("benchmark", spec)
    if data is None:
        return bound()
    if "data" not in bound.options:
        raise UserError(f"`data` does not apply to the benchmark {bound.plugin.name}", "leave it out")
    return bind("benchmark", bound.respelled(data=str(data)))()


def _written(rows: Rows) -> str:
    """Write items into temporary files, one for each role, and return what names them as a benchmark."""
    folder = result_folder(None)
    for role, items in rows.items():
        with blamed_on(f"the items of {role!r} are no JSON", "give texts, and lists of texts"):
            lines = [json.dumps(item) for item in items]
        write_text(folder / f"{role}.jsonl", "".join(f"{line}\n" for line in lines))
    return "jsonl:" + ",".join(f"{role}={folder / role}.jsonl" for role in rows)


def examples_of(benchmark: Benchmark, role: Role) -> tuple[Example, ...]:
    """Return the items of a role. Raises UserError for a benchmark that has none."""
    try:
        return benchmark.split(role).examples
    except LookupError as error:
        raise UserError(str(error), "leave that role out") from error


def settings_of(chosen: Mapping[str, Any]) -> Settings:
    """Return training settings, the default ones but for these. Raises UserError for unknown names and wrong types."""
    from stillknows.training.settings import Settings

    known, kinds = [field.name for field in fields(Settings)], get_type_hints(Settings)
    for name, value in chosen.items():
        if name not in known:
            raise UserError(f"there is no option {name!r}{did_you_mean(name, known)}")
        require_type(name, value, kinds[name])
    return replace(Settings(lr=defaults.LR), **chosen)


def policy_of(policy: Policy | str | Path | None, **changed: Any) -> Policy:
    """Return a policy: as it is, by its name, from a TOML file, or the default one, but for settings that are given."""
    from stillknows.auditing.policy import Policy, read_policy

    found = policy if isinstance(policy, Policy) else read_policy(policy or "default")
    return replace(found, **{name: value for name, value in changed.items() if value is not None})


def path_of(path: Folder | None) -> Path | None:
    """Return a path, None for None."""
    return None if path is None else Path(path)


def result_folder(out: Folder | None) -> Path:
    """Return the folder for results: a temporary one, which is left to the system to remove, for None."""
    return Path(tempfile.mkdtemp(prefix="stillknows-")) if out is None else Path(out)
