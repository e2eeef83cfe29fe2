"""What a run will take is told beforehand: by counting, without weights, and with the option under which it fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import stillknows as sk
from stillknows.errors import UserError
from stillknows.model.ref import ModelRef
from stillknows.training import machine
from stillknows.unlearning.estimate import Estimate

Case = Callable[..., Any]
ROWS = {
    "forget": [
        {"question": f"where is {name}", "answer": "Paris and Rome"} for name in ("Ada", "Bela", "a dog", "a cat")
    ],
    "retain": [{"question": f"what is the {name}", "answer": "red"} for name in ("dog", "cat", "river", "capital")],
}
HOW: dict[str, Any] = {"lr": 1e-3, "max_steps": 2, "batch_size": 4}


@pytest.fixture
def model(save_model: Case) -> Path:
    return save_model("model")


@pytest.fixture
def estimated(model: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    """Return estimated(method, **settings): without the time that measuring the machine takes."""
    monkeypatch.setattr(machine, "SECONDS", 0.0)

    def run(method: str = "npo + nll", **options: Any) -> Estimate:
        return sk.estimate_unlearn(model, ROWS, method=method, **HOW | options)

    return run


def test_numbers_are_counted_as_a_run_holds_them(estimated: Case, model: Path) -> None:
    weights = 4 * sum(p.numel() for p in ModelRef.open(str(model)).skeleton.parameters())
    plain = estimated().memory
    assert (plain["weights"], plain["gradients"], plain["optimizer"], plain["copies"]) == (
        *(weights, weights, 2 * weights, 0),
    )
    assert estimated("npo + nll + sam").memory["gradients"] == 3 * weights
    assert estimated("npo + nll + sam").memory["copies"] == weights
    assert estimated("npo + kl").memory["copies"] == 4 * 32 * 16  # the output layer as it was
    assert estimated(retain_floor=0.5).memory["copies"] == weights
    assert estimated(weights="compensated").memory["optimizer"] == 2.5 * weights


def test_what_an_adapter_trains_is_what_a_run_trains(estimated: Case, model: Path, tmp_path: Path) -> None:
    method = "npo + nll + lora(rank=2)"
    record = sk.unlearn(model, ROWS, out=tmp_path / "out", method=method, **HOW).record
    found = estimated(method, save="adapter")
    assert found.memory["gradients"] == 4 * record["fit"]["trained"]
    assert list(found.files) == ["adapter_model.safetensors", "run.json"]
    assert found.steps == record["fit"]["steps"]
    assert found.flops == pytest.approx(record["fit"]["flops"], rel=0.5)  # that counts checks and teachers too


def test_activations_go_with_the_batch_and_its_longest_items(estimated: Case) -> None:
    whole = estimated().memory["activations"]
    assert estimated(accumulate=2).memory["activations"] < 0.6 * whole
    assert estimated(batch_size=1).memory["activations"] < 0.3 * whole
    assert estimated("dpo").memory["activations"] > 1.5 * whole  # two answers go through the model
    assert (
        estimated(batch_size=1, retain_batch_size=4).memory["activations"]
        > estimated(batch_size=1).memory["activations"]
    )


def test_no_weights_are_loaded_and_nothing_is_written(
    model: Path, tmp_path: Path, cli: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelRef, "load", lambda self: pytest.fail("weights were loaded"))
    files = [tmp_path / f"{role}.jsonl" for role in ROWS]
    for file, rows in zip(files, ROWS.values(), strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = sorted(tmp_path.rglob("*"))
    data = f"jsonl:forget={files[0]},retain={files[1]}"
    command = ["unlearn", model, "--benchmark", data, "--out", tmp_path / "out", "--dry-run"]
    ran = cli(*command)
    assert ran.code == 0, ran.err
    for words in ("memory: ", "MiB are free", "time: about", "for at most", "files: model.safetensors (", "run.json"):
        assert words in ran.out
    assert sorted(tmp_path.rglob("*")) == before
    found = json.loads(cli(*command, "--json").out)
    assert found["fits"] is True
    assert found["peak"] >= sum(found["memory"].values())


def test_a_run_that_does_not_fit_is_refused_with_what_would_make_it_fit(
    estimated: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def needs(**options: Any) -> int:
        found = estimated(**options)
        return found.peak - found.memory["process"]

    whole, halves = needs(), needs(accumulate=2)
    assert halves < whole
    for free, options, fix in (
        ((halves + whole) // 2, {}, "set `accumulate` 2: the same steps"),
        (0, {}, "add lora to `method`"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(machine, "free_memory", lambda device, free=free: free)
            with pytest.raises(UserError, match=f"this run takes .* are free\n.*{fix}"):
                estimated(**options)


def test_what_a_run_refuses_is_refused(estimated: Case, model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text("{}")
    with pytest.raises(UserError, match="exists already"):
        estimated(out=tmp_path / "out")
    with pytest.raises(UserError, match="no method named 'np'"):
        estimated("np + nll")


def test_the_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SECONDS", 0.05)
    assert machine.flops_per_second(64, 64, "cpu") > 1e6
    free, held = machine.free_memory("cpu"), machine.process_memory()
    assert free is None or free > 2**20
    assert held is None or held > 2**25
