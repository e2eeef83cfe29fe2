"""`stillknows score`: saved observations and published logs, scored without a model and without torch."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillknows import store
from stillknows.auditing import evidence
from stillknows.auditing.evidence import CellKey
from stillknows.auditing.policy import Policy
from stillknows.errors import UserError
from stillknows.json_text import json_able
from stillknows.ledger import Ledger
from stillknows.observations import load_observations, observations_digest, save_observations
from stillknows.registry import bind
from stillknows.reporting import rescore
from stillknows.reporting.schema import SCHEMA_VERSION
from stillknows.types import CONTROL, FULL, Observations

ROUGE_LOG = [
    {"gt": "the red cat", "response": "the cats", "rougeL": 0.4},
    {"gt": "a dog", "response": "a dog", "rougeL": 1.0},
    {"gt": "a dog", "response": "", "rougeL": 0},
]
PRIVLEAK_LOG = {
    "forget": [{"PPL": 1.5, "Min-40%": 4.5}, {"PPL": 0.5, "Min-40%": 2.0}],
    "retain": [{"PPL": 0.25, "Min-40%": 0.5}],
    "holdout": [{"PPL": 2.0, "Min-40%": 3.0}, {"PPL": 2.0, "Min-40%": 6.0}],
}


def tofu_table(loss: float, wrong: float, said: str = "red") -> dict[str, Any]:
    return {
        "avg_gt_loss": {"0": loss, "1": loss},
        "avg_paraphrased_loss": {"0": loss, "1": loss},
        "average_perturb_loss": {"0": [wrong, wrong], "1": [wrong, wrong]},
        "generated_text": {str(i): ["q", said, "red"] for i in range(2)},
        "rougeL_recall": {"0": 1.0, "1": 1.0},
    }


def tofu_log(loss: float = 0.5, wrong: float = 1.5, said: str = "red") -> dict[str, Any]:
    names = ("eval_log", "eval_log_forget", "eval_real_author_wo_options", "eval_real_world_wo_options")
    return {f"{name}.json": tofu_table(loss, wrong, said) for name in names}


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def write(value: Any, name: str = "log.json") -> Path:
        path = tmp_path / name
        path.write_text(json.dumps(value))
        return path

    return write


def observe(probabilities: list[float], facts: str = "aab") -> Observations:
    n = len(probabilities)
    return Observations(
        ids=tuple(str(i) for i in range(n)),
        facts=tuple(facts),
        prompts=("p",) * n,
        answers=("the red cat",) * n,
        log_probs=tuple(np.log([p, p]) for p in probabilities),
        generations=("the red cat", "the dog", None),
    )


@pytest.fixture
def audited(tmp_path: Path) -> Path:
    """What an audit leaves behind: two models, one of them the control, and two variants."""
    seen = {
        (model, variant): observe([p, p / 2, p / 4])
        for model, p in (("npo", 0.8), (CONTROL, 0.2))
        for variant in (FULL, "rtn_bits=4")
    }
    for (model, variant), observations in seen.items():
        save_observations(tmp_path / "observations" / model / variant / "forget.npz", "key", observations)
    return tmp_path


def test_saved_observations_by_hand(audited: Path) -> None:
    """Facts are averaged first: (.8 + .4)/2 and .2, then .4; ROUGE has no answer for the second fact."""
    result = rescore.saved(audited, "answer_probability,rouge_l,exact_memorisation")
    cells = {(c["subject"], c["variant"], c["metric"]): c for c in result["cells"]}
    assert len(cells) == 12
    first = cells["npo", FULL, "answer_probability"]
    assert (first["split"], first["value"], first["n"]) == ("forget", pytest.approx(0.4), 2)
    assert (first["low"], first["high"]) == (pytest.approx(0.2), pytest.approx(0.6))
    assert cells[CONTROL, "rtn_bits=4", "answer_probability"]["value"] == pytest.approx(0.1)
    assert cells["npo", FULL, "rouge_l"]["value"] == pytest.approx((1 + 1 / 3) / 2)
    assert cells["npo", FULL, "rouge_l"]["n"] == 1
    assert "observed" in cells["npo", FULL, "exact_memorisation"]["not_measured"]


def write_report(folder: Path, variant: str) -> None:
    """Write the least that is a report, of what a folder holds under one variant."""
    files = {m: folder / "observations" / m / store.slug(variant) / "forget.npz" for m in ("npo", CONTROL)}
    seen = {model: load_observations(file) for model, file in files.items()}
    subject = {"path": "", "fingerprint": "", "verdict": "UNDECIDED", "findings": [], "cells": []}
    subject |= {
        "run": None,
        "quantized": None,
        "defence": None,
        "facts": None,
        "claims": [],
        "single_facts": [],
        "depth": None,
        "leaks": [],
        "exposed": [],
        "drawn": [],
        "membership": [],
        "attacks": {},
        "variants": {variant: "UNDECIDED"},
    }
    digests = {model: {variant: {"forget": observations_digest(found)}} for model, found in seen.items() if found}
    content = {
        "schema_version": SCHEMA_VERSION,
        "stillknows": "",
        "verdict": "UNDECIDED",
        "benchmark": "",
        "splits": [{"name": "forget", "role": "forget", "examples": 3, "facts": 2}],
        "variants": [variant],
        "left_out": [],
        "out_of_reach": [],
        "metrics": ["answer_probability"],
        "placebos": {},
        "policy": json_able(asdict(Policy(gates=("answer_probability",)))),
        "subjects": [subject | {"name": model, "observations": digest} for model, digest in digests.items()],
        "repeat": {"command": "", "versions": {}},
    }
    ledger = Ledger(folder)
    for file in files.values():
        ledger.add(file)
    ledger.close(store.write_sealed(folder / "report.json", content))


def test_variants_are_named_as_in_the_report_and_older_ones_left_out(audited: Path) -> None:
    """An earlier audit's observations stay in the folder; the report says which are of this one."""
    write_report(audited, "rtn:bits=4")
    assert {cell["variant"] for cell in rescore.saved(audited, "answer_probability")["cells"]} == {"rtn:bits=4"}


def test_observations_that_were_exchanged_after_the_audit_are_seen(audited: Path) -> None:
    """Under the same key and with a digest of their own: the report says what was there when it was made."""
    write_report(audited, FULL)
    assert rescore.saved(audited, "answer_probability")["cells"]
    save_observations(audited / "observations" / "npo" / FULL / "forget.npz", "key", observe([0.01, 0.01, 0.01]))
    with pytest.raises(UserError, match=r"npo/full/forget\.npz is not what report\.json was made of\n.*`overwrite`"):
        rescore.saved(audited, "answer_probability")


def test_saved_observations_score_as_in_the_audit(audited: Path) -> None:
    metrics = {name: bind("metric", name) for name in ("answer_probability", "reference")}
    seen = {CellKey(m, FULL, "forget"): observe([p, p / 2, p / 4]) for m, p in (("npo", 0.8), (CONTROL, 0.2))}
    table = evidence.tabulate(seen, metrics, {"forget": "forget"})
    found = {c["metric"]: c for c in rescore.saved(audited, ",".join(metrics))["cells"] if c["variant"] == FULL}
    for name, cell in found.items():
        expected = evidence.mean(table, CellKey(cell["subject"], FULL, "forget"), name)
        assert not isinstance(expected, str)
        assert (cell["value"], cell["low"], cell["high"], cell["n"]) == expected
    assert found.keys() == metrics.keys()


def test_figures_of_saved_observations_are_given_the_control(audited: Path) -> None:
    result = rescore.saved(audited, "", "membership:attacks=reference:members=forget:holdouts=forget,verbmem")
    cells = {(c["subject"], c["variant"], c["metric"]): c for c in result["cells"]}
    assert cells["npo", FULL, "reference.auc"]["value"] == 0.5
    assert cells["npo", FULL, "verbmem"]["not_measured"] == "the split 'verbmem' was not measured"


def test_the_command_prints_a_table_or_json(audited: Path, cli: Callable[..., Any]) -> None:
    shown = cli("score", audited, "--metrics", "answer_probability,exact_memorisation")
    assert shown.code == 0
    header, first, second, *_ = shown.out.splitlines()
    assert header.split() == ["model", "variant", "split", "metric", "value", "low", "high", "n"]
    assert first.split() == ["control", "full", "forget", "answer_probability", "0.1", "0.05", "0.15", "2"]
    assert "not measured: " in second
    data = json.loads(cli("score", audited, "--json").out)
    assert {cell["metric"] for cell in data["cells"]} > {"answer_probability", "rouge_l"}


def run_without_torch(*arguments: object) -> str:
    script = (
        f"import sys\nsys.argv = ['stillknows', 'score', *{[str(a) for a in arguments]!r}]\n"
        "from stillknows.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout


def test_scoring_does_not_load_torch(audited: Path, save: Callable[..., Path]) -> None:
    assert "answer_probability" in run_without_torch(audited, "--figures", "forget_quality,membership")
    assert "Min-40%" in run_without_torch(save(PRIVLEAK_LOG), "--format", "muse", "--corpus", "news")


def test_muse_generations_by_hand(save: Callable[..., Path]) -> None:
    """F1 .4, 1, 0; recall 1/3, 1, 0, without stems."""
    result = rescore.muse(save({"items": ROUGE_LOG, "aggregate": {"mean_rougeL": 1.4 / 3, "max_rougeL": 1}}))
    assert result["n"] == 3
    assert result["aggregate"]["mean_rougeL"] == pytest.approx(1.4 / 3)
    assert result["aggregate"]["mean_rougeL_recall"] == pytest.approx(4 / 9)
    assert result["aggregate"]["max_rouge1"] == 1
    assert len(result["aggregate"]) == 8
    interval = result["intervals"]["mean_rougeL"]
    assert interval["low"] < interval["value"] < interval["high"]
    assert result["warnings"] == []
    assert {c["name"]: c["compared"] for c in result["recorded"]} == {"rougeL": 3, "mean_rougeL": 1, "max_rougeL": 1}


def test_scores_are_computed_and_never_read(save: Callable[..., Path], cli: Callable[..., Any]) -> None:
    log = copy.deepcopy(ROUGE_LOG)
    log[2]["rougeL"] = 0.75
    log[1]["rougeL"] = 0.9
    path = save(log)
    shown = cli("score", path, "--format", "muse", "--json")
    result = json.loads(shown.out)
    assert result["aggregate"]["mean_rougeL"] == pytest.approx(1.4 / 3)
    assert result["recorded"] == [{"name": "rougeL", "compared": 3, "disagreeing": 2, "largest_difference": 0.75}]
    assert "warning: rougeL: 2 of 3 recorded values are not what is computed here" in shown.err
    assert "0.75" in shown.err


def test_muse_privleak_by_hand(save: Callable[..., Path]) -> None:
    """A holdout value is below a forget value in one of four pairs: ¼, in MUSE's direction."""
    log = save({"scores": PRIVLEAK_LOG, "auc": {"forget_holdout_Min-40%": 0.25, "holdout_forget_Min-40%": 0.7}})
    result = rescore.muse(log, corpus="news")
    assert result["auc"]["forget_holdout_Min-40%"] == 0.25
    assert result["auc"]["holdout_forget_Min-40%"] == 0.75
    assert result["auc"]["forget_forget_PPL"] == 0.5
    assert result["auc"]["forget_retain_PPL"] == 1
    assert len(result["auc"]) == 18
    assert result["n"] == {"forget": 2, "retain": 1, "holdout": 2}
    assert result["privleak"]["value"] == pytest.approx(100 * (0.25 - 0.4772) / 0.4772)
    assert result["attacks"]["PPL"]["privleak"]["value"] == pytest.approx(-100)
    assert result["attacks"]["PPL"]["auc"]["value"] == 1
    assert result["recorded"] == [
        {"name": "auc", "compared": 2, "disagreeing": 1, "largest_difference": pytest.approx(0.05)}
    ]
    assert rescore.muse(log, corpus="books")["privleak"]["value"] == pytest.approx(100 * (0.25 - 0.5393) / 0.5393)


def test_privleak_needs_an_auc_of_the_retrained_model_that_is_known_and_not_0(save: Callable[..., Path]) -> None:
    log = {split: [{"My attack": row["PPL"]} for row in rows] for split, rows in PRIVLEAK_LOG.items()}
    result = rescore.muse(save(log), corpus="news")
    assert result["attacks"]["My attack"]["privleak"]["not_measured"].endswith("My attack")
    assert result["privleak"]["not_measured"] == "the log has no Min-40%"
    again = rescore.muse(save(log), save(log, "retrain.json"))  # its AUC is 0: forget is below all of holdout
    assert "AUC is 0" in again["attacks"]["My attack"]["privleak"]["not_measured"]


def test_bounds_without_a_finite_value_are_null(save: Callable[..., Path], cli: Callable[..., Any]) -> None:
    """In some resamples the retrained model's AUC is 0, and PrivLeak has no bound above."""
    log = copy.deepcopy(PRIVLEAK_LOG)
    log["forget"][0]["Min-40%"] = 7.0  # AUC ½ against ¼
    arguments = (save(log), "--format", "muse", "--reference", save(PRIVLEAK_LOG, "retrain.json"))
    found = json.loads(cli("score", *arguments, "--json").out)["privleak"]
    assert (found["value"], found["high"]) == (pytest.approx(100), None)
    assert cli("score", *arguments).out.splitlines()[-1].split()[2:] == ["100", f"{found['low']:.4g}", "?", "4"]


def test_muse_privleak_against_the_retrained_models_log(save: Callable[..., Path]) -> None:
    known = copy.deepcopy(PRIVLEAK_LOG) | {"forget": [{"PPL": 2.0, "Min-40%": 7.0}, {"PPL": 3.0, "Min-40%": 4.0}]}
    log, reference = save(PRIVLEAK_LOG), save(known, "retrain.json")
    result = rescore.muse(log, reference)
    assert result["privleak"]["value"] == pytest.approx(100 * (0.25 - 0.75) / 0.75)
    assert rescore.muse(log, log)["privleak"]["value"] == 0
    assert "its log or its corpus is needed" in rescore.muse(log)["privleak"]["not_measured"]


def test_tofu_by_hand(save: Callable[..., Path]) -> None:
    """P = e^−.5, its share e^−.5/(e^−.5 + 2·e^−1.5), R = e^−1 on all three splits, recall 1."""
    log = save(tofu_log())
    result = rescore.tofu(log, save(tofu_log(1.0, 0.5), "retrain.json"))
    parts = result["parts"]["geometric"]
    assert parts["retain.probability"]["value"] == pytest.approx(np.exp(-0.5))
    assert parts["world_facts.probability"]["value"] == pytest.approx(1 / (1 + 2 * np.exp(-1)))
    assert parts["real_authors.truth_ratio"]["value"] == pytest.approx(1 - np.exp(-1))
    assert len(parts) == 9
    expected = 9 / sum(1 / part["value"] for part in parts.values())
    assert result["model_utility"]["geometric"]["value"] == pytest.approx(expected)
    assert result["ks_statistic"]["geometric"]["value"] == 1
    assert result["forget_quality"]["arithmetic"]["value"] == pytest.approx(2 / 6)  # 2 of C(4, 2) orders
    assert result["n"] == {"forget": 2, "retain": 2, "real_authors": 2, "world_facts": 2}
    assert result["warnings"] == []


def test_tofu_says_what_is_missing(save: Callable[..., Path]) -> None:
    result = rescore.tofu(save({"eval_log_forget.json": tofu_table(0.5, 1.5)}))
    assert "split 'retain'" in result["model_utility"]["geometric"]["not_measured"]
    assert "retrained model" in result["forget_quality"]["geometric"]["not_measured"]
    assert rescore.text(result).count("not measured: ") == 6


def test_tofu_disagreements_are_told_per_split(save: Callable[..., Path]) -> None:
    log = tofu_log()
    log["eval_log.json"]["truth_ratio"] = {"0": float(np.exp(1.0)), "1": float(np.exp(-1.0))}  # the first upside down
    log["eval_log.json"]["gt_loss"], log["eval_log.json"]["num_token_gt"] = {"0": 2.0, "1": 1.5}, {"0": 4, "1": 3}
    result = rescore.tofu(save(log))
    found = {c["name"]: (c["compared"], c["disagreeing"]) for c in result["recorded"]}
    assert found["retain.truth_ratio"] == (2, 1)
    assert found["retain.gt_loss"] == (2, 0)
    assert len(result["warnings"]) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing"], "holds no observations of an audit"),
        (["log.json", "--format", "mus"], "'mus' is not"),
        (["missing.json", "--format", "muse"], "no file missing.json"),
        (["log.json", "--format", "muse", "--corpus", "news"], "which are not compared"),
        (["log.json", "--corpus", "news"], "--corpus names a corpus of MUSE"),
        (["log.json", "--reference", "log.json"], "whose log it is"),
        (["log.json", "--format", "tofu"], "holds none of TOFU's evaluation logs"),
        (["privleak.json", "--format", "muse", "--corpus", "news", "--reference", "privleak.json"], "both name"),
        (["privleak.json", "--format", "muse", "--reference", "log.json"], "log.json is no PrivLeak log"),
        (["privleak.json", "--format", "muse", "--reference", "fewer.json"], "not of the same texts"),
        (["tofu.json", "--format", "tofu", "--reference", "others.json"], "not of the same retain items, such as item"),
        ([".", "--metrics", "rouge"], "did you mean 'rouge_l'"),
        ([".", "--figures", "verbmen"], "no model metric named 'verbmen'; did you mean 'verbmem'"),
    ],
)
def test_bad_input_is_said_in_words(
    save: Callable[..., Path],
    cli: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments,
    words,
) -> None:
    monkeypatch.chdir(tmp_path)
    save(ROUGE_LOG)
    save(PRIVLEAK_LOG, "privleak.json")
    save(PRIVLEAK_LOG | {"holdout": PRIVLEAK_LOG["holdout"][:1]}, "fewer.json")
    save(tofu_log(), "tofu.json")
    others = tofu_log()
    for column in others["eval_log.json"].values():
        column["2"] = column.pop("1")
    save(others, "others.json")
    shown = cli("score", *arguments)
    assert shown.code == 2
    assert words in shown.err
    assert "Traceback" not in shown.err


def test_damaged_observations_are_named(audited: Path, cli: Callable[..., Any]) -> None:
    file = audited / "observations" / "npo" / FULL / "forget.npz"
    file.write_bytes(file.read_bytes()[:40])
    shown = cli("score", audited)
    assert shown.code == 2
    assert f"{file} is damaged" in shown.err


def test_model_metrics_are_listed(cli: Callable[..., Any]) -> None:
    listed = json.loads(cli("list", "model-metrics", "--json").out)["model-metrics"]
    assert {"forget_quality", "model_utility", "privleak", "verbmem", "knowmem", "membership"} <= {
        figure["name"] for figure in listed
    }


@pytest.mark.gold
@pytest.mark.parametrize("name", ["tv", "ga_klr"])
def test_published_aucs_and_privleak(shared: Path, name: str) -> None:
    """All 90, and PrivLeak of the recorded AUC."""
    path = shared / "gold" / "muse" / f"{name}_privleak.json"
    recorded = json.loads(path.read_text())["auc"]
    for corpus, retrained in (("news", 0.4772), ("books", 0.5393)):
        result = rescore.muse(path, corpus=corpus)
        assert result["auc"] == pytest.approx(recorded, abs=1e-12)
        assert list(result["auc"]) == list(recorded)
        expected = (recorded["forget_holdout_Min-40%"] - retrained) / retrained * 100
        assert result["privleak"]["value"] == pytest.approx(expected, rel=1e-12)
        assert result["privleak"]["low"] <= result["privleak"]["value"] <= result["privleak"]["high"]
    assert len(recorded) == 90
    assert result["recorded"][0]["compared"] == 90
    assert result["warnings"] == []


@pytest.mark.gold
def test_published_privleak_against_a_log(shared: Path) -> None:
    log, known = (shared / "gold" / "muse" / f"{name}_privleak.json" for name in ("tv", "ga_klr"))
    aucs = [json.loads(path.read_text())["auc"]["forget_holdout_Min-40%"] for path in (log, known)]
    found = rescore.muse(log, known)["privleak"]["value"]
    assert found == pytest.approx(100 * (aucs[0] - aucs[1]) / aucs[1], rel=1e-12)


@pytest.mark.gold
@pytest.mark.parametrize("name", ["tv_knowmem_f", "tv_knowmem_r", "ga_klr_knowmem_f"])
def test_published_rouge(shared: Path, name: str) -> None:
    path = shared / "gold" / "muse" / f"{name}.json"
    result = rescore.muse(path)
    recorded = json.loads(path.read_text())["aggregate"]
    assert result["aggregate"] == pytest.approx(recorded, abs=1e-12)
    assert len(recorded) == 8
    compared = {c["name"]: (c["compared"], c["disagreeing"]) for c in result["recorded"]}
    assert compared["rouge1_recall"] == (100, 0)
    assert result["warnings"] == []


@pytest.mark.gold
@pytest.mark.parametrize(
    ("model", "geometric", "arithmetic"),
    [("full", 0.622677363743, 0.585886035093), ("retain90", 0.613744995234, 0.575239917532)],
)
def test_published_model_utility(shared: Path, model: str, geometric: float, arithmetic: float) -> None:
    path = shared / "gold" / "tofu" / f"llama2-7b_{model}.json"
    result = rescore.tofu(path)
    assert result["model_utility"]["geometric"]["value"] == pytest.approx(geometric, abs=1e-9)
    assert result["model_utility"]["arithmetic"]["value"] == pytest.approx(arithmetic, abs=1e-9)
    assert sum(c["compared"] for c in result["recorded"]) == 5 * 817 + 217
    log = json.loads(path.read_text())["eval_log_forget.json"]
    ratios, recalls = (np.array(list(log[key].values())) for key in ("truth_ratio", "rougeL_recall"))
    forget = result["forget"]["geometric"]
    assert forget["forget_truth_ratio"]["value"] == pytest.approx(np.minimum(ratios, 1 / ratios).mean(), rel=1e-6)
    assert forget["forget_rouge"]["value"] == pytest.approx(recalls.mean(), abs=1e-12)
    assert result["warnings"] == []


@pytest.mark.gold
def test_published_forget_quality(shared: Path) -> None:
    full, retain90 = (shared / "gold" / "tofu" / f"llama2-7b_{model}.json" for model in ("full", "retain90"))
    result = rescore.tofu(full, retain90)
    assert result["ks_statistic"]["geometric"]["value"] == pytest.approx(119 / 300, abs=1e-15)
    assert result["forget_quality"]["geometric"]["value"] == pytest.approx(1.834066411e-21, rel=1e-8)
    assert result["forget_quality"]["geometric"]["n"] == 300
