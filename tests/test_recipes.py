"""Recipes: they stand for methods that can be run, with the weights that were published."""

from __future__ import annotations

from typing import Any

import pytest

from stillknows.kinds import METHOD_KINDS
from stillknows.registry import Plugin, plugins
from stillknows.unlearning.method import parse

RECIPES = list(plugins("recipe").values())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_recipe_is_a_method(recipe: Plugin) -> None:
    method = parse(recipe.name)
    assert method.terms or method.edits
    assert all(part.plugin.kind != "recipe" for part in method.parts)


def test_a_name_stands_for_one_thing() -> None:
    """A method names objectives, steps, edits and recipes alike."""
    names = [name for kind in METHOD_KINDS for name in plugins(kind)]
    assert sorted(names) == sorted(set(names))


PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "llmu": {"ga": {"weight": 0.5}, "mismatch": {"weight": 1.0}, "kl": {"weight": 1.0}},
    "dpo_gd": {"dpo": {"beta": 0.1, "weight": 1.0}, "nll": {"weight": 1.0}},
    "altpo_gd": {"altpo": {"beta": 0.1, "weight": 1.0}, "nll": {"weight": 1.0}},
    "simnpo_gd": {"simnpo": {"beta": 4.5, "delta": 0.0, "weight": 0.125}, "nll": {"weight": 1.0}},
    "satimp_gd": {"satimp": {"beta1": 5.0, "beta2": 1.0, "weight": 1.0}, "nll": {"weight": 0.1}},
    "me_gd": {"me": {"weight": 0.1}, "nll": {"weight": 1.0}},
    "idk_ap": {"idk": {"weight": 1.0}, "ap": {"beta": 0.1, "weight": 1.0}},
    "jensun": {"jsd_refusal": {"weight": 1.0}, "jsd": {"weight": 1.0}},
    "loku": {
        "inverted_hinge": {"weight": 1.0},
        "nll": {"weight": 1.0},
        "lora": {"rank": 32, "alpha": 64.0, "names": "*", "seed": 0},
    },
    "memflex_ga": {
        "ga": {"weight": 0.4},
        "nll": {"weight": 2.0},
        "lora": {"rank": 8, "alpha": 16.0, "names": "*", "seed": 0},
        "memflex": {"similarity": 0.92, "magnitude": 6e-4},
    },
    "pdu": {
        "flattening": {"weight": 1.0},
        "nll": {"weight": 1.0},
        "dual": {"epsilon": 0.3, "eta": 1.0, "start": 50.0},
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parts_and_weights(name: str) -> None:
    assert {part.plugin.name: dict(part.options) for part in parse(name).parts} == PUBLISHED[name]


def test_options_reach_the_parts() -> None:
    """Every option of a recipe changes what it stands for."""
    for recipe in RECIPES:
        plain = [part.identity for part in parse(recipe.name).parts]
        for option, value in recipe.options.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                changed = parse(f"{recipe.name}:{option}={type(value)(value / 2) or 1}")
                assert [part.identity for part in changed.parts] != plain, f"{recipe.name}:{option}"
