"""What a request to unlearn means where method, learning rate or length are not said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from stillknows import defaults
from stillknows.training.settings import Settings
from stillknows.types import Benchmark, Example
from stillknows.unlearning import exchanged_answers
from stillknows.unlearning import method as methods

LENGTHS = ("epochs", "max_steps", "schedule", "forget_below")  # settings that say when a run ends


class Choice(NamedTuple):
    """Method and settings of a request, and what is found on the model: see UnlearnConfig."""

    method: str
    settings: Settings
    find_rate: bool
    until_forgotten: bool


def choose(benchmark: Benchmark, method: str | None, given: Mapping[str, Any]) -> Choice:
    """Return what is meant by a method, or none, and by the settings that are given.

    Where guesses are known (questions to forget, with other answers that could have been true, and items to retain), a
    rate that is not given is found on the model, and a run whose length is not given ends when its goal is met. Else
    they are those of `defaults` and `Settings`. Settings of 0 that switch something off count as not given.
    """
    can_guess = has_guesses(benchmark)
    chosen = method or (defaults.METHOD if can_guess else defaults.TEXT_METHOD)
    can_aim = can_guess and bool(methods.parse(chosen).terms)
    aims = can_aim and not any(given.get(name) for name in LENGTHS)
    settings = Settings(**{"lr": defaults.LR, "compute": "auto" if aims else "float32", **given})
    return Choice(chosen, settings, can_aim and "lr" not in given, aims)


def has_guesses(benchmark: Benchmark) -> bool:
    """Tell whether it is known what guesses the answers to forget could be, and what must stay."""
    splits = (*benchmark.training, *benchmark.splits)
    forget = next((split.examples for split in splits if split.role == "forget"), ())
    retain = next((split.examples for split in splits if split.role == "retain"), ())
    if not forget or not retain or any(not example.prompt for example in forget):
        return False
    kept: list[Example] = [example for example in retain if example.prompt]
    return all(exchanged_answers.pools(forget, kept))
