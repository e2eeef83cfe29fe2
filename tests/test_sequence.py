"""Requests that follow one another: where they start, what their records say, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stillknows.checksums import file_digest

Case = Callable[..., Any]
FIRST = [("where is Ada", "Paris"), ("who is in the river", "the green cat")]
SECOND = [("what is the colour of the dog", "red"), ("who is in Paris", "a blue dog")]
RETAIN = [("where is Bela", "Rome"), ("what is the colour of the cat", "blue")]


@pytest.fixture
def asks(cli: Case, tmp_path: Path) -> Case:
    """Return asks(model, out, forget, retain, *options): unlearn two steps."""

    def write(name: str, items: Sequence[tuple[str, str]]) -> Path:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in items))
        return path

    def run(model: Path, out: Path, forget: Sequence[Any], retain: Sequence[Any] = RETAIN, *options: object) -> Any:
        files = f"forget={write(f'{out.name}-f', forget)},retain={write(f'{out.name}-r', retain)}"
        few = ["--steps", 2, "--batch-size", 2, "--lr", 0.01]
        return cli("unlearn", model, "--benchmark", f"jsonl:{files}", "--out", out, *few, *options)

    return run


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def test_a_request_starts_from_the_checkpoint_of_the_one_before(save_model: Case, asks: Case, tmp_path: Path) -> None:
    model, first, second, direct = save_model("model"), *(tmp_path / name for name in ("first", "second", "direct"))
    assert asks(model, first, FIRST).code == 0
    ran = asks(model, second, SECOND, RETAIN, "--after", first)
    assert ran.code == 0, ran.err
    assert asks(first, direct, SECOND).code == 0
    chained, same = (load_file(folder / "model.safetensors") for folder in (second, direct))
    assert all(torch.equal(chained[name], same[name]) for name in same)
    assert record(second)["plan"]["model"] == record(direct)["plan"]["model"]


def test_records_are_chained_and_add_up(save_model: Case, asks: Case, tmp_path: Path) -> None:
    model, folders = save_model("model"), [tmp_path / name for name in ("a", "b", "c")]
    before: list[object] = []
    for folder, forget in zip(folders, (FIRST, SECOND, [("who is Ada", "a cat")]), strict=True):
        assert asks(model, folder, forget, RETAIN, *before).code == 0
        before = ["--after", folder]
    a, b, c = (record(folder) for folder in folders)
    assert [r["request"]["number"] for r in (a, b, c)] == [1, 2, 3]
    assert a["request"]["original"] == a["plan"]["model"] == c["request"]["original"] != c["plan"]["model"]
    assert a["request"]["earlier"] == []
    assert [e["benchmark"] for e in c["request"]["earlier"]] == [a["benchmark"], b["benchmark"]]
    assert [e["record"] for e in c["request"]["earlier"]] == [file_digest(f / "run.json") for f in folders[:2]]
    assert len(c["request"]["forgotten"]) == 1
    assert len(a["request"]["forgotten"]) == 2
    for name in ("seconds", "tokens", "forward_tokens", "flops"):
        assert c["request"]["total"][name] == pytest.approx(sum(r["fit"][name] for r in (a, b, c)))
        assert a["fit"][name] > 0
    assert "Paris" not in json.dumps(c["request"])


def refused(ran: Any, *words: str) -> None:
    assert (ran.code, ran.out) == (2, ""), ran
    assert "Traceback" not in ran.err
    assert all(word in ran.err for word in words), ran.err


def test_what_was_forgotten_cannot_be_retained_later(save_model: Case, asks: Case, tmp_path: Path) -> None:
    model, first, second, third = save_model("model"), *(tmp_path / name for name in ("first", "second", "third"))
    asks(model, first, FIRST)
    asks(model, second, SECOND, RETAIN, "--after", first)
    ran = asks(model, third, [("who is Ada", "a cat")], [*RETAIN, FIRST[1]], "--after", second)
    refused(ran, "1 items of the retain split were forgotten by an earlier request", "by request 1")
    assert not third.exists()


def test_a_run_on_another_model_is_refused(save_model: Case, asks: Case, tmp_path: Path) -> None:
    first = tmp_path / "first"
    asks(save_model("model"), first, FIRST)
    ran = asks(save_model("other", seed=1), tmp_path / "second", SECOND, RETAIN, "--after", first)
    refused(ran, f"{first} was unlearned from another model", str(tmp_path / "model"))


def test_a_folder_without_a_run_is_refused(save_model: Case, asks: Case, tmp_path: Path) -> None:
    model = save_model("model")
    ran = asks(model, tmp_path / "second", SECOND, RETAIN, "--after", save_model("other"))
    refused(ran, "holds no unlearning run that another could follow")


def test_results_do_not_go_into_the_earlier_run(save_model: Case, asks: Case, tmp_path: Path) -> None:
    model, first = save_model("model"), tmp_path / "first"
    asks(model, first, FIRST)
    before = (first / "model.safetensors").read_bytes()
    refused(asks(model, first, SECOND, RETAIN, "--after", first, "--overwrite"), "lies in the model folder")
    assert (first / "model.safetensors").read_bytes() == before
