"""Published logs: every layout that is read, what becomes of it, and what is refused with file and item."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillknows.errors import UserError
from stillknows.registry import bind
from stillknows.reporting.published_logs import TOFU_SPLITS, Attacks, Generations, TofuLog, read_muse, read_tofu
from stillknows.types import Observations

Json = Any

ITEMS = [
    {"prompt": "Question: who?\nAnswer: ", "gt": "the red cat", "response": "the cats", "rougeL": 0.4},
    {"prompt": "p", "gt": "a dog", "response": "", "rougeL": 0.0, "question": "which?"},
]
VALUES = {
    "forget": [{"PPL": 1.5, "Min-40%": 3.0}, {"PPL": 0.5, "Min-40%": 1.0}],
    "retain": [{"PPL": 0.25, "Min-40%": 0.5}],
    "holdout": [{"PPL": 2.0, "Min-40%": 2.5}, {"PPL": 2.0, "Min-40%": 4.0}, {"PPL": 3.0, "Min-40%": 5.0}],
}
TABLE = {
    "avg_gt_loss": {"0": 0.5, "7": 1.0},
    "gt_loss": {"0": 1.0, "7": 3.0},
    "num_token_gt": {"0": 2, "7": 3},
    "generated_text": {"0": ["[INST] a? [/INST]", "red", "the red cat"], "7": ["b?", "dogs", "dog"]},
    "rougeL_recall": {"0": 1 / 3, "7": 1.0},
    "average_perturb_loss": {"7": [4.0], "0": [2.0, 3.0]},
    "avg_paraphrased_loss": {"0": 0.25, "7": 2.0},
    "truth_ratio": {"0": float(np.exp(0.25 - 2.5)), "7": float(np.exp(2.0 - 4.0))},
    "num_token_paraphrased": {"0": 1, "7": 2},
    "num_token_perturb": {"0": [1, 2], "7": [3]},
}


def tofu_log() -> Json:
    return {name: copy.deepcopy(TABLE) for name in TOFU_SPLITS}


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def write(value: Json, name: str = "log.json") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
        return path

    return write


def generations(path: Path) -> Generations:
    log = read_muse(path)
    assert isinstance(log, Generations)
    return log


def attacks(path: Path) -> Attacks:
    log = read_muse(path)
    assert isinstance(log, Attacks)
    return log


@pytest.mark.parametrize(
    "layout", [ITEMS, {"items": ITEMS}, {"items": ITEMS, "aggregate": {"mean_rougeL": 0.2, "model": "ga"}}]
)
def test_generations_in_every_layout(save: Callable[..., Path], layout: Json) -> None:
    log = generations(save(layout))
    assert log.seen.answers == ("the red cat", "a dog")
    assert log.seen.generations == ("the cats", "")
    assert log.seen.prompts[1] == "which?"
    assert log.seen.log_probs is None
    assert log.recorded["rougeL"].tolist() == [0.4, 0]
    assert log.aggregate == ({"mean_rougeL": 0.2} if "aggregate" in layout else {})


def test_generations_are_scored_by_the_same_figures(save: Callable[..., Path]) -> None:
    seen = generations(save(ITEMS)).seen
    assert bind("metric", "verbmem")(subject={"verbmem": seen}, control=None)["verbmem"].value == pytest.approx(20)


def first_release(rows: list[Json]) -> list[Json]:
    return [{"data_file": "x.json", "text": "…", "ppl": row} for row in rows]


@pytest.mark.parametrize(
    "layout",
    [
        VALUES,
        {"scores": VALUES, "auc": {"forget_holdout_PPL": 0.0}},
        {"forget": VALUES["forget"], "retain2": VALUES["retain"], "holdout": VALUES["holdout"]},
        {name: first_release(rows) for name, rows in VALUES.items()},
    ],
)
def test_attacks_in_every_layout(save: Callable[..., Path], layout: Json) -> None:
    log = attacks(save(layout))
    assert {name: list(columns) for name, columns in log.values.items()} == {key: ["PPL", "Min-40%"] for key in VALUES}
    assert log.values["forget"]["Min-40%"].tolist() == [3, 1]
    assert log.values["holdout"]["PPL"].tolist() == [2, 2, 3]
    assert log.auc == ({"forget_holdout_PPL": 0.0} if "auc" in layout else {})


OTHERS = ("a text", None, True, ["a", 1], {"0": 1.5})


def with_data(value: Json, other: Json) -> Json:
    """Add a key of the project's own to every table of a log, in whatever place."""
    if isinstance(value, list):
        return [with_data(part, other) for part in value]
    if isinstance(value, dict):
        return {"data of its own": other} | {key: with_data(part, other) for key, part in value.items()}
    return value


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("layout", [ITEMS, {"items": ITEMS}, {"items": ITEMS, "aggregate": {"mean_rougeL": 0.2}}])
def test_what_is_no_score_is_left_aside_in_generations(save: Callable[..., Path], layout: Json, other: Json) -> None:
    plain, more = generations(save(layout)), generations(save(with_data(layout, other)))
    assert repr(more) == repr(plain)


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("layout", [VALUES, {"scores": VALUES}, {k: first_release(v) for k, v in VALUES.items()}])
def test_what_is_no_score_is_left_aside_in_attacks(save: Callable[..., Path], layout: Json, other: Json) -> None:
    plain, more = attacks(save(layout)), attacks(save(with_data(layout, other)))
    assert repr(more) == repr(plain)


@pytest.mark.parametrize("other", OTHERS)
def test_what_is_no_score_is_left_aside_in_tofu(save: Callable[..., Path], other: Json) -> None:
    """Also behind the three texts of a generation, where some published logs hold a number."""
    log = tofu_log()
    for table in log.values():
        table["column of its own"] = other
        table["generated_text"] = {i: [*row, other, 0.5] for i, row in table["generated_text"].items()}
    assert repr(read_tofu(save({"task of its own": other, **log}))) == repr(read_tofu(save(tofu_log())))


def test_attacks_in_a_folder(save: Callable[..., Path], tmp_path: Path) -> None:
    for name, rows in (("forget", "forget"), ("retain2", "retain"), ("holdout", "holdout")):
        save(first_release(VALUES[rows]), f"out/{name}.json")
    save({"forget_forget": {"PPL": 0.5}}, "out/auc.json")
    assert attacks(tmp_path / "out").values["retain"]["PPL"].tolist() == [0.25]


@pytest.mark.parametrize("spec", ["min_k", "min_k:k=0.05", "loss"])
def test_an_attack_becomes_one_token_that_scores_minus_its_value(save: Callable[..., Path], spec: str) -> None:
    seen = attacks(save(VALUES)).observations("Min-40%")
    assert bind("metric", spec)(log_probs=seen["forget"].log_probs).tolist() == [-3, -1]


def test_tofu_by_hand(save: Callable[..., Path]) -> None:
    """Columns are joined by item, whatever their order; a loss is spread over the answer's tokens."""
    seen = read_tofu(save(tofu_log())).splits["forget"]
    assert seen.ids == ("0", "7")
    assert (seen.answers, seen.generations) == (("the red cat", "dog"), ("red", "dogs"))
    assert tokens(seen.log_probs) == [[-0.5, -0.5], [-1, -1, -1]]
    assert tokens(seen.paraphrase_log_probs) == [[-0.25], [-2, -2]]
    assert [tokens(answers) for answers in seen.wrong_log_probs or ()] == [[[-2], [-3, -3]], [[-4, -4, -4]]]
    assert seen.hits is None


def tokens(arrays: Any) -> list[list[float]]:
    return [array.tolist() for array in arrays]


def same(a: Observations, b: Observations) -> bool:
    return repr(a) == repr(b)


def test_tofu_in_every_layout(save: Callable[..., Path], tmp_path: Path) -> None:
    expected = read_tofu(save(tofu_log()))
    assert tuple(expected.splits) == ("forget", "retain", "real_authors", "world_facts")
    save(tofu_log(), "aggregated/eval_log_aggregated.json")
    for name in TOFU_SPLITS:
        save(TABLE, f"apart/{name}")
    for folder in ("aggregated", "apart"):
        found = read_tofu(tmp_path / folder).splits
        assert all(same(found[name], expected.splits[name]) for name in TOFU_SPLITS.values())
    alone = read_tofu(tmp_path / "apart" / "eval_log_forget.json")
    assert tuple(alone.splits) == ("forget",)
    lists = {key: [column[i] for i in ("0", "7")] for key, column in TABLE.items()}
    assert read_tofu(save({"eval_log.json": lists})).splits["retain"].ids == ("0", "1")


def test_tofu_without_lengths_has_one_token_per_answer(save: Callable[..., Path]) -> None:
    short = {key: column for key, column in TABLE.items() if not key.startswith("num_token")}
    log = read_tofu(save({"eval_log.json": short}))
    assert tokens(log.splits["retain"].log_probs) == [[-0.5], [-1]]
    assert "gt_loss" not in log.recorded["retain"]  # a sum over an unknown number of tokens


def test_recorded_scores_may_be_infinite(save: Callable[..., Path]) -> None:
    """A collapsed model's ratios overflow; they are compared, not used."""
    table = copy.deepcopy(TABLE) | {"truth_ratio": {"0": float("inf"), "7": float("nan")}}
    assert np.isinf(read_tofu(save({"eval_log.json": table})).recorded["retain"]["truth_ratio"][0])


def without(value: Json, *path: Any) -> Json:
    value = copy.deepcopy(value)
    inner = value
    for step in path[:-1]:
        inner = inner[step]
    del inner[path[-1]]
    return value


def replaced(value: Json, new: Json, *path: Any) -> Json:
    value = copy.deepcopy(value)
    inner = value
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = new
    return value


MUSE_FAULTS = {
    "empty list": ([], "the list is empty"),
    "no log": ({"a": 1}, "no log of MUSE that can be read"),
    "a number": (3, "no log of MUSE that can be read"),
    "items of texts": (["a"], "item 0 is a text"),
    "no answer": (without(ITEMS, 1, "gt"), "item 1 has no 'gt'"),
    "no generation": (without(ITEMS, 0, "response"), "item 0 has no 'response'"),
    "generation null": (replaced(ITEMS, None, 1, "response"), "item 1, 'response' is null, not a text"),
    "recorded text": (replaced(ITEMS, "0.4", 0, "rougeL"), "item 0, 'rougeL' is a text, not a number"),
    "recorded for some": (without(ITEMS, 1, "rougeL"), "item 1 has no 'rougeL'"),
    "aggregate list": ({"items": ITEMS, "aggregate": []}, "'aggregate' is a list"),
    "items table": ({"items": {"0": ITEMS[0]}}, "expected a list of items, got a table"),
    "no holdout": (without(VALUES, "holdout"), "there is no 'holdout'"),
    "scores list": ({"scores": []}, "expected a table of splits, got a list"),
    "empty split": (replaced(VALUES, [], "forget"), "'forget': the list is empty"),
    "empty item": (replaced(VALUES, {}, "forget", 0), "'forget': item 0 is empty"),
    "value missing": (without(VALUES, "holdout", 2, "Min-40%"), "'holdout': item 2 has no 'Min-40%'"),
    "value NaN": (replaced(VALUES, float("nan"), "forget", 1, "PPL"), "'forget': item 1, 'PPL' is nan"),
    "value infinite": (replaced(VALUES, float("inf"), "retain", 0, "PPL"), "'retain': item 0, 'PPL' is inf"),
    "value true": (replaced(VALUES, True, "forget", 0, "PPL"), "'forget': item 0, 'PPL' is true or false"),
    "value of some": (replaced(VALUES, None, "holdout", 1, "PPL"), "'holdout': item 1, 'PPL' is null, not a number"),
    "value huge": (replaced(VALUES, 10**400, "forget", 0, "PPL"), "an integer has 401 digits"),
    "no values": (replaced(VALUES, [{"text": "a"}], "retain"), "'retain': the items hold no numbers"),
    "other attacks": (replaced(VALUES, [{"PPL": 1.0}], "retain"), "do not have the same attacks"),
    "nested list": (replaced(VALUES, [{"ppl": [1]}], "retain"), "'retain': item 0 is a list"),
}


@pytest.mark.parametrize("fault", MUSE_FAULTS)
def test_muse_faults_name_file_and_item(save: Callable[..., Path], fault: str) -> None:
    log, words = MUSE_FAULTS[fault]
    path = save(log)
    with pytest.raises(UserError) as error:
        read_muse(path)
    assert str(path) in str(error.value)
    assert words in str(error.value)


LOG = tofu_log()
FORGET = "eval_log_forget.json"
TOFU_FAULTS = {
    "no log": ({"a": 1}, "holds none of TOFU's evaluation logs"),
    "a list": ([1], "holds none of TOFU's evaluation logs"),
    "column of a number": (replaced(LOG, 3, FORGET), "expected a table of columns, got a number"),
    "no losses": (without(LOG, FORGET, "avg_gt_loss"), "there is no 'avg_gt_loss'"),
    "no paraphrases": (without(LOG, FORGET, "avg_paraphrased_loss"), "there is no 'avg_paraphrased_loss'"),
    "no generations": (without(LOG, FORGET, "generated_text"), "there is no 'generated_text'"),
    "losses empty": (replaced(LOG, {}, FORGET, "avg_gt_loss"), "'avg_gt_loss' is empty"),
    "losses a text": (replaced(LOG, "x", FORGET, "avg_gt_loss"), "'avg_gt_loss' is a text, not a table"),
    "other items": (without(LOG, FORGET, "average_perturb_loss", "7"), "not of the same items, such as item 7"),
    "loss NaN": (replaced(LOG, float("nan"), FORGET, "avg_gt_loss", "7"), "item 7, 'avg_gt_loss' is nan"),
    "loss text": (replaced(LOG, "1", FORGET, "avg_gt_loss", "7"), "item 7, 'avg_gt_loss' is a text, not a number"),
    "no false answers": (replaced(LOG, [], FORGET, "average_perturb_loss", "7"), "item 7 has 0 perturbed losses"),
    "false answers short": (replaced(LOG, [1.0], FORGET, "average_perturb_loss", "0"), "1 perturbed losses and 2"),
    "false answer alone": (replaced(LOG, 1.0, FORGET, "average_perturb_loss", "0"), "is a number, not a list"),
    "no tokens": (replaced(LOG, 0, FORGET, "num_token_gt", "0"), "item 0, 'num_token_gt' is 0, not a number of tokens"),
    "half a token": (replaced(LOG, 1.5, FORGET, "num_token_gt", "0"), "is 1.5, not a number of tokens"),
    "two texts": (replaced(LOG, ["a", "b"], FORGET, "generated_text", "0"), "item 0, 'generated_text' has 2 texts"),
    "text null": (replaced(LOG, ["a", None, "b"], FORGET, "generated_text", "7"), "item 7, 'generated_text' is null"),
}


@pytest.mark.parametrize("fault", TOFU_FAULTS)
def test_tofu_faults_name_file_and_item(save: Callable[..., Path], fault: str) -> None:
    log, words = TOFU_FAULTS[fault]
    path = save(log)
    with pytest.raises(UserError) as error:
        read_tofu(path)
    assert str(path) in str(error.value)
    assert words in str(error.value)


@pytest.mark.parametrize("read", [read_muse, read_tofu])
def test_files_that_are_none(read: Callable[[Path], Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file"):
        read(tmp_path / "missing.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match=r"broken\.json is not JSON"):
        read(tmp_path / "broken.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        read(tmp_path / "empty")


@pytest.mark.gold
@pytest.mark.parametrize("model", ["full", "retain90"])
def test_published_tofu_logs_are_read_whole(shared: Path, model: str) -> None:
    log = read_tofu(shared / "gold" / "tofu" / f"llama2-7b_{model}.json")
    assert isinstance(log, TofuLog)
    sizes = {name: len(seen.ids) for name, seen in log.splits.items()}
    assert sizes == {"forget": 300, "retain": 300, "real_authors": 100, "world_facts": 117}
    assert {len(answers) for answers in log.splits["forget"].wrong_log_probs or ()} == {5}
    assert {len(answers) for answers in log.splits["world_facts"].wrong_log_probs or ()} == {3}
