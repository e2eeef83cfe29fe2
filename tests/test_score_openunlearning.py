"""Logs of OpenUnlearning: scored from their items, compared with their own aggregates, refused with metric and item."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillknows.errors import UserError
from stillknows.reporting import rescore
from stillknows.reporting.rescore_openunlearning import rescore_openunlearning

Json = Any

SAID = [("the red cat", "the red cat"), ("a dog", "the cats")]  # truth, generation


def indexed(items: list[Json], aggregate: float | None = None) -> Json:
    return {"agg_value": aggregate, "value_by_index": {str(i): item for i, item in enumerate(items)}}


def likely(losses: list[Any]) -> Json:
    """Losses with their probabilities, as lists where a question has several answers."""
    return indexed([{"prob": np.exp(-np.array(x)).tolist(), "avg_loss": x} for x in losses])


def said(pairs: list[tuple[Any, Any]]) -> Json:
    return indexed([{"input": "q?", "ground_truth": truth, "generation": text} for truth, text in pairs])


def attacked(forget: list[float], holdout: list[float]) -> Json:
    sides = {"forget": forget, "holdout": holdout}
    return {side: indexed([{"score": x} for x in values]) for side, values in sides.items()} | {"agg_value": None}


def tofu_log(loss: float = 0.5) -> Json:
    log = {f"{split}_Q_A_Prob": likely([loss, loss + 1]) for split in ("forget", "retain", "ra", "wf")}
    log |= {f"{split}_Q_A_PARA_Prob": likely([loss, loss + 0.5]) for split in ("forget", "retain")}
    log |= {f"{split}_Q_A_PERT_Prob": likely([[1.0, 2.0], [2.0, 3.0]]) for split in ("forget", "retain", "ra", "wf")}
    log |= {f"{split}_Q_A_ROUGE": said(SAID) for split in ("forget", "retain", "ra", "wf")}
    log |= {f"{split}_Truth_Ratio": indexed([{"score": 0.5}, {"score": 0.5}]) for split in ("retain", "ra", "wf")}
    log |= {f"{split}_Q_A_Prob_normalised": {"agg_value": None} for split in ("ra", "wf")}
    log["forget_truth_ratio"] = {"agg_value": None}
    log["mia_min_k"] = attacked([1.0, 3.0], [2.0, 4.0])
    log["extraction_strength"] = indexed([{"score": 0.25}, {"score": 0.75}])
    return log | {name: {"agg_value": None} for name in ("model_utility", "forget_quality", "privleak")}


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def write(value: Json, name: str = "TOFU_EVAL.json") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
        return path

    return write


def values(path: Path, reference: Path | None = None) -> dict[str, float]:
    return {name: number.get("value") for name, number in rescore_openunlearning(path, reference)["values"].items()}


def test_tofu_by_hand(save: Callable[..., Path]) -> None:
    """P is e^−.5 and e^−1.5; R is e^(.5 − 1.5) and e^(1 − 2.5) against paraphrases, e^−1 twice against the answer."""
    found = values(save(tofu_log()))
    probability, recall = (np.exp(-0.5) + np.exp(-1.5)) / 2, 1 / 2
    ratios = np.array([np.exp(-1), np.exp(-1.5)])
    shares = [np.exp(-a) / (np.exp(-a) + np.exp(-b) + np.exp(-b - 1)) for a, b in ((0.5, 1), (1.5, 2))]
    assert found["forget_Q_A_Prob"] == pytest.approx(probability)
    assert found["forget_Q_A_PERT_Prob"] == pytest.approx(np.exp([-1, -2, -2, -3]).mean())
    assert found["forget_Q_A_ROUGE"] == pytest.approx(recall)
    assert found["forget_truth_ratio"] == pytest.approx(ratios.mean())
    assert found["retain_Truth_Ratio"] == pytest.approx(1 - ratios.mean())
    assert found["wf_Truth_Ratio"] == pytest.approx(1 - np.exp(-1))
    assert found["ra_Q_A_Prob_normalised"] == pytest.approx(np.mean(shares))
    assert found["extraction_strength"] == 0.5
    assert found["mia_min_k"] == 0.75  # the holdout's loss is the higher one in three of four pairs
    assert found["privleak"] == pytest.approx(100 * (0.25 - 0.5) / 0.5)
    parts = [probability, recall, 1 - ratios.mean(), *[np.mean(shares), recall, 1 - np.exp(-1)] * 2]
    assert found["model_utility"] == pytest.approx(9 / np.sum(1 / np.array(parts)))
    assert found["forget_quality"] is None


def test_a_retrained_models_log_gives_forget_quality_and_privleak(save: Callable[..., Path]) -> None:
    known = tofu_log(3.0) | {"mia_min_k": attacked([1.0, 4.0], [2.0, 3.0])}
    found = values(save(tofu_log()), save(known, "retain/TOFU_EVAL.json"))
    assert found["ks_statistic"] == 1
    assert found["forget_quality"] == pytest.approx(2 / 6)  # 2 of C(4, 2) orders
    assert found["privleak"] == pytest.approx(100 * (0.25 - 0.5) / 0.5)
    assert values(save(tofu_log()), save(tofu_log()))["privleak"] == 0


def test_muse_by_hand(save: Callable[..., Path]) -> None:
    """F1 with stems: "the cats" against "the red cat" has two of three words, 0.8."""
    log = {"forget_verbmem_ROUGE": said([("the red cat", "the cats")]), "retain_knowmem_ROUGE": said(SAID[:1])}
    result = rescore_openunlearning(save(log | {"exact_memorization": indexed([{"score": 0.5}])}, "MUSE_EVAL.json"))
    found = {name: number["value"] for name, number in result["values"].items()}
    assert found == {
        "forget_verbmem_ROUGE": pytest.approx(0.8),
        "retain_knowmem_ROUGE": 1,
        "exact_memorization": 0.5,
    }
    assert any("forget_verbmem_ROUGE: with stems; MUSE's own ROUGE has none and is 0.4" in x for x in result["notes"])


def test_answers_in_lists_are_averaged_by_item(save: Callable[..., Path]) -> None:
    log = {"forget_Q_A_PERT_ROUGE": said([(["red cat", "dog"], ["red cat", "cat"]), (["dog"], ["dog"])])}
    assert values(save(log))["forget_Q_A_PERT_ROUGE"] == pytest.approx((0.5 + 1) / 2)


def test_the_logs_own_numbers_are_compared_and_never_read(save: Callable[..., Path], cli: Callable[..., Any]) -> None:
    log = tofu_log()
    log["forget_Q_A_Prob"]["agg_value"] = 0.9
    log["forget_Q_A_Prob"]["value_by_index"]["1"]["prob"] = 0.1
    log["retain_Q_A_ROUGE"]["value_by_index"]["0"]["rougeL_f1"] = 1.0
    log["retain_Q_A_ROUGE"]["value_by_index"]["1"]["rougeL_f1"] = 0.25
    log["extraction_strength"]["agg_value"] = 0.5
    shown = cli("score", save(log), "--format", "openunlearning", "--json")
    result = json.loads(shown.out)
    recorded = {c["name"]: (c["compared"], c["disagreeing"]) for c in result["recorded"]}
    assert recorded["forget_Q_A_Prob.prob"] == (2, 1)
    assert recorded["forget_Q_A_Prob"] == (1, 1)
    assert recorded["retain_Q_A_ROUGE.rougeL_f1"] == (2, 1)
    assert recorded["extraction_strength"] == (1, 0)
    assert recorded["retain_Truth_Ratio.score"] == (2, 2)
    assert result["values"]["forget_Q_A_Prob"]["value"] == pytest.approx((np.exp(-0.5) + np.exp(-1.5)) / 2)
    assert "warning: forget_Q_A_Prob: 1 of 1 recorded values are not what is computed here" in shown.err
    assert "note: extraction_strength: the items' own scores; 1/T, here 0" in shown.err


def test_null_is_left_out_and_told(save: Callable[..., Path]) -> None:
    """As an item, as a value, as one of several answers, as an aggregate."""
    log = tofu_log()
    log["retain_Q_A_Prob"]["value_by_index"]["0"] = None
    log["forget_Q_A_Prob"]["value_by_index"]["0"] = {"prob": None, "avg_loss": None}
    log["forget_Q_A_PERT_Prob"]["value_by_index"]["0"]["avg_loss"] = [1.0, None]
    log["forget_Q_A_ROUGE"]["value_by_index"]["1"]["generation"] = None
    log["mia_min_k"]["holdout"]["value_by_index"]["0"]["score"] = None
    result = rescore_openunlearning(save(log))
    found = {name: number.get("value") for name, number in result["values"].items()}
    assert found["retain_Q_A_Prob"] == found["forget_Q_A_Prob"] == pytest.approx(np.exp(-1.5))
    assert found["forget_truth_ratio"] == pytest.approx(np.exp(-1.5))  # of the second item alone
    assert found["forget_Q_A_ROUGE"] == 1
    assert found["mia_min_k"] == 1
    assert sum("hold null and are left out" in line for line in result["warnings"]) == 5
    log["retain_Q_A_Prob"]["value_by_index"] = {"0": None}
    assert "hold no score" in rescore_openunlearning(save(log))["values"]["retain_Q_A_Prob"]["not_measured"]


def test_a_summary_is_compared_with_the_log_beside_it(save: Callable[..., Path]) -> None:
    summary = save({"extraction_strength": 0.5, "forget_Q_A_Prob": 0.9, "privleak": None}, "TOFU_SUMMARY.json")
    with pytest.raises(UserError, match=r"without items.*\n.*give TOFU_EVAL\.json"):
        rescore_openunlearning(summary)
    save(tofu_log())
    recorded = {c["name"]: c["disagreeing"] for c in rescore_openunlearning(summary)["recorded"]}
    assert (recorded["extraction_strength"], recorded["forget_Q_A_Prob"]) == (0, 1)


def test_a_folder_holds_one_log(save: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds none of"):
        rescore_openunlearning(tmp_path)
    save(tofu_log())
    assert rescore_openunlearning(tmp_path)["file"] == str(tmp_path / "TOFU_EVAL.json")
    save(tofu_log(), "MUSE_EVAL.json")
    with pytest.raises(UserError, match="name the file"):
        rescore_openunlearning(tmp_path)


@pytest.mark.parametrize("other", ["a text", None, True, 3, ["a"], {"config": {"lr": 1e-5}}])
def test_what_is_no_metric_is_left_aside(save: Callable[..., Path], other: Json) -> None:
    plain = rescore_openunlearning(save(tofu_log()))
    log = {"run_info": other, **tofu_log()}
    for table in log.values():
        if isinstance(table, dict):
            for item in table.get("value_by_index", {}).values():
                item["data of its own"] = other
    assert rescore_openunlearning(save(log))["values"] == plain["values"]


def test_what_is_missing_is_not_measured(save: Callable[..., Path]) -> None:
    log = tofu_log()
    del log["retain_Q_A_PARA_Prob"]
    result = rescore_openunlearning(save(log))
    assert "paraphrase_log_probs were not observed" in result["values"]["retain_Truth_Ratio"]["not_measured"]
    assert "paraphrase_log_probs" in result["values"]["model_utility"]["not_measured"]
    assert "retrained model" in result["values"]["forget_quality"]["not_measured"]
    assert "not measured: " in rescore.text(result)
    assert "retain_Q_A_Prob" in rescore.text(result)


def replaced(name: str, item: str, key: str, value: Json) -> Json:
    log = copy.deepcopy(tofu_log())
    log[name]["value_by_index"][item][key] = value
    return log


FAULTS = {
    "a list": ([1], "no log of OpenUnlearning"),
    "another log": ({"a": {"b": 1}}, "no log of OpenUnlearning"),
    "items a list": ({"forget_Q_A_Prob": {"value_by_index": [1]}}, "'value_by_index' is a list, not a table"),
    "item a number": ({"forget_Q_A_Prob": {"value_by_index": {"0": 1}}}, "'forget_Q_A_Prob': item 0 is a number"),
    "loss a text": (replaced("forget_Q_A_Prob", "1", "avg_loss", "1"), "item 1, 'avg_loss' is a text, not a number"),
    "loss NaN": (replaced("forget_Q_A_Prob", "1", "avg_loss", float("nan")), "item 1, 'avg_loss' is nan"),
    "no losses": (replaced("forget_Q_A_PERT_Prob", "0", "avg_loss", []), "item 0, 'avg_loss' is an empty list"),
    "text a number": (
        replaced("forget_Q_A_ROUGE", "0", "generation", 1),
        "item 0, 'generation' is a number, not a text",
    ),
    "two texts": (replaced("forget_Q_A_ROUGE", "0", "generation", ["a", "b"]), "2 generations and 1 answers"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_name_file_metric_and_item(save: Callable[..., Path], fault: str) -> None:
    log, words = FAULTS[fault]
    path = save(log)
    with pytest.raises(UserError) as error:
        rescore_openunlearning(path)
    assert str(path) in str(error.value)
    assert words in str(error.value)


def test_a_retrained_models_log_is_of_the_same_items(save: Callable[..., Path]) -> None:
    other = tofu_log()
    other["forget_Q_A_Prob"]["value_by_index"]["2"] = {"prob": 1.0, "avg_loss": 0.0}
    with pytest.raises(UserError, match="not of the same forget items, such as item 2"):
        rescore_openunlearning(save(tofu_log()), save(other, "retain/TOFU_EVAL.json"))
