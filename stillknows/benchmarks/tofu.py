"""TOFU (arXiv 2401.06121): 200 fictitious authors, 20 questions each; 1, 5 or 10 % of the authors are forgotten."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from stillknows.benchmarks.files import Item, located, read_items, read_lines, require_count, spread, text, texts
from stillknows.errors import UserError
from stillknows.registry import Limits, register
from stillknows.types import Benchmark, Decoding, Example, Split

REPOSITORY = "locuslab/TOFU"
QUESTIONS = 4000
RETAIN, AUTHORS, WORLD = "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed"
REFUSALS = "idontknow"
TASK, TASKS = "task_id", 10  # of files that hold several requests, one after another
PUBLISHED = {RETAIN: 400, AUTHORS: 100, WORLD: 117}
DECODING = Decoding(new_tokens=200)


@register("benchmark", source="arXiv 2401.06121", version=2)
def tofu(
    *,
    split: Literal["forget01", "forget05", "forget10"] = "forget10",
    data: str | None = None,
    retain: int | None = None,
    subset: bool = False,
    task: Annotated[int, Limits(1)] = 1,
) -> Benchmark:
    """TOFU from a folder with its JSON files, or from the hub.

    Trains on forget10.json and its complement retain90.json. Measures forget10_perturbed.json ("forget") and
    retain_perturbed.json ("retain"), in which each answer has a paraphrase and five false forms, and, as utility,
    real_authors_perturbed.json and world_facts_perturbed.json, with three false answers each. Where a *_perturbed file
    is missing, "forget" and "retain" are measured on the items that are trained on, "real_authors" and "world_facts"
    not at all, and the figures that need them say that they were not measured. Refusals come from idontknow.jsonl.

    Files of arXiv 2410.08109 hold up to ten requests that follow one another, told apart by "task_id": forget10.json
    has 3,600 items. One of them is forgotten; those after it are kept, with retain10.json (or retain50.json, or
    retain90.json) where that is there; those before it are neither.

    Args:
        split: which share of the authors is forgotten; the retain split is its complement.
        data: folder that holds forget10.json, retain90.json and so on; None downloads them.
        retain: how many items of the retain set to train on, and at most to measure, spread evenly; None for all.
        subset: allow files that hold fewer or more items than were published under their names.
        task: which of several requests is to be forgotten, from 1; after the first, start from the run before.

    Raises UserError that names every missing file, or the file and the line.
    """
    share = int(split.removeprefix("forget"))
    several = data is not None and _has_tasks(Path(data) / f"{split}.json")
    if task > 1 and not several:
        raise UserError(f"tofu: task={task}, but {split}.json holds one request", "leave task out")
    complement = f"retain{100 - (min(TASKS * share, 90) if several else share):02d}"
    count, probe = QUESTIONS * share // 100, f"{split}_perturbed"
    published = {split: count, complement: QUESTIONS - count, probe: count} | PUBLISHED
    wanted = {name: (f"{name}.json",) for name in published} | {REFUSALS: (f"{REFUSALS}.jsonl",)}
    optional = wanted.keys() - ({split} if several else {split, complement})
    paths = located("TOFU", wanted, repository=REPOSITORY, data=data, optional=optional)

    def read(file: str, name: str) -> tuple[Example, ...]:
        if several and file in (split, probe):
            return _examples(paths[file], name, None if subset else count, lambda number: number == task)
        return _examples(paths[file], name, None if subset or several else published[file])

    kept = read(complement, complement) if complement in paths else ()
    if several:
        kept += _examples(paths[split], f"{split}-later", None, lambda number: number > task)
    if not kept:
        raise UserError(f"TOFU: nothing is kept with task={task}: {complement}.json is missing in {data}", "add it")
    training = (Split("forget", "forget", read(split, split)), Split("retain", "retain", spread(kept, retain)))
    return Benchmark(
        f"tofu:{split}:task={task}" if several else f"tofu:{split}",
        _measured(paths, training, read, split, retain),
        training=training,
        figures=("forget_quality", "model_utility"),
        refusals=tuple(read_lines(paths[REFUSALS])) if REFUSALS in paths else (),
    )


def _measured(
    paths: Mapping[str, Path],
    training: tuple[Split, Split],
    read: Callable[[str, str], tuple[Example, ...]],
    split: str,
    limit: int | None,
) -> tuple[Split, ...]:
    probe = f"{split}_perturbed"
    forgotten = read(probe, split) if probe in paths else training[0].examples
    kept = spread(read(RETAIN, "retain"), limit) if RETAIN in paths else training[1].examples
    splits = [Split("forget", "forget", forgotten, None, DECODING), Split("retain", "retain", kept, None, DECODING)]
    for file, name in ((AUTHORS, "real_authors"), (WORLD, "world_facts")):
        if file in paths:
            splits.append(Split(name, "utility", read(file, name), None, DECODING))
    return tuple(splits)


def _has_tasks(path: Path) -> bool:
    """Tell whether a file holds several requests, one after another."""
    return path.is_file() and TASK in read_items(path)[0].fields


def _of_tasks(items: Sequence[Item], wanted: Callable[[int], bool]) -> list[Item]:
    """Return the items whose "task_id", a whole number from 1, is wanted."""
    numbers = [str(item.fields.get(TASK)) for item in items]
    for item, number in zip(items, numbers, strict=True):
        if not number.isdecimal():
            raise UserError(f"{item.place}: {TASK!r} is {item.fields.get(TASK)!r}, not the number of a request")
    return [item for item, number in zip(items, numbers, strict=True) if wanted(int(number))]


def _examples(
    path: Path, name: str, published: int | None, wanted: Callable[[int], bool] | None = None
) -> tuple[Example, ...]:
    items = read_items(path) if wanted is None else _of_tasks(read_items(path), wanted)
    if published is not None:
        require_count(path, items, published)
    return tuple(_example(item, f"{name}-{item.number}") for item in items)


def _example(item: Item, name: str) -> Example:
    return Example(
        name,
        text(item, "question"),
        text(item, "answer"),
        name,
        text(item, "paraphrased_answer") if "paraphrased_answer" in item.fields else None,
        texts(item, "perturbed_answer") if "perturbed_answer" in item.fields else (),
    )
