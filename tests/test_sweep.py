"""Studies: what is kept of runs and reports, and the pages that the scripts under examples/ make of it."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillknows.experiments import sweep
from stillknows.experiments.sweep import Run
from stillknows.registry import bind
from stillknows.store import read_json
from stillknows.training.settings import Settings

ROOT = Path(__file__).parents[1]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that imports a script of examples/ by name."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module


def test_chosen_settings_leave_out_the_defaults() -> None:
    assert sweep.chosen(Settings(lr=1e-5, seed=0)) == {"lr": 1e-5}
    assert sweep.chosen(Settings(lr=1e-5, seed=1, weights="bfloat16")) == {"lr": 1e-5, "seed": 1, "weights": "bfloat16"}


def test_a_finished_run_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    monkeypatch.setattr(sweep.unlearn, "unlearn", lambda request, folder, **rest: made.append(folder))
    monkeypatch.setattr(sweep.modelfiles, "fingerprint", lambda path: "same")
    benchmark, folder = bind("benchmark", "world")(), tmp_path / "run"
    folder.mkdir()
    run = Run("a", "ga", Settings(lr=1e-5))
    for again in (
        run,
        run,
        replace(run, settings=Settings(lr=2e-5)),
        replace(run, name="b", settings=Settings(lr=2e-5)),
    ):
        assert sweep.unlearn_once(again, tmp_path, benchmark, folder) == folder
    assert made == [folder, folder]


def _report() -> dict[str, Any]:
    cells = [
        {"variant": "int4", "split": "forget", "metric": "p", "value": 0.123456, "low": None, "high": 0.2, "n": 3},
        {"variant": "full", "split": "forget", "metric": "p", "not_measured": "because"},
        {"variant": "full", "split": "forget", "metric": "q", "value": 1.0, "low": 1.0, "high": 1.0, "n": 3},
    ]
    fit = {"steps": 7, "stopped": "all steps taken", "seconds": 12.3456}
    run = {"method": "ga", "settings": {"lr": 1e-5, "seed": 0, "weights": "bfloat16"}, "fit": fit}
    return {"subjects": [{"name": "a", "run": run, "cells": cells}, {"name": "original", "run": None, "cells": []}]}


def test_rows_hold_the_wanted_numbers_and_the_reasons() -> None:
    row, original = sweep.rows(_report(), [("forget", "p")], {"seed": 3})
    assert row == {
        "seed": 3,
        "model": "a",
        "run": {
            "method": "ga",
            "settings": {"lr": 1e-5, "weights": "bfloat16"},
            "steps": 7,
            "stopped": "all steps taken",
            "seconds": 12.35,
        },
        "cells": {"forget p": {"int4": [0.1235, None, 0.2], "full": "because"}},
    }
    assert original == {"seed": 3, "model": "original", "run": None, "cells": {}}
    assert sweep.value(row, "forget p", "int4") == 0.1235
    assert sweep.value(row, "forget p", "full") is None
    assert sweep.value(row, "forget q", "full") is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], "–"),
        ([None], "–"),
        ([0.5, None], "0.50"),
        ([-0.001, 0.001], "0.00"),
        ([-1.0, 0.0, 0.4], "−0.20 (−1.00 to 0.40)"),
    ],
)
def test_a_spread_is_mean_lowest_and_highest(values: list[float | None], words: str) -> None:
    assert sweep.spread(values) == words


def test_runs_of_why_are_named_and_differ(example: Any) -> None:
    why = example("why")
    key, more = list(why.key_runs(0, why.STORAGES)), list(why.more_runs(0, why.STORAGES))
    assert [run.name for run in key[:2]] == ["npo-bfloat16-1.5e-5-s0", "npo-float32-1.5e-5-s0"]
    assert len({(run.method, run.settings) for run in [*key, *more]}) == len({run.name for run in [*key, *more]})
    assert all(run.settings.seed == 2 for run in why.more_runs(2, why.STORAGES))


def test_correlation_and_its_bounds(example: Any) -> None:
    why = example("why")
    runs = np.array([f"run {i // 4}" for i in range(20)])
    surviving = np.tile([0.0, 0.3, 0.6, 1.0], 5)
    falling = why.Points(surviving, 1 - surviving, runs, np.tile(list("abcd"), 5))
    assert why.correlation(falling) == pytest.approx(-1)
    assert why.correlation_bounds(falling) == pytest.approx((-1, -1))
    mixed = falling._replace(recovery=np.where(runs == "run 0", surviving, 1 - surviving))
    low, high = why.correlation_bounds(mixed)
    assert low < why.correlation(mixed) < high
    assert np.isnan(why.correlation(falling._replace(recovery=np.ones(20))))


@pytest.mark.parametrize("name", ["why", "quantization_attack"])
def test_the_page_is_what_the_script_makes_of_the_numbers(example: Any, name: str) -> None:
    rows = read_json(ROOT / "docs" / f"{name}.json")
    assert example(name).page(rows) == (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def test_the_page_of_speeds_is_what_the_script_makes_of_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    made = importlib.import_module("perf.page").page(ROOT / "docs")
    assert made == (ROOT / "docs/speed.md").read_text(encoding="utf-8")


def test_the_published_shares(example: Any) -> None:
    """21 % and 83 % of arXiv 2410.16454, section 5, from M1 and M2 of its table 1, News and Books."""
    attack = example("quantization_attack")
    news = {  # (M1, M2) in full precision and in 4 bits
        "Target": ((58.4, 63.9), (34.2, 54.4)),
        "GA_GDR": ((0.0, 28.9), (25.0, 50.1)),
        "GA_KLR": ((14.1, 27.1), (33.8, 50.9)),
        "NPO_GDR": ((0.3, 46.1), (33.2, 51.4)),
        "NPO_KLR": ((16.6, 36.6), (34.1, 53.7)),
    }
    for place, (ours, published) in enumerate(((0, 0.21), (2, 0.83))):
        both = {name: np.add(news[name][place], attack.PUBLISHED[name][ours][:2]) for name in news}
        kept = attack.share(both["Target"], [both[name] for name in attack.AVERAGED])
        assert kept == pytest.approx(published, abs=0.005)


def test_the_fictional_folder_is_read_as_muse_and_keeps_its_people_apart(example: Any, tmp_path: Path) -> None:
    world = example("muse_world")
    world.write(tmp_path, 0)
    benchmark = bind("benchmark", f"muse:books:data={tmp_path}:subset=true")()
    texts = {
        split.name: " ".join(f"{e.prompt} {e.answer}" for e in split.examples)
        for split in (*benchmark.splits, *benchmark.training)
    }
    people = {text.split()[3] for text in read_json(tmp_path / "privleak/forget.json")}
    assert len(people) == world.PEOPLE["forget"]
    for name, text in texts.items():
        known = name in ("forget", "verbmem", "knowmem_forget", "privleak_forget")
        assert (not people.isdisjoint(text.split())) == known, name
    taught = {name: read_json(tmp_path / f"lessons/{name}.json") for name in ("original", "control")}
    assert people.isdisjoint(" ".join(taught["control"]).split())
    assert people <= set(" ".join(taught["original"]).split())
    assert all(len(item["gt"].split()) == 128 for item in read_json(tmp_path / "verbmem/forget.json"))
    world.write(tmp_path / "again", 0)
    world.write(tmp_path / "other", 1)
    forget = [(folder / "raw/forget.txt").read_text() for folder in (tmp_path, tmp_path / "again", tmp_path / "other")]
    assert forget[0] == forget[1] != forget[2]


@pytest.mark.slow
def test_the_paper_experiment_from_end_to_end(example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in small: two steps each, one method with SURE, two formats."""
    attack = example("quantization_attack")
    small = attack.ARCHITECTURE | {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    monkeypatch.setattr(attack, "ARCHITECTURE", small)
    monkeypatch.setattr(attack, "TRAINING", replace(attack.TRAINING, max_steps=2))
    monkeypatch.setattr(attack, "UNLEARNING", replace(attack.UNLEARNING, max_steps=2))
    monkeypatch.setattr(attack, "FORMATS", "full,rtn:bits=4:group=32")
    monkeypatch.setattr(example("muse_world"), "PEOPLE", {"forget": 4, "retain": 4, "holdout": 2})
    subjects = attack.made(tmp_path, 0)
    chosen = list(attack.runs(0, ["NPO_GDR"], ["SURE"]))
    rows = attack.measure(subjects, chosen, tmp_path, 0, "cpu")
    assert [row["model"] for row in rows] == ["NPO_GDR+SURE", "original", "control"]
    assert rows[0]["run"]["method"].endswith("+ sure:percentile=90")
    assert rows[0]["run"]["settings"]["lr"] == attack.LARGE_RATE
    assert sweep.value(rows[2], "suite privleak", "full") == 0.0  # the control is what PrivLeak compares with
    assert attack.measure(subjects, [], tmp_path, 0, "cpu") == rows  # what was measured before is kept
    assert "| NPO_GDR+SURE" in attack.page(rows)
