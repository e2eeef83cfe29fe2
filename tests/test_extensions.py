"""Plug-ins of other packages and files are found, checked and run; a broken one is one message."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillknows import extensions, registry
from stillknows.errors import NotMeasured, UserError
from stillknows.unlearning import method
from stillknows.variants.compress import parse_variant, quantize
from stillknows.variants.variant import parse_variant as parse_chain

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "examples" / "plugin_package"
FILE = PACKAGE / "stillknows_example" / "__init__.py"
REGISTER = "from stillknows.registry import register\n\n\n"
BROKEN = {  # a file: what is said of it
    f"{REGISTER}@register('metric', role='example', source='x')\ndef m(log_prob): ...": (
        "line 4: the metric 'm' asks for 'log_prob', which nothing provides; did you mean 'log_probs'?"
    ),
    "from stillknows.registry import register\nregister('benchmark', source='x')(lambda: None)\n1 / 0": (
        "line 3: ZeroDivisionError: division by zero"
    ),
    "import sys\nsys.exit(0)": "line 2: SystemExit: 0",  # 0 would stand for a verdict
    "import no_such_module": "line 1: ModuleNotFoundError: No module named 'no_such_module'",
    "def f(:": "SyntaxError: invalid syntax",
    f"{REGISTER}@register('metric', role='example', source='x')\ndef rouge_l(answers): ...": (
        "line 4: metric 'rouge_l' is registered twice"
    ),
}


@pytest.fixture(autouse=True)
def sandbox() -> Iterator[None]:
    """Take away what a test registers."""
    registry.load_own()
    before = {kind: dict(known) for kind, known in registry._plugins.items()}
    yield
    for kind, known in before.items():
        registry._plugins[kind].clear()
        registry._plugins[kind].update(known)


def test_an_installed_package_is_found_by_its_entry_point(tmp_path: Path) -> None:
    """Installed by hand, as pip would: the package beside its metadata, with the entry points of its pyproject.toml."""
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    [(group, entries)] = project["entry-points"].items()
    metadata = tmp_path / "stillknows_example-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()))
    (tmp_path / "stillknows_example").symlink_to(PACKAGE / "stillknows_example")
    ran = subprocess.run(
        [sys.executable, "-c", "from stillknows.cli import main; main()", "list", "--json"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=True,
    )
    listed = {kind: {entry["name"] for entry in found} for kind, found in json.loads(ran.stdout).items()}
    for kind, name in (
        *(("objectives", "bounded_ascent"), ("steps", "matrices"), ("edits", "shrink"), ("recipes", "gentle")),
        *(("transforms", "ternary"), ("transforms", "blocklist"), ("transforms", "twice"), ("metrics", "first_token")),
        ("benchmarks", "primes"),
    ):
        assert name in listed[kind]
        assert len(listed[kind]) > 1


def test_a_file_of_plugins_is_run_by_an_option(cli: Callable[..., Any]) -> None:
    assert "first_token" not in cli("list", "metrics").out
    ran = cli("--plugin", FILE, "list", "metrics")
    assert ran.code == 0
    assert "first_token\n        Probability of the answer's first token" in ran.out


def test_plugins_of_the_example_do_what_they_say() -> None:
    registry.load_file(FILE)
    log_probs, mask = torch.tensor([[-1.0, -5.0, 0.0]], requires_grad=True), torch.tensor([[True, True, False]])
    loss = registry.bind("objective", "bounded_ascent(least=2)")(log_probs=log_probs, mask=mask)
    loss.sum().backward()
    assert loss.item() == 0.5
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [[0.5, 0.0, 0.0]]
    row = quantize(torch.tensor([[0.1, -1.0, 3.0, 0.0]]), parse_variant("ternary(threshold=0.5)"))
    assert row.values_OI.tolist() == [[0.0, -2.0, 2.0, 0.0]]
    scores = registry.bind("metric", "first_token")(log_probs=(np.log([0.25, 1.0]),))
    assert scores.tolist() == pytest.approx([0.25])
    parts = method.parse("gentle(least=2) + shrink(share=0.5)").parts
    assert [part.plugin.name for part in parts] == ["bounded_ascent", "nll", "matrices", "shrink"]
    masks = parts[2](weights={"m": torch.zeros(2, 2), "v": torch.zeros(2)})
    assert {name: bool(mask.all()) for name, mask in masks.items()} == {"m": True, "v": False}
    linear = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(linear.weight)
    parts[3](model=linear)
    assert linear.weight.item() == 0.5
    benchmark = registry.bind("benchmark", "primes:11")()
    variant = parse_chain("blocklist+ternary+twice")
    assert (variant.role, len(variant.chain), len(variant.defences)) == ("attack", 1, 1)
    [wording] = variant.worded(benchmark.split("forget"), benchmark).values()
    question = benchmark.split("forget").examples[0].prompt
    assert wording.examples[0].prompt == f"{question} {question}"
    rewrite = variant.defences[0](forget=benchmark.split("forget").examples, retain=())
    assert rewrite(question, "{prompt}") == ("No .", "{prompt}")
    assert benchmark.split("forget").examples[0].answer == "13"
    assert len(benchmark.split("retain").examples) == 23


@pytest.mark.parametrize("code", BROKEN)
def test_a_broken_file_is_one_message(code: str, cli: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(code)
    ran = cli("--plugin", path, "list", "metrics")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(f"stillknows: {path}")
    assert BROKEN[code] in ran.err


def test_a_missing_file_is_named(cli: Callable[..., Any], tmp_path: Path) -> None:
    ran = cli("--plugin", tmp_path / "no.py", "list")
    assert (ran.code, f"no file {tmp_path / 'no.py'}" in ran.err) == (2, True)
    (tmp_path / "notes.txt").write_text("notes")
    assert "is no Python file" in cli("--plugin", tmp_path / "notes.txt", "list").err


def test_a_broken_package_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("mine", "no_such_module", extensions.GROUP)
    monkeypatch.setattr(extensions, "packages", lambda: (entry,))
    registry.load_packages.cache_clear()
    with pytest.raises(UserError, match="the plug-ins of no_such_module cannot be loaded: ModuleNotFoundError"):
        registry.plugins("metric", "example")


FAILING = """
from stillknows.registry import register

@register("metric", source="mine", role="example")
def mine(log_probs):
    \"\"\"Fail.\"\"\"
    return {}["value"]
"""


def test_what_fails_while_it_runs_is_named(tmp_path: Path) -> None:
    """Of others alone: a fault of this package shows where it is."""
    (tmp_path / "mine.py").write_text(FAILING)
    registry.load_file(tmp_path / "mine.py")
    metric = registry.bind("metric", "mine")
    with pytest.raises(UserError, match=r"the metric mine of \S*mine\S* failed: 'value'\n  mend it, or leave it out"):
        metric(log_probs=())
    with pytest.raises(TypeError):
        registry.bind("metric", "answer_probability")(log_probs=3)


@pytest.mark.parametrize("error", [NotMeasured("too few"), UserError("give more"), MemoryError(), KeyboardInterrupt()])
def test_what_says_enough_itself_is_left_alone(error: BaseException) -> None:
    def mine(log_probs: object) -> None:
        """Fail."""
        raise error

    registry.register("metric", source="mine", role="example")(mine)
    with pytest.raises(type(error)) as raised:
        registry.bind("metric", "mine")(log_probs=())
    assert raised.value is error
