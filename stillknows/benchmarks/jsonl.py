"""A user's own data: one JSON object per line, a question with its answer or a plain text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stillknows.errors import UserError
from stillknows.registry import register
from stillknows.types import Benchmark, Example, Split


@register("benchmark", source="your files")
def jsonl(
    *, forget: str = "", retain: str = "", neighbour: str = "", template: str = "Question: {prompt}\nAnswer:"
) -> Benchmark:
    """Your own files: {"question": …, "answer": …} or {"text": …} per line.

    Optional keys: "id" (else the line's number) and "fact" (items with equal values ask for the same thing).

    Args:
        forget: file of items to forget.
        retain: file of items to keep.
        neighbour: file of items close to the forgotten ones that must be kept.
        template: frame of a question, or "chat" for the tokenizer's own.

    Raises UserError that names file and line.
    """
    if not forget or not retain:
        raise UserError("jsonl needs two files", "jsonl:forget=forget.jsonl,retain=retain.jsonl")
    splits = [
        Split("forget", "forget", read_examples(Path(forget))),
        Split("retain", "retain", read_examples(Path(retain))),
    ]
    if neighbour:
        splits.append(Split("neighbour", "neighbour", read_examples(Path(neighbour))))
    return Benchmark(f"jsonl:forget={forget},retain={retain}", tuple(splits), template)


def read_examples(path: Path, *, limit: int | None = None) -> tuple[Example, ...]:
    """Read a file of JSON lines; `limit` keeps that many, spread evenly. Raises UserError with file and line."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a file of JSON lines") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8", f"iconv -f latin1 -t utf-8 {path}") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{path} holds no items")
    examples = [_example(_parse(line, path, number), path, number) for number, line in lines]
    _require_unique(examples, [number for number, _ in lines], path)
    if limit is not None and limit < len(examples):
        examples = [examples[i * len(examples) // limit] for i in range(limit)]
    return tuple(examples)


def _parse(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{number}: not JSON: {error}") from None
    if not isinstance(item, dict):
        raise UserError(f"{path}:{number}: expected an object, got {type(item).__name__}")
    return item


def _example(item: dict[str, Any], path: Path, number: int) -> Example:
    keys = ("question", "answer") if "question" in item or "answer" in item else ("text",)
    for key in keys:
        if not isinstance(item.get(key), str) or not item[key].strip():
            raise UserError(
                f"{path}:{number}: {key!r} is missing, empty or not a text",
                '{"question": …, "answer": …} or {"text": …}',
            )
    name = str(item.get("id", f"{path.stem}-{number}"))
    prompt, answer = (item["question"], item["answer"]) if len(keys) == 2 else ("", item["text"])
    return Example(name, prompt.strip(), answer.strip(), str(item.get("fact", name)))


def _require_unique(examples: list[Example], numbers: list[int], path: Path) -> None:
    seen: set[str] = set()
    for count, (number, example) in enumerate(zip(numbers, examples, strict=True), 1):
        if example.id in seen:
            raise UserError(f"{path}:{number}: item {count} repeats the id {example.id!r}")
        seen.add(example.id)
