"""What formats leave of an update, from two checkpoints on disk: hand-made matrices, saved models, broken files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stillknows.analysis import diagnose, diagnosis_page
from stillknows.analysis.recovery_curve import Curve
from stillknows.analysis.update_survival import tallies, total
from stillknows.errors import UserError
from stillknows.formatting import percent
from stillknows.model import modelfiles
from stillknows.store import write_sealed
from stillknows.variants.compress import parse_variant, weights

Case = Callable[..., Any]
FORMATS = "rtn:group=8,int8,nf4,bf16+fp4,gguf:Q8_0"


def perturb(model: Any, size: float = 0.02) -> None:
    """Change all weights but those of the attention's output by up to `size`."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        change = size * (2 * torch.rand(parameter.shape, generator=generator) - 1)
        parameter.data += 0 if "o_proj" in name else change.to(parameter.dtype)


@pytest.fixture
def pair(make_model: Case, tmp_path: Path) -> Case:
    """Return pair(family="llama", dtype=float32, **saving): a model, its perturbed copy, the folders of both."""

    def make(family: str = "llama", dtype: torch.dtype = torch.float32, **saving: Any) -> tuple[Any, Any, Path, Path]:
        original = make_model(family, hidden=32, layers=2).to(dtype)
        original.save_pretrained(tmp_path / "original")
        unlearned = make_model(family, hidden=32, layers=2).to(dtype)
        perturb(unlearned)
        unlearned.save_pretrained(tmp_path / "unlearned", **saving)
        return original, unlearned, tmp_path / "original", tmp_path / "unlearned"

    return make


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Save a folder's weights again after `change` was applied to them in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def assert_agrees(found: dict[str, Any], original: Any, unlearned: Any) -> None:
    """Compare with what the walk over loaded models counts."""
    for form in found["formats"]:
        chain = parse_variant(form["format"])
        counted = total(tallies(unlearned, weights(original, chain), chain).values())
        assert {name: form[name] for name in counted.shares()} == counted.shares()


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "phi3", "gemma2"])
def test_the_disk_tells_what_loaded_models_tell(family: str, pair: Case) -> None:
    original, unlearned, before, after = pair(family)
    found = diagnose.diagnose(str(before), str(after), FORMATS)
    assert [form["format"] for form in found["formats"]] == FORMATS.split(",")
    assert_agrees(found, original, unlearned)


def test_shards_and_the_base_model_s_names_change_nothing(pair: Case) -> None:
    _, _, before, after = pair("gpt2")
    expected = diagnose.diagnose(str(before), str(after), FORMATS)
    _, _, _, sharded = pair("gpt2", max_shard_size="20KB")
    (sharded / "model.safetensors").unlink(missing_ok=True)
    assert len(modelfiles.ModelFiles(sharded).weights) > 1
    rewrite(before, lambda tensors: rename(tensors, "transformer."))
    assert diagnose.diagnose(str(before), str(sharded), FORMATS) == expected


def rename(tensors: dict[str, torch.Tensor], prefix: str) -> None:
    for name in list(tensors):
        tensors[name.removeprefix(prefix)] = tensors.pop(name)


def test_shared_weights_are_found_under_either_name(pair: Case) -> None:
    _, _, before, after = pair("llama_tied")
    expected = diagnose.diagnose(str(before), str(after), "gguf:Q8_0")
    rewrite(after, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    assert diagnose.diagnose(str(before), str(after), "gguf:Q8_0") == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_16_bits_are_read_as_they_are(dtype: torch.dtype, pair: Case) -> None:
    original, unlearned, before, after = pair(dtype=dtype)
    found = diagnose.diagnose(str(before), str(after), FORMATS)
    assert_agrees(found, original.float(), unlearned.float())


def test_layers_and_tensors_add_up(pair: Case) -> None:
    _, _, before, after = pair("llama_tied")
    linear, file = diagnose.diagnose(str(before), str(after), "int8,gguf:Q8_0")["formats"]
    assert [layer["layer"] for layer in linear["layers"]] == ["model.layers.0", "model.layers.1"]
    assert [layer["layer"] for layer in file["layers"]] == ["model.layers.0", "model.layers.1", "lm_head"]
    assert len(linear["tensors"]) == 14
    for form in (linear, file):
        for parts in (form["layers"], form["tensors"]):
            assert sum(part["weights"] for part in parts) == form["weights"]
            crossed = sum(part["crossing"] * part["weights"] for part in parts)
            assert crossed == pytest.approx(form["crossing"] * form["weights"])
    unchanged = {tensor["tensor"] for tensor in linear["tensors"] if tensor["surviving"] is None}
    assert unchanged == {f"model.layers.{i}.self_attn.o_proj" for i in (0, 1)}


def test_an_update_in_the_zero_bin_is_named_as_the_cause(pair: Case) -> None:
    """Only weights below a 40th of their row's largest move, and a 14th is where the first bin of int4 ends."""
    original, _, before, after = pair()

    def move(tensors: dict[str, torch.Tensor]) -> None:
        for name, weight in original.named_parameters():
            if name in tensors and weight.dim() == 2:
                small = weight.abs() < weight.abs().amax(1, keepdim=True) / 40
                tensors[name] = torch.where(small, weight + 1e-3, weight).contiguous()

    rewrite(after, move)
    coarse, fine = diagnose.diagnose(str(before), str(after), "rtn:group=0,full")["formats"]
    assert (coarse["crossing"], coarse["surviving"], coarse["zero_bin_changed"]) == (0, 0, 1)
    assert coarse["cause"].startswith("nearly all of the update is lost: it is smaller than the format's steps (0.0")
    share = percent(coarse["zero_bin"])
    zero_bin = f"100 % of the changed weights lie in the zero bin, as do {share} of all weights"
    assert coarse["cause"].endswith(f"; 0 % of the weights change bins; {zero_bin}")
    assert fine["cause"] == "the update survives: the format holds the original's weights exactly"


def test_the_command_line(pair: Case, cli: Case) -> None:
    _, _, before, after = pair()
    record = {"stillknows": "0", "settings": {"weights": "bfloat16", "lr": 1e-5}, "fit": {"steps": 40}}
    write_sealed(after / "run.json", record)
    machine = cli("diagnose", before, after, "--formats", "int8,rtn:group=0", "--json")
    assert (machine.code, machine.err) == (0, "")
    found = json.loads(machine.out)
    assert found == diagnose.diagnose(str(before), str(after), "int8,rtn:group=0")
    assert (found["run"]["weights"], found["run"]["lr"], found["run"]["steps"]) == ("bfloat16", 1e-5, 40)
    assert 0 <= found["run"]["movable"] <= 0.5
    assert found["run"]["half_movable_lr"] > 1e-5

    human = cli("diagnose", before, after, "--formats", "int8,rtn:group=0")
    assert (human.code, human.err) == (0, "")
    assert max(len(line) for line in human.out.splitlines() if line.startswith("|")) <= 80
    assert "weights kept as bfloat16 between steps, learning rate 1e-05" in human.out
    assert "* beyond the small models that the prediction was fitted to" in human.out
    for form in found["formats"]:
        expected = Curve.published().predict(form["surviving"], form["weights"])
        assert form["recovery"] == expected._asdict()
        assert f"{form['format']}: {form['cause']}." in human.out
        assert percent(form["crossing"]) in human.out
    assert "model.layers.1" not in human.out
    assert cli("diagnose", before, after, "--formats", "int8", "--layers").out.count("| model.layers.") == 2


def test_a_model_without_a_run_record_is_compared_too(pair: Case) -> None:
    _, _, before, _ = pair()
    found = diagnose.diagnose(str(before), str(before), "int8")
    assert found["run"] is None
    assert found["formats"][0]["recovery"] is None
    assert found["formats"][0]["surviving"] is None
    assert "| int8   | 0 %     | 0 %      | –         | –" in diagnosis_page.text(found)


def set_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = math.nan


def lose(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.0.self_attn.q_proj.weight"]


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(32, 25)


def store_as_integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(32, 24, dtype=torch.int8)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (set_nan, "model.layers.1.mlp.up_proj.weight hold NaN or infinity"),
        (lose, "holds no weights model.layers.0.self_attn.q_proj.weight"),
        (reshape, r"model.layers.0.mlp.down_proj.weight have the shape \[32, 25\], not \[32, 24\]"),
        (store_as_integers, "model.layers.0.mlp.down_proj.weight are kept as I8"),
    ],
)
def test_broken_weights_are_named(which: int, damage: Callable[..., None], words: str, pair: Case) -> None:
    folders = pair()[2:]
    rewrite(folders[which], damage)
    with pytest.raises(UserError, match=words) as error:
        diagnose.diagnose(str(folders[0]), str(folders[1]), "int8")
    assert folders[which].name in str(error.value)


def test_models_of_other_shapes_are_refused(pair: Case, save_model: Case, cli: Case) -> None:
    _, _, before, _ = pair()
    ran = cli("diagnose", before, save_model("other"), "--json")
    assert ran.code == 2
    assert "is not a version of" in json.loads(ran.out)["error"]


@pytest.mark.parametrize(
    ("formats", "words"),
    [
        ("int8,gptq", "gptq depends on what each layer is given"),
        ("bf16+awq", r"bf16\+awq depends on what each layer is given"),
        ("kv_fp8", "kv_fp8 depends on what each layer is given"),
        ("int8+int8_activations", r"int8\+int8_activations depends on what each layer is given"),
        ("int7", "no format named 'int7'"),
        ("", "no format is named"),
        ("int4", "int4: layer model.layers.0.self_attn.q_proj"),
    ],
)
def test_formats_that_cannot_be_diagnosed(formats: str, words: str, pair: Case) -> None:
    _, _, before, after = pair()
    with pytest.raises(UserError, match=words):
        diagnose.diagnose(str(before), str(after), formats)


def test_a_file_without_the_output_layer_that_its_configuration_describes_is_refused(pair: Case) -> None:
    _, _, before, after = pair("llama_tied")
    config = json.loads((after / "config.json").read_text())
    (after / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    for folders in ((before, after), (after, before)):
        with pytest.raises(UserError, match=r"holds no weights lm_head\.weight, which its config.json describes"):
            diagnose.diagnose(str(folders[0]), str(folders[1]), "gguf:Q8_0")


@pytest.mark.parametrize("lr", ["1e-5", [1e-5], None, 0])
def test_a_record_without_a_rate_gives_no_rate_to_take(lr: Any, pair: Case) -> None:
    _, _, before, after = pair()
    record = {"stillknows": "0", "settings": {"weights": "bfloat16", "lr": lr}, "fit": {"steps": 10}}
    write_sealed(after / "run.json", record)
    [found] = diagnose.diagnose(str(before), str(after), "rtn:bits=2:group=8")["formats"]
    assert found["least_lr"] is None
    json.dumps(diagnose.diagnose(str(before), str(after), "int8"), allow_nan=False)


@pytest.mark.parametrize(("steps", "size", "has_rate"), [(10, 0.001, True), (0, 0.001, False), (10, 0.3, False)])
def test_a_rate_is_named_only_where_steps_made_a_small_update(
    steps: int, size: float, has_rate: bool, pair: Case, make_model: Case
) -> None:
    original, _, before, after = pair()
    for name, parameter in original.named_parameters():
        parameter.data += size * (parameter.abs() < 0.01) * ("proj" in name)
    original.save_pretrained(after)
    record = {"stillknows": "0", "settings": {"weights": "float32", "lr": 1e-5}, "fit": {"steps": steps}}
    write_sealed(after / "run.json", record)
    [found] = diagnose.diagnose(str(before), str(after), "rtn:bits=2:group=0")["formats"]
    assert (found["least_lr"] is not None) is has_rate, found["surviving"]


def test_pickled_and_missing_weights(pair: Case, tmp_path: Path) -> None:
    _, _, before, after = pair()
    torch.save(load_file(after / "model.safetensors"), after / "pytorch_model.bin")
    (after / "model.safetensors").unlink()
    with pytest.raises(UserError, match="only pickled weights") as error:
        diagnose.diagnose(str(before), str(after), "int8")
    assert "allow_pickle" not in str(error.value)  # an option that this command does not have
    (after / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="has no weights"):
        diagnose.diagnose(str(before), str(after), "int8")
    with pytest.raises(UserError, match="no folder"):
        diagnose.diagnose(str(tmp_path / "absent"), str(after), "int8")
