"""The demo's road with tiny models, and the verdicts of the real one where `make demo` has been run."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from stillknows.experiments import demo, tiny_models
from stillknows.training.settings import Settings

REPORT = Path(__file__).parents[1] / "runs" / "demo" / "report.json"
EXPECTED = {
    "original": "STILL KNOWS",
    "control": "FORGOTTEN",
    "unlearned": "UNDECIDED",
    "npo-bfloat16": "HIDDEN",
    "npo-float32": "HIDDEN",
    "ga-collapsed": "DAMAGED",
}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    monkeypatch.setattr(demo, "ARCHITECTURE", demo.ARCHITECTURE | small)
    monkeypatch.setattr(demo, "TRAINING", replace(demo.TRAINING, max_steps=2))
    monkeypatch.setattr(demo, "SUBJECTS", {"ga": ("ga", Settings(lr=1e-3, max_steps=1))})
    monkeypatch.setattr(demo, "VARIANTS", "full,int8")


def test_the_demo_writes_a_report_of_every_model(tiny: None, tmp_path: Path) -> None:
    result = demo.run_demo(tmp_path, 0, "stillknows demo")
    assert [subject.name for subject in result.subjects] == ["ga", "original", "control"]
    assert {file.name for file in tmp_path.iterdir()} >= {"report.json", "report.html", "report.md", "models"}


def test_a_second_run_trains_nothing_and_says_the_same(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = demo.run_demo(tmp_path, 0, "stillknows demo")

    def trained_again(*_arguments: object, **_options: object) -> None:
        raise AssertionError("a model was trained again")

    monkeypatch.setattr(tiny_models, "train", trained_again)
    monkeypatch.setattr(demo.unlearn, "unlearn", trained_again)
    assert demo.run_demo(tmp_path, 0, "stillknows demo") == first


def test_another_setting_trains_again(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = demo.run_demo(tmp_path, 0, "stillknows demo")
    monkeypatch.setattr(demo, "TRAINING", replace(demo.TRAINING, lr=0.5))
    second = demo.run_demo(tmp_path, 0, "stillknows demo")
    assert first.subjects[1].fingerprint != second.subjects[1].fingerprint


def test_control_and_original_differ_in_the_forget_split_alone(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught = {}
    train = tiny_models.train

    def noted(out: Path, examples: list, *rest: object) -> object:
        taught[out.name] = {example.id for example in examples}
        return train(out, examples, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(tiny_models, "train", noted)
    result = demo.run_demo(tmp_path, 0, "stillknows demo")
    counts = {split.name: split.examples for split in result.splits}
    assert taught["control"] < taught["original"]
    assert len(taught["original"] - taught["control"]) == counts["forget"] + counts["paraphrase"]


@pytest.fixture(scope="module")
def real() -> dict[str, dict]:
    if not REPORT.is_file():
        if os.environ.get("STILLKNOWS_REQUIRE_DEMO"):
            pytest.fail("run `make demo` before the tests")
        pytest.skip(f"no {REPORT.parent}: run `make demo` first")
    return {subject["name"]: subject for subject in json.loads(REPORT.read_text())["subjects"]}


def value(subject: dict, variant: str, metric: str, split: str = "forget") -> float:
    wanted = (variant, split, metric)
    return next(c["value"] for c in subject["cells"] if (c["variant"], c["split"], c["metric"]) == wanted)


def test_the_real_demo_ends_with_the_verdicts_that_the_readme_shows(real: dict[str, dict]) -> None:
    assert {name: subject["verdict"] for name, subject in real.items()} == EXPECTED


def test_bfloat16_shows_nothing_in_full_precision_and_8_bits_and_knows_again_in_4(real: dict[str, dict]) -> None:
    subject = real["npo-bfloat16"]
    for variant in ("full", "bf16", "int8"):
        assert subject["variants"][variant] in ("FORGOTTEN", "UNDECIDED")
        assert value(subject, variant, "answer_probability.kept") <= 0.1
    assert value(subject, "fp4", "answer_probability.recovery") >= 0.5
    assert value(subject, "rtn:group=0", "answer_probability.recovery") >= 0.5


def test_float32_stays_forgotten_in_every_format_and_both_stay_useful(real: dict[str, dict]) -> None:
    for variant in demo.FORMATS.split(","):
        if variant != "full":
            assert value(real["npo-float32"], variant, "answer_probability.recovery") <= 0.1
    for name in ("npo-bfloat16", "npo-float32"):
        assert value(real[name], "full", "answer_probability.share", "retain") >= 0.95
