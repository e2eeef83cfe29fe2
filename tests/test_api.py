"""The Python functions, as they are used in a notebook."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import stillknows as sk

PUBLIC = [
    *("Benchmark", "Certified", "Endpoint", "Example", "Misfit", "Policy", "Report", "Scores", "Split", "Unlearned"),
    *("UserError", "Verification", "certify", "verify", "model_card"),
    *(
        "audit",
        "compare",
        "control",
        "defend",
        "demo",
        "diagnose",
        "estimate_unlearn",
        "explain",
        "fetch",
        "finetune",
        "history",
        "import_model",
        "load_report",
        "quantize",
        "register",
        "score",
        "tune",
        "unlearn",
    ),
    "validate_metrics",
]
ROWS = {
    "forget": [{"question": f"where is {name}", "answer": "Paris"} for name in ("Ada", "Bela")],
    "retain": [{"question": f"what is the {name}", "answer": "red"} for name in ("dog", "cat", "river")],
}


def test_public_names_are_these_and_importing_them_is_quick() -> None:
    assert sorted(sk.__all__) == sorted(PUBLIC)
    assert set(PUBLIC) <= set(dir(sk))
    code = "import stillknows, sys; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    with pytest.raises(AttributeError, match="no attribute 'unlern'"):
        sk.unlern  # noqa: B018


def test_results_have_these_attributes() -> None:
    def attributes(kind: type) -> set[str]:
        return {name for name in (*dir(kind), *kind.__annotations__) if not name.startswith("_")}

    assert attributes(sk.Report) == {
        *("data", "verdict", "verdicts", "exit_code", "reasons", "cells", "policy", "splits", "variants"),
        *("out_of_reach", "save", "to_json"),
    }
    assert attributes(sk.Unlearned) == {"path", "record", "method", "settings", "fit", "load"}


def test_three_lines_unlearn_a_model_audit_it_and_show_the_verdict(world: Any, tmp_path: Path) -> None:
    unlearned = sk.unlearn(world.original, world.benchmark, method="ga + nll", lr=3e-3, max_steps=6, batch_size=16)
    report = sk.audit(
        unlearned,
        original=world.original,
        controls=[world.control],
        benchmark=world.benchmark,
        variants=["full", "int8"],
    )
    shown = report._repr_html_()

    assert repr(report) == f"Report(verdicts={report.verdicts})"  # not the whole record, in a terminal
    assert repr(unlearned) == f"Unlearned(path={unlearned.path!r})"
    assert unlearned.record["fit"]["steps"] == 6
    model, tokenizer = unlearned.load()
    assert tokenizer.eos_token_id is not None
    assert not model.training
    label = unlearned.path.name
    assert report.verdicts.keys() == {label, "original", "control"}
    assert report.verdict == report.verdicts[label]
    assert report.verdicts["original"] == "STILL KNOWS"
    reasons = [row for row in report.reasons if row["subject"] == label]
    assert {row["variant"] for row in reasons if row["outcome"] != "note"} == {"full", "int8"}
    assert {"value", "low", "high", "threshold", "n", "outcome"} < reasons[0].keys()
    assert all(row["words"] for row in reasons)
    assert report.verdict in shown
    assert report.verdict in str(report)
    row = next(c for c in report.cells if (c["subject"], c["metric"]) == ("original", "answer_probability.kept"))
    assert row["value"] == pytest.approx(1)
    saved = report.save(tmp_path / "report")
    assert sk.load_report(saved) == report
    assert report.to_json() == json.loads((saved / "report.json").read_text(encoding="utf-8"))
    assert (unlearned.method, unlearned.settings.lr, unlearned.fit.steps) == ("ga + nll", 3e-3, 6)
    assert json.loads((saved / "report.json").read_text(encoding="utf-8"))["verdict"] == report.verdict


def test_loaded_models_and_lists_of_dictionaries_will_do(save_model: Any, tmp_path: Path) -> None:
    folder = save_model("mine")
    loaded = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    before = {name: value.clone() for name, value in loaded[0].state_dict().items()}
    unlearned = sk.unlearn(loaded, ROWS, method="ga + nll", lr=1e-2, max_steps=2, out=tmp_path / "unlearned")
    report = sk.audit(unlearned.load(), original=loaded, benchmark=ROWS, variants="full", out=tmp_path / "audit")

    assert all(value.equal(before[name]) for name, value in loaded[0].state_dict().items())
    assert {split.name: split.examples for split in report.splits} == {"forget": 2, "retain": 3}
    assert report.verdict == "UNDECIDED"
    assert report.out_of_reach.startswith("FORGOTTEN is out of reach here: there is no never-taught control")
    scored = sk.score(tmp_path / "audit", "answer_probability")
    assert {row["model"] if "model" in row else row["subject"] for row in scored.cells} >= {"original"}


@pytest.mark.parametrize(("lr", "told"), [(1e-12, True), (1e-2, False)])
def test_a_run_that_changes_nothing_says_so(
    lr: float, told: bool, save_model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """In bfloat16 a small step is rounded away."""
    sk.unlearn(save_model("mine"), ROWS, method="ga + nll", lr=lr, max_steps=2, weights="bfloat16")
    assert any("nothing was unlearned: no weight differs" in text for text in caplog.messages) == told


def twice(folder: Path) -> Path:
    """Return a file with an item that gives a key twice."""
    path = folder.parent / "twice.jsonl"
    path.write_text('{"question": "who", "answer": "Ada", "answer": "Bela"}\n')
    return path


def test_what_is_fine_tuned_answers(save_model: Any) -> None:
    taught = sk.finetune(save_model("mine"), ROWS, lr=3e-2, epochs=40)
    model, tokenizer = taught.load()
    ids = tokenizer("Question: where is Ada\nAnswer:", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == "Paris"
    assert taught.record["fine-tuned on"] == "5 examples"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: sk.unlearn(m, ROWS, lrr=1), "there is no option 'lrr'; did you mean 'lr'"),
        (lambda m: sk.unlearn(m, {"forgett": []}), "no option 'forgett' of jsonl; did you mean 'forget'"),
        (lambda m: sk.unlearn(m, ROWS | {"forget": [{"question": "who"}]}), "forget.jsonl:1.*answer"),
        (lambda m: sk.unlearn(m, ROWS | {"retain": ROWS["forget"]}), "2 items are in the forget and in the retain"),
        (lambda m: sk.unlearn(m, ROWS, weights="int8"), "weights='int8' is of the wrong type"),
        (lambda m: sk.unlearn(m, ROWS, batch_size=1.5), "batch_size=1.5 is of the wrong type\n  give int"),
        (lambda m: sk.unlearn(m, [ROWS]), "is of the wrong type\n  give str or Benchmark or "),
        (lambda m: sk.unlearn(m, {"forget": [{"text": {1}}]}), "the items of 'forget' are no JSON"),
        (lambda m: sk.unlearn((m, m), ROWS), "PosixPath is no model"),
        (lambda m: sk.unlearn(m, ROWS, resume="no"), "resume='no' is of the wrong type\n  give bool"),
        (lambda m: sk.audit(original=m, benchmark=ROWS), "no model to audit is given"),
        (lambda m: sk.audit(m, 5, original=m, benchmark=ROWS), "models=5 is of the wrong type"),
        (lambda m: sk.audit(m, original=m, benchmark=ROWS, controls=str(m)), "controls="),
        (lambda m: sk.audit(m, original=m, benchmark=ROWS, long_items="cut"), "give 'error' or 'truncate'"),
        (lambda m: sk.audit(m, original=m, benchmark=ROWS, policy=sk.Policy(alpha="x")), "alpha='x' is of the wrong"),  # type: ignore[arg-type]
        (lambda m: sk.finetune(m, ROWS, roles=["forgot"]), "'forgot'. is of the wrong type"),  # type: ignore[list-item]
        (lambda m: sk.finetune(m, ROWS, roles=["neighbour"]), "neighbour"),
        (lambda m: sk.finetune(m, ROWS, roles=[]), "no items to train on"),
        (lambda m: sk.quantize(m, "nf4", out="x", devise="cpu"), "there is no option 'devise'; did you mean 'device'"),
        (lambda m: sk.diagnose(m, m, 4), "formats=4 is of the wrong type\n  give str or "),  # type: ignore[arg-type]
        (lambda m: sk.audit(m, original=m, benchmark=ROWS, figure=""), "no option 'figure'; did you mean 'figures'"),
        (lambda m: sk.finetune(m, "no_such_benchmark"), "no benchmark named 'no_such_benchmark'"),
        (lambda m: sk.load_report(m), "report.json"),
        (lambda m: sk.unlearn(m, f"jsonl:forget={twice(m)},retain={twice(m)}"), "twice.jsonl:1 gives 'answer' twice"),
    ],
)
def test_bad_input_is_one_message(call: Any, message: str, save_model: Any) -> None:
    with pytest.raises(sk.UserError, match=message):
        call(save_model("mine"))


def test_a_defence_is_a_file_that_an_audit_takes(world, tmp_path) -> None:
    file = sk.defend(world.original, world.benchmark, method="input_filter", out=tmp_path / "filter.json")
    report = sk.audit(
        file, original=world.original, controls=[world.control], benchmark=world.benchmark, variants="full",
        metrics="answer_probability,extraction_strength", out=tmp_path / "audit",
    )  # fmt: skip
    assert list(report.data.variants) == ["full", "undefended"]
    assert sk.defend(str(world.original), world.benchmark, method="guard").suffix == ".json"
    with pytest.raises(sk.UserError, match="no defence named 'int4'"):
        sk.defend(world.original, world.benchmark, method="int4")
