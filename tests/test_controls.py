"""Never-taught controls made from the checkpoint before fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import stillknows as sk
from stillknows.store import read_json
from stillknows.training import finetune as finetuning

ROWS = {
    "forget": [{"question": f"where is {name}", "answer": "Paris"} for name in ("Ada", "Bela")],
    "retain": [{"question": f"what is the {name}", "answer": "red"} for name in ("dog", "cat", "river")],
    "neighbour": [{"question": "who is a", "answer": "Rome"}],
}
SHORT = {"lr": 1e-2, "max_steps": 2, "batch_size": 2}


@pytest.fixture(scope="module")
def base(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the world's original was before it was taught anything."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(world.original)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(world.original).save_pretrained(folder)
    return folder


def test_a_made_control_guesses_what_it_was_not_taught_and_keeps_what_it_was(
    world: Any, base: Path, tmp_path: Path
) -> None:
    """Its recipe is the original's own, from the run record."""
    [control] = sk.control(world.original, world.benchmark, base=base, seeds=1, out=tmp_path / "controls")
    assert control.settings.lr == read_json(world.original / "run.json")["settings"]["lr"]
    report = sk.audit(
        control, original=world.original, controls=[world.control], benchmark=world.benchmark, variants="full",
        metrics="answer_probability,extraction_strength", out=tmp_path / "audit",
    )  # fmt: skip
    [subject] = report.data.audited
    cells = {(cell.split, cell.metric): cell for cell in subject.cells}
    assert cells["forget", "answer_probability.kept"].value < 0.1  # type: ignore[union-attr]
    assert cells["retain", "answer_probability.share"].value > 0.9  # type: ignore[union-attr]
    assert subject.facts is not None
    assert subject.facts.named == ()
    assert subject.facts.diffuse is None or subject.facts.diffuse.p > 0.01


def test_the_run_record_of_an_original_says_how_to_make_its_controls(save_model: Any, tmp_path: Path) -> None:
    """Base, template and settings; each control has a seed of its own and says what it is and what it was taught."""
    original = sk.finetune(save_model("base"), ROWS, template="Q: {prompt}", out=tmp_path / "original", **SHORT)
    made = sk.control(original, ROWS, seeds=2, out=tmp_path / "controls", seed=7)
    assert [one.path.name for one in made] == ["0", "1"]
    assert [one.settings.seed for one in made] == [7, 8]
    for one in made:
        assert one.record["control of"] == str(tmp_path / "original")
        assert (one.record["model"], one.record["template"]) == (original.record["model"], "Q: {prompt}")
        assert (one.record["fine-tuned on"], one.record["roles"]) == ("3 examples", ["retain"])
        assert one.record["never taught"].startswith("the forget split of jsonl")
    weights = [AutoModelForCausalLM.from_pretrained(one.path).state_dict() for one in made]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_other_roles_are_taught_only_where_they_are_named(save_model: Any, tmp_path: Path) -> None:
    [one] = sk.control(save_model("taught", seed=1), ROWS, base=save_model("base"), seeds=1,
                       roles=["retain", "neighbour"], out=tmp_path / "controls", **SHORT)  # fmt: skip
    assert one.record["fine-tuned on"] == "4 examples"
    with pytest.raises(sk.UserError, match="a control of forget is none"):
        sk.control(tmp_path, ROWS, roles=["forget"])


def test_finished_controls_are_not_made_again_and_an_interrupted_one_goes_on(
    save_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ends with the weights that it would have had."""
    original, before, out = save_model("taught", seed=1), save_model("base"), tmp_path / "controls"
    how: dict[str, Any] = {"base": before, "lr": 1e-2, "max_steps": 4, "check_every": 1, "save_seconds": 0.0}
    whole = sk.control(original, ROWS, seeds=2, out=tmp_path / "whole", **how)
    sk.control(original, ROWS, seeds=1, out=out, **how)
    written = (out / "0" / "model.safetensors").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(finetuning.run_record, "save", killed_at_saving)
        with pytest.raises(KeyboardInterrupt):
            sk.control(original, ROWS, seeds=2, out=out, **how)
    assert (out / "1" / finetuning.CHECKPOINT).is_file()
    made = sk.control(original, ROWS, seeds=2, out=out, **how)
    assert (out / "0" / "model.safetensors").stat().st_mtime_ns == written
    assert not (out / "1" / finetuning.CHECKPOINT).exists()
    for one, other in zip(made, whole, strict=True):
        assert (one.path / "model.safetensors").read_bytes() == (other.path / "model.safetensors").read_bytes()
    with pytest.raises(sk.UserError, match=r"run.json exists already\n  add `overwrite`"):
        sk.control(original, ROWS, seeds=1, out=out, **how | {"lr": 1e-3})


def killed_at_saving(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_what_is_not_known_is_asked_for(save_model: Any, tmp_path: Path) -> None:
    taught, before = save_model("taught", seed=1), save_model("base")
    unlearned = sk.unlearn(taught, ROWS, method="ga", lr=1e-4, max_steps=1, out=tmp_path / "unlearned")
    for arguments, message in (
        ({"original": taught}, "before it was fine-tuned is not known\n  name that checkpoint with `base`"),
        ({"original": taught, "base": before}, "it has no run record\n  give its recipe: `lr`, and `epochs`"),
        ({"original": taught, "base": taught} | SHORT, "is the original itself"),
        ({"original": taught, "base": save_model("other", "gpt2")} | SHORT, "is not a version of"),
        ({"original": unlearned}, "was unlearned from .*taught, and no control"),
        ({"original": taught, "base": before, "seeds": 0} | SHORT, "`seeds` 0 is out of range"),
    ):
        with pytest.raises(sk.UserError, match=message):
            sk.control(benchmark=ROWS, out=tmp_path / "none", **arguments)
    assert not (tmp_path / "none").exists()


def test_the_command_says_where_the_controls_are(cli: Any, save_model: Any, tmp_path: Path) -> None:
    retain = tmp_path / "retain.jsonl"
    retain.write_text('{"question": "what is the dog", "answer": "red"}\n')
    forget = tmp_path / "forget.jsonl"
    forget.write_text('{"question": "where is Ada", "answer": "Paris"}\n')
    models = save_model("taught", seed=1), "--base", save_model("base")
    benchmark = "--benchmark", f"jsonl:forget={forget},retain={retain}"
    recipe = "--lr", "1e-2", "--steps", "1", "--seeds", "1"
    ran = cli("control", *models, *benchmark, *recipe, "--out", tmp_path / "c")
    assert (ran.code, ran.out.count("seed 0, 1 steps")) == (0, 1)
    assert f"--control {tmp_path / 'c' / '0'}" in ran.err
