"""What an audit is asked, as data: enough to ask it again. Items stay where they are; their digest is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from stillknows.auditing.plan import AuditConfig
from stillknows.errors import UserError
from stillknows.registry import bind
from stillknows.types import Benchmark

BENCHMARK = "benchmark"


def described(request: AuditConfig) -> dict[str, Any]:
    """Return what an audit is asked: every setting as JSON, and of the benchmark its name, frame and `items_digest`."""
    benchmark = request.benchmark
    found = {name: kind.dump_python(getattr(request, name), mode="json") for name, kind in _settings().items()}
    named = {"spec": benchmark.spec, "template": benchmark.template, "items": items_digest(benchmark)}
    return {BENCHMARK: named, **found}


def asked_again(request: Mapping[str, Any], **changed: Any) -> AuditConfig:
    """Return the audit that `described` described, with some settings changed, such as where the models lie now.

    Raises UserError for a benchmark that cannot be made by its name, that has other items now, and for settings of
    another version.
    """
    try:
        given = {name: kind.validate_python(request[name]) for name, kind in _settings().items()}
    except (KeyError, ValidationError) as error:
        raise UserError(
            f"what the audit was asked cannot be read: {error}", "run the audit with this version"
        ) from None
    named = request[BENCHMARK]
    try:
        benchmark = replace(bind("benchmark", named["spec"])(), template=named["template"])
    except UserError as error:
        raise UserError(
            f"the benchmark {named['spec']} cannot be made again: {error}", "run this where its files lie as they did"
        ) from error
    if items_digest(benchmark) != named["items"]:
        raise UserError(f"the benchmark {named['spec']} has other items than those that were audited")
    return AuditConfig(**given | {BENCHMARK: benchmark} | changed)


def items_digest(benchmark: Benchmark) -> str:
    """Return the SHA-256 of all splits: their items, roles and frames."""
    splits = [asdict(split) for split in benchmark.splits]
    return hashlib.sha256(json.dumps(splits, sort_keys=True).encode()).hexdigest()


def data_files(benchmark: str) -> Iterator[tuple[str, Path]]:
    """Yield the files that the options of a benchmark name, with a name for each: of a folder all that lie in it."""
    for option, value in bind("benchmark", benchmark).options.items():
        path = Path(value) if isinstance(value, str) and value else None
        if path and path.is_file():
            yield f"{option}/{path.name}", path
        elif path and path.is_dir():
            for file in sorted(path.rglob("*")):
                if file.is_file():
                    yield f"{option}/{file.relative_to(path).as_posix()}", file


def _settings() -> dict[str, TypeAdapter[Any]]:
    """Return all that an audit is asked but its benchmark, by name, with what reads and writes it."""
    return {name: TypeAdapter(kind) for name, kind in get_type_hints(AuditConfig).items() if name != BENCHMARK}
