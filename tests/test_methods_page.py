"""docs/methods.md is what the registered functions say, and every published name can be typed."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from stillknows.training.objective_inputs import InputSpec
from stillknows.unlearning import method

ROOT = Path(__file__).parents[1]
PUBLISHED = (
    *("ga", "npo", "simnpo", "dpo", "idk", "altpo", "me", "ap", "llmu", "undial", "wga", "satimp", "ceu", "flat"),
    *("jensun", "pdu", "rmu", "adaptive_rmu", "lunar", "task_vector", "whp", "nll", "kl", "hidden", "quail"),
    *("sure", "memflex", "wagle", "gru", "sam", "lat", "layered", "disruption", "undo", "sophia", "lora"),
    *("ste", "floor", "influence", "robust"),
)


def test_the_page_is_made_of_the_functions() -> None:
    script = runpy.run_path(str(ROOT / "examples" / "methods_page.py"))
    assert (ROOT / "docs" / "methods.md").read_text() == script["page"](), "run python examples/methods_page.py"


def test_the_comparison_is_made_of_its_numbers() -> None:
    script = runpy.run_path(str(ROOT / "examples" / "compare_methods.py"))
    rows = json.loads((ROOT / "docs" / "compare.json").read_text())
    assert (ROOT / "docs" / "compare.md").read_text() == script["page"](rows)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_are_known_with_their_source(name: str) -> None:
    plugin = method.known()[name]
    assert plugin.source
    assert plugin.summary.endswith(".")


@pytest.mark.parametrize("plugin", method.known().values(), ids=lambda p: p.name)
def test_options_are_described(plugin) -> None:
    for option in plugin.options:
        assert f"{option}:" in (plugin.function.__doc__ or ""), f"{plugin.name} does not say what {option} is"


@pytest.mark.parametrize("spec", [name for name, p in method.known().items() if p.kind == "recipe"])
def test_recipes_are_methods(spec: str) -> None:
    found = method.parse(spec)
    assert found.terms or found.edits
    assert all(InputSpec.of(name).field for term in found.terms for name in term.plugin.needs)
