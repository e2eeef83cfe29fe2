"""An import points down only. The table below is the rule; the code is read, not run, except where noted."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import stillknows

ROOT = Path(stillknows.__file__).parent

# From the bottom up. A module may import its own layer and those below it; "/" marks a folder.
LAYERS = (
    ("__init__", "defaults", "errors", "lazy", "judgements", "types", "formatting"),
    (
        *("labels", "kinds", "arguments", "extensions", "needs", "options", "registry", "specs"),
        *("stats", "likelihood", "scoring", "progress", "json_text"),
    ),
    ("store", "checksums", "observations", "ledger"),
    ("model/",),
    ("variants/",),
    ("analysis/",),
    ("training/",),
    ("gate/",),
    ("depth/",),
    ("auditing/",),
    ("reporting/",),
    ("certifying/",),
    ("unlearning/",),
    (
        *("methods/", "methods/objectives/", "methods/steps/", "methods/edits/", "methods/recipes/"),
        *("transforms/", "transforms/compression/", "transforms/defences/", "transforms/attacks/"),
        *("metrics/", "metrics/example/", "metrics/model/", "benchmarks/"),
    ),
    ("experiments/",),
    ("results", "api/"),
    ("cli/", "pytest_plugin"),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FOLDERS = tuple(name for name in LEVEL if name.endswith("/"))
PLUGINS = next(names for names in LAYERS if "methods/" in names)
LIGHT = (
    *("errors", "types", "formatting", "kinds", "needs", "registry", "stats", "likelihood", "scoring"),
    *("store", "checksums", "observations", "ledger", "metrics", "gate", "depth.signals", "depth.outcome"),
    *("auditing.evidence", "auditing.verdict", "reporting"),
    *(f"analysis.{name}" for name in ("recovery_curve", "explain", "diagnosis_page")),
)
HEAVY = ("torch", "transformers")
AT_ONCE = (  # classes that inherit from torch's: imported by the functions that need them
    "variants.straight_through",
    "model.given",
    "variants.together",
    "variants.withheld",
    "steps.clipped_steps",
    "steps.low_rank",
)

LONGEST_MODULE, LONGEST_FUNCTION = 300, 60  # lines
LONG = {  # what is longer, with the reason
    "registry": "registering, naming and binding a plug-in are one mechanism",
    "transforms.compression.gguf_blocks": "the block types of one library share arithmetic in one order",
}


def layer_name(module: str) -> str:
    """ "stillknows.metrics.model.tofu" -> "metrics/model/", "stillknows.store" -> "store"; itself -> "__init__"."""
    path = "/".join(module.split(".")[1:])
    if not path:
        return "__init__"
    return max((f for f in FOLDERS if f"{path}/".startswith(f)), key=len, default=path)


def is_light(module: str) -> bool:
    return module.startswith(tuple(f"stillknows.{name}" for name in LIGHT))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes that can run: bodies of functions too, blocks for type checkers not."""
    yield node
    children = node.orelse if is_type_checking(node) else ast.iter_child_nodes(node)  # type: ignore[attr-defined]
    for child in children:
        yield from executed(child)


def imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """Return the full names that a module's source imports; "from stillknows import store" gives stillknows.store."""
    found: set[str] = set()
    for node in executed(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parents = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parents, *([base] if base else [])])
            found |= {f"{base}.{a.name}" if _is_module(f"{base}.{a.name}") else base for a in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return found


def _is_module(name: str) -> bool:
    path = ROOT.parent.joinpath(*name.split("."))
    return name.startswith("stillknows.") and (path.is_dir() or path.with_suffix(".py").is_file())


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}
IMPORTS = {name: imports(path.read_text(), name, path.name == "__init__.py") for name, path in MODULES.items()}


def violations(imported: dict[str, set[str]]) -> list[str]:
    """Return "a imports b: why not" for every import of the package that points up or sideways."""
    found = []
    for module, names in imported.items():
        here = layer_name(module)
        for name in sorted(n for n in names if n.split(".")[0] == "stillknows"):
            there = layer_name(name)
            if there not in LEVEL:
                found.append(f"{module} imports {name}, which is in no layer")
            elif LEVEL[there] > LEVEL[here]:
                found.append(f"{module} imports {name}, which is a layer above it")
            elif here != there and here in PLUGINS and there in PLUGINS:
                found.append(f"{module} imports {name}: plug-in folders never import one another")
            elif there in PLUGINS and here not in PLUGINS and here not in ("experiments/", "api/", "cli/"):
                found.append(f"{module} imports {name}: engines find plug-ins through the registry")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_layer(module: str) -> None:
    assert layer_name(module) in LEVEL, f"{module} is in no layer: add it to LAYERS in {Path(__file__).name}"


def test_imports_point_down() -> None:
    assert violations({m: n for m, n in IMPORTS.items() if layer_name(m) in LEVEL}) == []


def test_what_is_imported_is_declared() -> None:
    """evaluate is asked for only where lm-eval has brought it along."""
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {re.split(r"[\[<>=]", text)[0].replace("-", "_") for texts in lists for text in texts}
    known = {*sys.stdlib_module_names, "stillknows", "evaluate", "yaml"}  # yaml is pyyaml's
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    assert {name.partition(".")[0] for name in names} - known <= declared


def test_no_two_public_types_share_a_name() -> None:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.rglob("*.py")]
    names = [node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    public = [name for name in names if not name.startswith("_")]
    assert sorted({name for name in public if public.count(name) > 1}) == []


def test_no_import_cycles() -> None:
    """Modules of one layer may import one another, but not in a circle."""
    state: dict[str, str] = {}

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert state.get(module) != "open", " -> ".join((*path, module))
        if module in state:
            return
        state[module] = "open"
        for name in sorted(IMPORTS[module] & MODULES.keys() - {module}):
            if not module.startswith(f"{name}."):  # a package's modules are parts of it
                visit(name, (*path, module))
        state[module] = "done"

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("module", [m for m in MODULES if is_light(m)])
def test_scoring_imports_no_model_library(module: str) -> None:
    """Nor does anything that it imports."""
    reached, new = set(), {module}
    while new:
        reached |= new
        new = {name for known in new for name in IMPORTS.get(known, ())} - reached
    assert {n for n in reached if n.split(".")[0] in HEAVY or n == "stillknows.lazy"} == set()


def test_importing_any_module_imports_neither_torch_nor_transformers() -> None:
    """Really import them all in a fresh process: what a command line can know is refused before those seconds."""
    names = [name for name in MODULES if not name.endswith(AT_ONCE)]
    script = f"import sys, {', '.join(names)}; print(*(n for n in {HEAVY!r} if n in sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "\n"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import stillknows.auditing.audit", {"stillknows.auditing.audit"}),
        ("from stillknows import store, __version__", {"stillknows.store", "stillknows"}),
        ("def f():\n  from stillknows.training.loop import fit", {"stillknows.training.loop"}),
        ("from ...training.loop import fit", {"stillknows.training.loop"}),
        ("from . import rtn", {"stillknows.transforms.compression.rtn"}),
        ("if TYPE_CHECKING:\n  import torch\nelse:\n  import numpy", {"numpy"}),
        ("import importlib\nimportlib.import_module('stillknows.cli')", {"importlib", "stillknows.cli"}),
    ],
)
def test_the_reader_of_imports_sees(source: str, expected: set[str]) -> None:
    assert imports(source, "stillknows.transforms.compression.casts") == expected


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("stillknows.store", "stillknows.model.layers"),
        ("stillknows.metrics.example.likelihood", "stillknows.transforms.compression"),
        ("stillknows.training.loop", "stillknows.methods.objectives.likelihood"),
        ("stillknows.auditing.audit", "stillknows.metrics.example"),
    ],
)
def test_the_rule_refuses(module: str, name: str) -> None:
    assert len(violations({module: {name}})) == 1


def test_modules_and_functions_are_short() -> None:
    """What is longer has a reason in LONG, and nothing is there that need not be."""
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    found = {name.removeprefix("stillknows."): n for name, n in lengths.items() if n > LONGEST_MODULE}
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > LONGEST_FUNCTION:
                    found[f"{name.removeprefix('stillknows.')}.{node.name}"] = length
    assert found.keys() == LONG.keys(), found


@pytest.mark.parametrize("module", [m for m in MODULES if layer_name(m) not in PLUGINS and "packed." not in m])
def test_the_architecture_names_every_module(module: str) -> None:
    name = module.rpartition(".")[2]
    text = (ROOT.parent / "ARCHITECTURE.md").read_text()
    assert f"`{name}`" in text or f"`{name}/`" in text or module == "stillknows"
