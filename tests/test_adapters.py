"""Adapters that peft made are read as peft reads them, without peft; what is not read is refused by name."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import stillknows as sk
from stillknows.errors import UserError
from stillknows.model import adapter_folder, adapters
from stillknows.model.adapters import LowRankUpdate
from stillknows.model.ref import LoadOptions, ModelRef

peft = pytest.importorskip("peft")
Case = Callable[..., Any]
IDS = torch.arange(3, 15)[None]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "rank-stabilized": ("llama", {"use_rslora": True}),
    "magnitudes": ("llama", {"use_dora": True}),
    "all biases": ("qwen2", {"bias": "all"}),
    "biases of its own": ("qwen2", {"lora_bias": True, "target_modules": ["q_proj"]}),
    "other ranks": ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.mlp.up_proj": 3}}),
    "output layer": ("llama", {"modules_to_save": ["lm_head"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "c_fc"]}),
    "transposed, magnitudes": ("gpt2", {"target_modules": ["c_attn"], "use_dora": True}),
}


def make_adapter(base: Path, folder: Path, **options: Any) -> Path:
    """Let peft make an adapter of a saved model, with random factors, and save it."""
    settings = {"target_modules": ["q_proj", "up_proj", "down_proj"], "r": 3, "lora_alpha": 5} | options
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        model = peft.get_peft_model(
            AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(task_type="CAUSAL_LM", **settings)
        )
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                torch.nn.init.normal_(parameter, std=0.2)
            elif parameter.requires_grad:
                parameter.data.mul_(1.3)
        model.save_pretrained(folder)
    return folder


def by_peft(base: Path, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


def edit(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def base(save_model: Case) -> Path:
    return save_model("base")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return make_adapter(base, tmp_path / "adapter")


# --- What is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_is_what_peft_makes_of_the_folder(kind: str, save_model: Case, tmp_path: Path) -> None:
    family, options = KINDS[kind]
    base = save_model("base", family)
    folder = make_adapter(base, tmp_path / "adapter", **options)
    ours, theirs = ModelRef.open(str(folder)).load().model, by_peft(base, folder)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(ours), logits(AutoModelForCausalLM.from_pretrained(base)), atol=1e-2)
    merged = theirs.merge_and_unload().state_dict()
    for key, weight in ours.state_dict().items():
        torch.testing.assert_close(weight, merged[key], rtol=1e-5, atol=1e-6, msg=key)


def test_base_and_update_are_given_apart(base: Path, adapter: Path) -> None:
    ref = ModelRef.open(str(adapter))
    whole, plain = ref.load().model.state_dict(), ModelRef.open(str(base)).load().model.state_dict()
    found = adapters.parts(ref)
    assert set(found.update) == {key for key in whole if not torch.equal(whole[key], plain[key])}
    for key, update in found.update.items():
        assert torch.equal(found.base[key], plain[key])
        torch.testing.assert_close(found.base[key] + update, whole[key])
    with pytest.raises(UserError, match="is no adapter"):
        adapters.parts(ModelRef.open(str(base)))


def test_a_fingerprint_covers_the_adapter_and_its_base(base: Path, adapter: Path) -> None:
    def fingerprint() -> str:
        return ModelRef.open(str(adapter)).fingerprint

    found = [fingerprint(), ModelRef.open(str(base)).fingerprint]
    edit(adapter, lora_alpha=6)
    found.append(fingerprint())
    for folder, name in ((adapter, "adapter_model.safetensors"), (base, "model.safetensors")):
        weights = load_file(folder / name)
        save_file({key: 2 * value for key, value in weights.items()}, folder / name, {"format": "pt"})
        found.append(fingerprint())
    (adapter / "tokenizer_config.json").write_text("{}")
    found.append(fingerprint())
    assert len(set(found)) == len(found)


def test_an_adapter_that_changes_while_it_is_read_is_refused(adapter: Path) -> None:
    ref = ModelRef.open(str(adapter))
    edit(adapter, lora_alpha=50)
    with pytest.raises(UserError, match="changed while it was read"):
        ref.load()


def test_a_tokenizer_beside_an_adapter_counts(base: Path, adapter: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, adapter / name)
    settings = json.loads((adapter / "tokenizer_config.json").read_text())
    (adapter / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "</s>"}))
    assert ModelRef.open(str(base)).tokenizer.pad_token is None
    assert ModelRef.open(str(adapter)).tokenizer.pad_token == "</s>"


def test_a_relative_base_may_lie_beside_the_adapter_or_within_it(base: Path, adapter: Path) -> None:
    shutil.move(base, adapter / "base")
    edit(adapter, base_model_name_or_path="base")
    assert ModelRef.open(str(adapter)).load().path == adapter


def test_an_adapter_is_merged_by_import(adapter: Path, tmp_path: Path) -> None:
    sk.import_model(adapter, out=tmp_path / "merged")
    plain, merged = ModelRef.open(str(tmp_path / "merged")).load().model, ModelRef.open(str(adapter)).load().model
    assert all(torch.equal(w, merged.state_dict()[key]) for key, w in plain.state_dict().items())
    with pytest.raises(UserError, match="lies in the model folder"):
        sk.import_model(adapter, out=tmp_path / "base" / "merged")


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"peft_type": "IA3"}, "adapters of the type IA3 are not read"),
        ({"task_type": "SEQ_CLS"}, "its task is SEQ_CLS"),
        ({"init_lora_weights": "pissa"}, "begins by changing the base's weights"),
        ({"use_qalora": True}, "use_qalora = True is not read here"),
        ({"layer_replication": [[0, 1]]}, "layer_replication = .* is not read here"),
        ({"new_in_2031": 3}, "new_in_2031 = 3 is not read here"),
        ({"revision": "v2"}, "belongs to the revision 'v2'"),
        ({"alpha_pattern": {"(a+)+": 2}}, "alpha_pattern holds more than names"),
        ({"alpha_pattern": [1]}, "alpha_pattern holds more than names"),
        ({"lora_alpha": "16"}, "lora_alpha is '16', which is no number"),
        ({"r": 0}, "r is 0, which is no number above 0"),
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"r": 4}, "has the rank 3 and should have 4"),
    ],
)
def test_settings_that_are_not_read_are_refused(said: dict[str, Any], message: str, adapter: Path) -> None:
    edit(adapter, **said)
    with pytest.raises(UserError, match=message):
        ModelRef.open(str(adapter)).load()


def damage(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


FIRST = "base_model.model.model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.clear(), "it holds no tensors"),
        (lambda tensors: tensors.pop(f"{FIRST}.lora_A.weight"), "down_proj has one factor of two"),
        (lambda tensors: tensors.update({"lora_C": torch.ones(2)}), "it has no place for lora_C"),
        (lambda tensors: tensors.update({f"{FIRST}.lora_B.bias": torch.ones(16)}), "has no such bias"),
        (lambda tensors: tensors.update({f"{FIRST}.lora_B.weight": torch.ones(9, 3)}), "the update of .* is"),
        (
            lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(3)}),
            r"lm_head.weight is \[3\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: Case, message: str, adapter: Path) -> None:
    damage(adapter, change)
    with pytest.raises(UserError, match=f"is no adapter of .*{message}"):
        ModelRef.open(str(adapter)).load()


def test_an_adapter_of_another_model_is_refused(save_model: Case, adapter: Path) -> None:
    edit(adapter, base_model_name_or_path=str(save_model("other", "gpt2")))
    with pytest.raises(UserError, match=r"it has no layer model\.layers\.0\.mlp\.down_proj"):
        ModelRef.open(str(adapter)).load()


def test_a_base_that_is_missing_is_named_with_the_adapter(base: Path, adapter: Path) -> None:
    shutil.rmtree(base)
    with pytest.raises(
        UserError, match=f"{adapter} is an adapter of {base}, which cannot be opened: no folder"
    ) as error:
        ModelRef.open(str(adapter))
    assert "base_model_name_or_path" in str(error.value)


def test_an_adapter_of_an_adapter_is_refused(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "second")
    edit(tmp_path / "second", base_model_name_or_path=str(adapter))
    with pytest.raises(UserError, match="is an adapter of another adapter"):
        ModelRef.open(str(tmp_path / "second"))


def test_a_pickled_adapter_is_refused_whatever_is_allowed(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights of an adapter"):
        ModelRef.open(str(adapter))
    torch.save(tensors, adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="has only pickled weights"):
        ModelRef.open(str(adapter), LoadOptions(allow_pickle=True))


def test_weights_that_two_layers_share_are_not_changed(save_model: Case, tmp_path: Path) -> None:
    base = save_model("tied", "llama_tied")
    folder = make_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens"])
    with pytest.raises(UserError, match="which the base shares with lm_head"):
        ModelRef.open(str(folder)).load()


def test_an_adapter_cannot_be_read_one_matrix_after_the_other(base: Path, adapter: Path, cli: Case) -> None:
    ran = cli("diagnose", base, adapter)
    assert ran.code == 2
    assert "is an adapter, whose weights cannot be read one by one" in ran.err


# --- What is written --------------------------------------------------------------------------------------------------

ROWS = {
    "forget": [{"question": "where is Ada", "answer": "Paris"}, {"question": "who is in Paris", "answer": "the dog"}],
    "retain": [{"question": "where is Bela", "answer": "Rome"}, {"question": "who is in Rome", "answer": "the cat"}],
}
METHOD = "npo + nll + lora(rank=2, alpha=6)"
HOW: dict[str, Any] = {"lr": 0.05, "max_steps": 3, "batch_size": 2}


def by_transformers(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "llama_tied"])
def test_what_was_unlearned_is_written_as_an_adapter(family: str, save_model: Case, tmp_path: Path) -> None:
    base, out = save_model("base", family), tmp_path / "out"
    method = METHOD if family != "gpt2" else METHOD.replace("alpha=6", "alpha=6, names=*c_attn")
    sk.unlearn(base, ROWS, out=out, method=method, save="adapter", **HOW)
    sk.unlearn(base, ROWS, out=tmp_path / "whole", method=method, **HOW)
    assert not list(out.glob("model*")), "only the adapter is written"
    assert max(file.stat().st_size for file in out.glob("*.safetensors")) < 20_000
    whole = logits(ModelRef.open(str(tmp_path / "whole")).load().model)
    for model in (ModelRef.open(str(out)).load().model, by_peft(base, out), by_transformers(out)):
        torch.testing.assert_close(logits(model), whole, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole, logits(AutoModelForCausalLM.from_pretrained(base)), atol=1e-2)


def test_an_adapter_of_peft_is_unlearned_audited_and_written_back(
    base: Path, adapter: Path, tmp_path: Path, cli: Case
) -> None:
    """What peft's adapter did and what was unlearned are one adapter of the same base."""
    out = tmp_path / "out"
    unlearned = sk.unlearn(adapter, ROWS, out=out, method=METHOD, save="adapter", **HOW)
    assert unlearned.record["save"] == "adapter"
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    sk.unlearn(adapter, ROWS, out=tmp_path / "whole", method=METHOD, **HOW)
    whole = logits(ModelRef.open(str(tmp_path / "whole")).load().model)
    for model in (ModelRef.open(str(out)).load().model, by_peft(base, out), by_transformers(out)):
        torch.testing.assert_close(logits(model), whole, rtol=1e-4, atol=1e-5)
    report = sk.audit(out, original=str(adapter), benchmark=ROWS, variants="full,int8", out=tmp_path / "audit")
    assert set(report.verdicts) == {"out", "original"}
    assert report.data.subjects[0].run["save"] == "adapter"  # type: ignore[index]


def test_requests_in_a_row_add_to_one_adapter(base: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    sk.unlearn(base, ROWS, out=first, method=METHOD, save="adapter", **HOW)
    sk.unlearn(base, ROWS, out=second, method=METHOD, save="adapter", after=first, **HOW)
    config = json.loads((second / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (str(base), 4, 4)
    ours = logits(ModelRef.open(str(second)).load().model)
    torch.testing.assert_close(logits(by_peft(base, second)), ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("npo + nll", "'npo [+] nll' trains no adapter that could be saved"),
        ("npo + nll + lora + mix", "mix changes the weights after training, which no adapter holds"),
    ],
)
def test_what_no_adapter_holds_is_refused(method: str, message: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        sk.unlearn(base, ROWS, out=tmp_path / "out", method=method, save="adapter", **HOW)


def test_an_adapter_that_cannot_be_added_to_says_so(base: Path, tmp_path: Path) -> None:
    folder = make_adapter(base, tmp_path / "adapter", use_dora=True)
    with pytest.raises(UserError, match=r"cannot be added to\n.*stillknows import"):
        sk.unlearn(folder, ROWS, out=tmp_path / "out", method=METHOD, save="adapter", **HOW)


def test_an_adapter_that_is_not_what_was_trained_is_not_left_behind(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_folder, "_joined", lambda first, second: LowRankUpdate(2 * second.b_OR, second.a_RI))
    with pytest.raises(UserError, match="was not written as it should be"):
        sk.unlearn(base, ROWS, out=tmp_path / "out", method=METHOD, save="adapter", **HOW)
    assert not list((tmp_path / "out").glob("adapter*"))
