"""RWKU's result files: scored from predictions, compared with their own numbers, refused with file and item."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillknows.errors import UserError
from stillknows.reporting import rescore
from stillknows.reporting.rescore_rwku import READERS, recall, rescore_rwku

Json = Any


def probe(level: str, answer: str, prediction: str) -> Json:
    return {"level": level, "answer": answer, "prediction": prediction, "subject": "A", "query": "q", "type": "t"}


PROBES = [probe("1", "the red cat", "The red dog"), probe("1", "Rome", "NOANSWER"), probe("2", "Rome", "Rome")]
MIA = {"loss": [-1.0, -2.0], "zlib": [-0.1, -0.3], "mink++_0.2": [0.5, 1.5], "mink_0.1": [float("nan"), -1.0]}
FILES: dict[str, Json] = {
    "forget": {"level_1_rouge_l_r": 1 / 6, "results": [*PROBES, probe("3", "Rome", "In Rome")]},
    "neighbor": {"level_2_rouge_l_r": 0.5, "level_1_rouge": {"rouge-l": {"r": 0}}, "results": PROBES},
    "mmlu": {"acc": 0.5, "results": [{"answer": 1, "prediction": 1}, {"answer": 0, "prediction": 3}]},
    "bbh": {"EM": 0.5, "results": [{"answer": "(A)", "prediction": "a."}, {"answer": "True", "prediction": "False"}]},
    "truthful": {"MC1": 0.5, "MC2": 0.4, "results": [{"MC1": 1.0, "MC2": 0.5}, {"MC1": 0.0, "MC2": 0.3}]},
    "triviaqa": {"EM": 0.5, "F1": 0.75, "results": [
        {"answers": ["the Nile", "River Nile"], "prediction": "river Nile!"},
        {"answers": ["Paris"], "prediction": "Paris, a city of light"},
    ]},
    "forget_mia": {"loss": -1.5, "zlib": -0.2, "mink20": 1.0, "results": MIA},
    "retain_mia": {"loss": -1.5, "zlib": -0.2, "mink20": 1.0, "results": MIA},
    "fluency": {"entropy": 1.5, "results": [{"instruction": "i", "prediction": "one two three"}]},
}  # fmt: skip
EXPECTED = {
    "forget.level_1_rouge_l_r": 1 / 6, "forget.level_2_rouge_l_r": 1, "forget.level_3_rouge_l_r": 1,
    "neighbor.level_1_rouge_l_r": 1 / 6, "neighbor.level_2_rouge_l_r": 1, "mmlu.acc": 0.5, "bbh.EM": 0.5,
    "truthful.MC1": 0.5, "truthful.MC2": 0.4, "triviaqa.EM": 0.5, "triviaqa.F1": (1 + 2 / 5) / 2,
    "forget_mia.loss": -1.5, "forget_mia.zlib": -0.2, "forget_mia.mink20": 1, "retain_mia.loss": -1.5,
    "retain_mia.zlib": -0.2, "retain_mia.mink20": 1, "fluency.entropy": 1 / 3,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, log in FILES.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(log))
    return tmp_path


def test_every_file_by_hand(folder: Path) -> None:
    """ "The red dog" has "red" of three words as they are written; H₂ of two bigrams is one bit, H₃ of one nothing."""
    assert READERS.keys() == FILES.keys()
    result = rescore_rwku(folder)
    assert {name: number["value"] for name, number in result["values"].items()} == pytest.approx(EXPECTED)
    disagreeing = {c["name"] for c in result["recorded"] if c["disagreeing"]}
    assert disagreeing == {"neighbor.level_2_rouge_l_r", "triviaqa.F1", "fluency.entropy"}
    assert len(result["recorded"]) == 15
    assert len(result["warnings"]) == 3
    assert any("metric rouge_l:score=recall:stemmer=false gives 0.333333" in note for note in result["notes"])
    assert "mmlu.acc" in rescore.text(result)


def test_a_file_alone(folder: Path, cli: Callable[..., Any]) -> None:
    shown = cli("score", folder / "mmlu.json", "--format", "rwku", "--json")
    assert json.loads(shown.out)["values"].keys() == {"mmlu.acc"}
    assert cli("score", folder / "mmlu.json", "--format", "rwku", "--reference", folder).code == 2


@pytest.mark.parametrize(
    ("answer", "prediction", "expected"),
    [  # what the package rouge 1.0.1 gives
        ("U.S. dog Cat a dog is, Cat", "dog on cat cat cat the is, on", 1 / 3),
        ("on is, on Cat U.S. on U.S. a the", "Cat red. cat a dog a the", 3 / 7),
        ("on the is, U.S. is, red. red. is, Cat", "Cat is, cat red. Cat on is, a the Cat a on", 4 / 7),
        ("cat is, a Cat the is, Cat Cat cat", "the on Cat", 0.4),
        ("Rome", ".", 0),
    ],
)
def test_recall_is_that_of_the_published_package(answer: str, prediction: str, expected: float) -> None:
    assert recall(answer, prediction) == pytest.approx(expected)


FAULTS = {
    "no log": ("forget.json", [1], "forget.json is no result file of RWKU"),
    "another name": ("other.json", FILES["mmlu"], "is not called as a result file of RWKU"),
    "no prediction": ("forget.json", {"results": [{"level": "1", "answer": "a"}]}, "item 0 has no 'prediction'"),
    "null": ("neighbor.json", {"results": [probe("1", "a", None)]}, "item 0, 'prediction' is null, not a text"),
    "answers": ("triviaqa.json", {"results": [{"answers": [1], "prediction": "a"}]}, "item 0, 'answers' is a number"),
    "no attack": ("forget_mia.json", {"results": {"loss": [1.0]}}, "'results' has no 'zlib'"),
    "a list": ("forget_mia.json", {"results": [1.0]}, "'results' is a list, not a table of scores"),
    "NaN": ("mmlu.json", {"results": [{"answer": 0, "prediction": float("nan")}]}, "'prediction' is nan"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_name_file_and_item(tmp_path: Path, fault: str) -> None:
    name, log, words = FAULTS[fault]
    (tmp_path / name).write_text(json.dumps(log))
    with pytest.raises(UserError) as error:
        rescore_rwku(tmp_path / name)
    assert name in str(error.value)
    assert words in str(error.value)


def test_a_folder_without_results(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds none of RWKU's result files"):
        rescore_rwku(tmp_path)
