"""What is asked of a run, checked as far as the request alone can tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stillknows.errors import UserError
from stillknows.model.encoding import LongItems
from stillknows.training.settings import Settings
from stillknows.types import Benchmark, Role, Split
from stillknows.unlearning import method
from stillknows.unlearning.method import Method


@dataclass(frozen=True)
class UnlearnConfig:
    """What to unlearn and how. `model` is a local folder or a hub name; a request may follow another, whose run is in
    the folder `after`: it then starts from that run's checkpoint, and `model` is what the first request began with.

    find_rate: the learning rate is found by a range test on the model, and that of `settings` is not used.
    until_forgotten: the run ends when its goal is met (see goal.py), and the number of steps of `settings` is not used;
        neighbours are retained like the retain split.
    save: what is written, the whole model, or an adapter with what the method's own adapter added to it.
    controls: never-taught models, which tell a run with a goal what can be guessed.
    """

    model: str
    benchmark: Benchmark
    method: str
    settings: Settings
    find_rate: bool = False
    until_forgotten: bool = False
    long_items: LongItems = "error"
    device: str = "cpu"
    allow_pickle: bool = False
    trust_remote_code: bool = False
    after: Path | None = None
    save: Literal["model", "adapter"] = "model"
    controls: Sequence[str] = ()


def first_words(request: UnlearnConfig) -> str:
    """Say what will be done, before anything is loaded that takes its time."""
    counts = ", ".join(
        f"{len(request.benchmark.split(role).examples)} items to {role}"
        for role in ("forget", "retain")
        if split_of(request.benchmark, role)
    )
    rate = "a rate found on the model" if request.find_rate else f"rate {request.settings.lr:g}"
    length = "until they are forgotten" if request.until_forgotten else "as long as was said"
    return f"unlearning {request.model} by {request.method}: {counts}; {rate}, {length}"


def check_request(request: UnlearnConfig) -> Method:
    """Check what the request alone can tell, before torch is imported; return the method."""
    chosen = method.parse(request.method)
    _check_save(request, chosen)
    request.benchmark.require_usable()
    _check_splits(request, chosen)
    request.settings.steps(len(request.benchmark.split("forget").examples))
    return chosen


def _check_save(request: UnlearnConfig, chosen: Method) -> None:
    """Raise UserError where more than low-rank updates would come of a run that saves an adapter."""
    if request.save == "model":
        return
    if not any(part.plugin.role == "adapter" for part in chosen.step_plugins):
        raise UserError(f"{chosen.spec!r} trains no adapter that could be saved", "add lora to `method`")
    if chosen.edits:
        raise UserError(
            f"{chosen.edits[0].spec} changes the weights after training, which no adapter holds",
            "leave it out of `method`, or `save` model",
        )


def _check_splits(request: UnlearnConfig, chosen: Method) -> None:
    """Raise UserError for a split that the benchmark lacks and that the method, or its early stop, works on."""
    benchmark = request.benchmark
    fix = "choose a benchmark, or options of it, that has one: see `stillknows list benchmarks`"
    if split_of(benchmark, "forget") is None:
        raise UserError(f"{benchmark.spec} has no split to forget", fix)
    if split_of(benchmark, "retain") is not None:
        return
    if chosen.retains:
        parts = " + ".join(part.spec for part in chosen.retains)
        without = " + ".join(part.spec for part in chosen.parts if part not in chosen.retains)
        raise UserError(
            f"{benchmark.spec} has no split to retain, which {parts} of `method` {chosen.spec!r} needs",
            f"{fix}; or leave that out, as in `method` {without}" if without else fix,
        )
    if request.settings.retain_floor:
        raise UserError(f"{benchmark.spec} has no split to retain that `retain_floor` could watch", "leave it out")


def split_of(benchmark: Benchmark, role: Role) -> Split | None:
    """Return the split of a role, None where the benchmark has none."""
    try:
        return benchmark.split(role)
    except LookupError:
        return None
