"""KnowUnDo: its two scopes and their parts, and what is said about files that are wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from benchmark_contract import assert_contract

from stillknows.errors import UserError
from stillknows.registry import bind
from stillknows.types import Benchmark, Example


def make(spec: str) -> Benchmark:
    return bind("benchmark", spec)()


def rows(scope: str, part: str, count: int) -> list[dict[str, str]]:
    return [{"text": f"{scope} {part} {k}?", "labels": f"{scope} {part} answer {k}."} for k in range(1, count + 1)]


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A stand-in for both kinds: 3 and 2 questions in the unlearn scope, 4 and 1 in the retention scope."""
    for kind in ("copyright", "privacy"):
        for scope, train, val in (("unlearn", 3, 2), ("retention", 4, 1)):
            name = f"{kind} {scope}"
            write(
                tmp_path / kind / f"{scope}.json", {"train": rows(name, "train", train), "val": rows(name, "val", val)}
            )
    return tmp_path


@pytest.mark.parametrize("kind", ["copyright", "privacy"])
def test_val_is_measured_and_train_is_trained_on(folder: Path, kind: str) -> None:
    benchmark = make(f"knowundo:{kind},data={folder}")
    assert_contract(benchmark)
    assert (benchmark.spec, benchmark.template) == (f"knowundo:{kind}", "{prompt}\n\n")
    assert [(s.name, s.role, len(s.examples)) for s in benchmark.splits] == [
        ("forget", "forget", 2),
        ("retain", "retain", 1),
    ]
    assert [(s.name, s.role, len(s.examples)) for s in benchmark.training] == [
        ("forget", "forget", 3),
        ("retain", "retain", 4),
    ]
    assert benchmark.splits[0].examples == (
        Example("forget-val-1", f"{kind} unlearn val 1?", f"{kind} unlearn val answer 1.", "forget-val-1"),
        Example("forget-val-2", f"{kind} unlearn val 2?", f"{kind} unlearn val answer 2.", "forget-val-2"),
    )
    assert benchmark.training[1].examples[3] == Example(
        "retain-train-4", f"{kind} retention train 4?", f"{kind} retention train answer 4.", "retain-train-4"
    )


def test_the_template_can_be_the_tokenizers(folder: Path) -> None:
    assert make(f"knowundo:privacy,data={folder},template=chat").template == "chat"


def test_a_list_with_the_one_object_is_read_too(folder: Path) -> None:
    before = make(f"knowundo:privacy,data={folder}")
    path = folder / "privacy/unlearn.json"
    path.write_text(f"[{path.read_text()}]")
    assert make(f"knowundo:privacy,data={folder}") == before


def test_a_question_asked_twice_is_one_fact(folder: Path) -> None:
    twice = rows("x", "val", 1) * 2
    write(folder / "privacy/unlearn.json", {"train": rows("x", "train", 1), "val": twice})
    examples = make(f"knowundo:privacy,data={folder}").splits[0].examples
    assert [(e.id, e.fact) for e in examples] == [("forget-val-1", "forget-val-1"), ("forget-val-2", "forget-val-1")]


def test_one_error_names_all_files_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        make(f"knowundo:copyright,data={tmp_path}")
    assert "copyright/unlearn.json" in str(caught.value)
    assert "copyright/retention.json" in str(caught.value)


GOOD = rows("g", "train", 1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"train": GOOD}, ": 'val' is missing, empty or not a list"),
        ({"val": GOOD}, ": 'train' is missing, empty or not a list"),
        ({"train": [], "val": GOOD}, ": 'train' is missing, empty or not a list"),
        (GOOD * 2, ": 'train' is missing, empty or not a list"),
        ("text", ": 'train' is missing, empty or not a list"),
        ({"train": [*GOOD, 7], "val": GOOD}, ": train item 2: expected an object, got int"),
        ({"train": GOOD, "val": [{"text": "q"}]}, ": val item 1: 'labels' is missing, empty or not a text"),
        ({"train": GOOD, "val": [{"text": "q", "labels": " "}]}, ": val item 1: 'labels' is missing, empty"),
        ({"train": GOOD, "val": [{"question": "q", "labels": "a"}]}, ": val item 1: 'text' is missing, empty"),
    ],
)
def test_bad_items_are_named(folder: Path, value: Any, message: str) -> None:
    path = folder / "privacy/retention.json"
    write(path, value)
    with pytest.raises(UserError, match=re.escape(f"{path}{message}")):
        make(f"knowundo:privacy,data={folder}")


def test_a_file_that_is_no_json_or_no_utf8_is_named(folder: Path) -> None:
    path = folder / "privacy/unlearn.json"
    path.write_text('{"train": [')
    with pytest.raises(UserError, match=re.escape(f"{path} is not JSON")):
        make(f"knowundo:privacy,data={folder}")
    path.write_bytes('{\n"train": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match=re.escape(f"{path}:2: not UTF-8")):
        make(f"knowundo:privacy,data={folder}")


def test_the_hub_holds_the_same_files(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    asked: list[str] = []

    def download(repository: str, name: str, **_: Any) -> str:
        asked.append(f"{repository}/{name}")
        return str(folder / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert make("knowundo:copyright") == make(f"knowundo:copyright,data={folder}")
    assert asked == ["zjunlp/KnowUnDo/copyright/unlearn.json", "zjunlp/KnowUnDo/copyright/retention.json"]
