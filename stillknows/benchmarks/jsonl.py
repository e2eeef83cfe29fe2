"""A user's own data: one JSON object per line, a question with its answer or a plain text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stillknows.benchmarks.files import Item, read_items, read_refusals, text, texts
from stillknows.errors import UserError
from stillknows.registry import register
from stillknows.types import Benchmark, Example, Split

FORM = '{"question": …, "answer": …} or {"text": …}'


@register("benchmark", source="your files")
def jsonl(
    *,
    forget: str = "",
    retain: str = "",
    neighbour: str = "",
    template: str = "Question: {prompt}\nAnswer:",
    refusals: str = "",
) -> Benchmark:
    """Your own files: {"question": …, "answer": …} or {"text": …} per line.

    A JSON array of such objects (in a file not called *.jsonl) will do as well, and so will *.parquet (needs pyarrow).

    Optional keys: "id" (else the line's number) and "fact" (items with equal values ask for the same thing); of a
    question also "paraphrase" (the true answer in other words) and "wrong" (a list of false answers).

    Args:
        forget: file of items to forget.
        retain: file of items to keep.
        neighbour: file of items close to the forgotten ones that must be kept.
        template: frame of a question, or "chat" for the tokenizer's own.
        refusals: text file of answers that give nothing away, one on each line; some methods train with them.

    Raises UserError that names file and line.
    """
    if not forget or not retain:
        raise UserError("jsonl needs two files", "jsonl:forget=forget.jsonl,retain=retain.jsonl")
    splits = [
        Split("forget", "forget", read_examples(Path(forget))),
        Split("retain", "retain", read_examples(Path(retain))),
    ]
    spec = f"jsonl:forget={forget},retain={retain}"
    if neighbour:
        splits.append(Split("neighbour", "neighbour", read_examples(Path(neighbour))))
        spec += f",neighbour={neighbour}"
    return Benchmark(spec, tuple(splits), template, refusals=read_refusals(Path(refusals)) if refusals else ())


def read_examples(path: Path) -> tuple[Example, ...]:
    """Read a file of questions and texts. Raises UserError that names file and line, also for ids that repeat."""
    items = read_items(path)
    examples = tuple(_example(item, f"{path.stem}-{item.number}") for item in items)
    _require_unique(examples, items)
    return examples


def _example(item: Item, name: str) -> Example:
    name = str(item.fields.get("id", name))
    fact = str(item.fields.get("fact", name))
    if "question" not in item.fields and "answer" not in item.fields:
        for key in ("paraphrase", "wrong"):
            if key in item.fields:
                raise UserError(f"{item.place}: {key!r} belongs to a question with its answer", FORM)
        return Example(name, "", text(item, "text", FORM), fact)
    prompt, answer = text(item, "question", FORM), text(item, "answer", FORM)
    paraphrase = text(item, "paraphrase") if "paraphrase" in item.fields else None
    wrong = texts(item, "wrong") if "wrong" in item.fields else ()
    if answer in wrong:
        raise UserError(f"{item.place}: 'wrong' holds the true answer {answer!r}", "list only false answers")
    return Example(name, prompt, answer, fact, paraphrase, wrong)


def _require_unique(examples: Sequence[Example], items: Sequence[Item]) -> None:
    seen: set[str] = set()
    for count, (item, example) in enumerate(zip(items, examples, strict=True), 1):
        if example.id in seen:
            raise UserError(f"{item.place}: item {count} repeats the id {example.id!r}")
        seen.add(example.id)
