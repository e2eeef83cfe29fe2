"""The pytest plug-in, run by pytest itself."""

from __future__ import annotations

import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import stillknows as sk
import stillknows.auditing.audit  # here, since pytester takes back what a run imports, and numpy loads once
from stillknows.registry import load_own

pytest_plugins = ["pytester"]
PLUGIN = "stillknows.pytest_plugin"
ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(pytester: pytest.Pytester) -> Any:
    """Return run(test): how pytest with the plug-in ends on a file that holds this."""

    def go(test: str, *arguments: str) -> pytest.RunResult:
        pytester.makepyfile(test_mine=test)
        return pytester.runpytest_inprocess("-p", PLUGIN, "--strict-markers", *arguments)

    return go


@pytest.fixture
def audits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What `sk.audit` is called with; it finds everything forgotten."""
    calls: list[Any] = []

    def audit(*models: Any, **options: Any) -> Any:
        calls.append((models, options))
        return SimpleNamespace(verdict="FORGOTTEN")

    monkeypatch.setattr(sk, "audit", audit, raising=False)
    return calls


def test_the_package_brings_the_plug_in() -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert points["pytest11"] == {PLUGIN: PLUGIN}  # named like the module, so that -p may name it as well


def test_nothing_heavy_is_imported_until_it_is_used(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import sys
        def test_nothing_was_imported():
            heavy = {"numpy", "torch", "transformers", "typer", "jinja2", "pydantic", "scipy"}
            assert not heavy & set(sys.modules)
            assert {name for name in sys.modules if name.startswith("stillknows.")} == {"stillknows.pytest_plugin"}
    """)
    pytester.runpytest_subprocess("-p", PLUGIN).assert_outcomes(passed=1)


def test_a_model_that_knows_fails_its_test_in_the_words_of_the_report(world: Any, run: Any) -> None:
    """And one of which that is demanded passes; a second run measures nothing again."""
    load_own()  # pytester takes back what a run imports, and plug-ins register once
    test = f"""
        import pytest
        pytestmark = pytest.mark.stillknows_audit(
            original={str(world.original)!r}, controls=[{str(world.control)!r}], benchmark={world.benchmark.spec!r},
            variants="full", metrics="answer_probability,extraction_strength", placebos=0)
        def test_it_is_gone(stillknows_audit):
            stillknows_audit({str(world.original)!r})
        @pytest.mark.stillknows_audit(verdict=["STILL KNOWS", "HIDDEN"])
        def test_it_is_known(stillknows_audit):
            assert stillknows_audit({str(world.original)!r}).exit_code == 3
    """
    first = run(test)
    first.assert_outcomes(passed=1, failed=1)
    first.stdout.fnmatch_lines(
        [
            "audited-original is STILL KNOWS. Demanded: FORGOTTEN.",
            "  full: answer_probability on forget: keeps * of the knowledge*",
            "see *d/stillknows/test_mine-py-test_it_is_gone-*/report.html",
        ]
    )
    assert "Traceback" not in first.stdout.str()
    observed = sorted(Path.cwd().rglob("observations/**/*.npz"))
    before = [file.stat().st_mtime_ns for file in observed]
    assert len(observed) > 4
    run(test).assert_outcomes(passed=1, failed=1)
    assert [file.stat().st_mtime_ns for file in observed] == before


def test_the_nearest_marker_wins_and_the_call_before_it(run: Any, audits: list[Any]) -> None:
    run("""
        import pytest
        pytestmark = pytest.mark.stillknows_audit("far", original="o", variants="full", device="cpu")
        @pytest.mark.stillknows_audit("near", variants="quick")
        def test_marked(stillknows_audit):
            stillknows_audit(device="cuda")
        def test_called(stillknows_audit):
            stillknows_audit("a", "b", out="mine", overwrite=False)
    """).assert_outcomes(passed=2)
    marked, called = audits
    out = marked[1].pop("out")
    assert marked == (("near",), {"original": "o", "variants": "quick", "device": "cuda", "overwrite": True})
    assert out.name.startswith("test_mine-py-test_marked-")
    assert called[0] == ("a", "b")
    assert (called[1]["out"], called[1]["overwrite"]) == (Path("mine"), False)


def test_what_is_wrong_is_one_message(run: Any) -> None:
    result = run("""
        def test_no_model(stillknows_audit):
            stillknows_audit(original="o", benchmark="world")
        def test_no_verdict(stillknows_audit):
            stillknows_audit("m", original="o", benchmark="world", verdict="GONE")
    """)
    result.assert_outcomes(failed=2)
    assert "During handling" not in result.stdout.str()
    result.stdout.fnmatch_lines(["stillknows cannot audit: no model to audit is given", "*'GONE' names no verdict*"])


def test_without_a_cache_the_folder_is_a_temporary_one(run: Any, audits: list[Any]) -> None:
    run("def test_it(stillknows_audit): stillknows_audit('m')", "-p", "no:cacheprovider").assert_outcomes(passed=1)
    assert "test_it" in str(audits[0][1]["out"])


def test_the_example_is_collected_and_its_workflow_runs_it(pytester: pytest.Pytester) -> None:
    example = ROOT / "examples" / "ci"
    pytester.makepyfile(test_forgotten=(example / "test_forgotten.py").read_text())
    result = pytester.runpytest_inprocess("-p", PLUGIN, "--strict-markers", "--collect-only", "-q")
    result.stdout.fnmatch_lines(["*test_nobody_gets_the_facts_back", "4 tests collected*"])
    steps = yaml.safe_load((example / "forgotten.yml").read_text())["jobs"]["audit"]["steps"]
    assert any(step.get("run") == "pytest test_forgotten.py" for step in steps)
    assert all(set(step) & {"run", "uses"} for step in steps)
