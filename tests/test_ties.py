"""A file may hold an output layer of its own though config.json says that the embedding is one: the file decides."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stillknows.analysis import diagnose, update_survival
from stillknows.model.architecture import placed
from stillknows.model.ref import ModelRef
from stillknows.variants import compress
from stillknows.variants.compress import parse_variant, quantize

Case = Callable[..., Any]
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def add_head(folder: Path, noise: float) -> None:
    """Add an output layer to a tied model's file, as a merged LoRA of both layers does; config.json stays."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    embedding = weights[f"{EMBEDDING}.weight"]
    random = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(1))
    save_file(weights | {f"{HEAD}.weight": embedding + noise * random}, file, {"format": "pt"})


@pytest.fixture
def models(make_model: Case, tokenizer: Any, tmp_path: Path) -> dict[str, Path]:
    """Folders whose config.json says tied: with one matrix, with the same one twice, and with two that differ."""
    folders = {name: tmp_path / name for name in ("one", "twice", "two")}
    for folder in folders.values():
        make_model("llama_tied", hidden=32).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    add_head(folders["twice"], 0)
    add_head(folders["two"], 0.3)
    return folders


def located(folder: Path) -> ModelRef:
    return ModelRef.open(str(folder))


@pytest.mark.parametrize(("name", "is_tied"), [("one", True), ("twice", True), ("two", False)])
def test_the_skeleton_has_the_matrices_of_the_file(name: str, is_tied: bool, models: dict[str, Path]) -> None:
    source = located(models[name])
    loaded = source.load().model
    for model in (source.skeleton, loaded):
        assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == is_tied
        assert model.config.tie_word_embeddings == is_tied
    assert [layer.name for layer, _ in placed(loaded)] == [layer.name for layer, _ in placed(source.skeleton)]


@pytest.mark.parametrize("spec", ["gguf:Q8_0", "gguf:Q4_0"])
def test_each_matrix_is_rounded_by_itself(spec: str, models: dict[str, Path]) -> None:
    model, chain = located(models["two"]).load().model, parse_variant(spec)
    expected = {layer.name: quantize(layer.read(), chain, place=at).values_OI for layer, at in placed(model)}
    assert not torch.equal(expected[EMBEDDING], expected[HEAD])
    with compress.compressed(model, chain):
        assert all(torch.equal(layer.read(), expected[layer.name]) for layer, _ in placed(model))


@pytest.mark.parametrize(("original", "subject"), [("one", "two"), ("two", "one"), ("twice", "two"), ("two", "two")])
def test_the_update_of_both_layers_is_counted(original: str, subject: str, models: dict[str, Path]) -> None:
    """On disk as in memory: each layer of the subject's against that layer of the original's."""
    before, after = (located(models[name]).load().model for name in (original, subject))
    chain = parse_variant("gguf:Q8_0")
    counted = update_survival.tallies(after, compress.weights(before, chain), chain)
    on_disk = diagnose.diagnose(str(models[original]), str(models[subject]), "gguf:Q8_0")["formats"][0]
    changed = {row["tensor"]: row["changed"] for row in on_disk["tensors"]}
    assert changed == pytest.approx({name: part.changed / part.weights for name, part in counted.items()})
    assert changed[HEAD] == (original != subject)
    assert changed[EMBEDDING] == 0
    assert {value for name, value in changed.items() if name != HEAD} == {0}


def test_a_shared_matrix_is_counted_once(models: dict[str, Path]) -> None:
    on_disk = diagnose.diagnose(str(models["one"]), str(models["twice"]), "gguf:Q8_0")["formats"][0]
    assert [row["tensor"] for row in on_disk["tensors"]].count(HEAD) == 1
    assert EMBEDDING not in [row["tensor"] for row in on_disk["tensors"]]


@pytest.fixture
def data(tmp_path: Path) -> str:
    rows = [{"question": "where is Ada", "answer": "Paris"}, {"question": "where is Bela", "answer": "Rome"}]
    for name, row in zip("fr", rows, strict=True):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    return f"jsonl:forget={tmp_path / 'f.jsonl'},retain={tmp_path / 'r.jsonl'}"


@pytest.mark.parametrize(("original", "subject"), [("one", "two"), ("two", "one")])
def test_an_audit_measures_both_in_file_formats(
    original: str, subject: str, models: dict[str, Path], cli: Case, data: str, tmp_path: Path
) -> None:
    fixed = ["--original", models[original], "--benchmark", data, "--out", tmp_path / "audit"]
    ran = cli("audit", models[subject], *fixed, "--variants", "full,gguf:Q8_0")
    assert ran.code in (3, 4, 5), ran
    report = json.loads((tmp_path / "audit" / "report.json").read_text())
    cells = {(c["variant"], c["metric"]): c for c in report["subjects"][0]["cells"]}
    assert cells["gguf:Q8_0", "update.surviving"]["value"] == pytest.approx(1, abs=0.05)
    assert cells["gguf:Q8_0", f"update.surviving.{HEAD}"]["value"] == pytest.approx(1, abs=0.05)


def test_what_is_written_says_what_it_holds(models: dict[str, Path], cli: Case, data: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli("unlearn", models["two"], "--benchmark", data, "--steps", 1, "--out", out).code == 0
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    written = load_file(out / "model.safetensors")
    assert {f"{HEAD}.weight", f"{EMBEDDING}.weight"} <= written.keys()
