"""What is loaded is what is hashed is what is read on disk, however a folder keeps its weights; what is written is read
back."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from stillknows.analysis import diagnose
from stillknows.errors import UserError
from stillknows.model import modelfiles, run_record, tokens
from stillknows.model.layers import linears
from stillknows.model.ref import LoadOptions, ModelRef
from stillknows.model.safetensors_index import stored

Case = Callable[..., Any]
BENCHMARK = [("where is Ada", "Paris"), ("what is the colour of the dog", "red"), ("where is Bela", "Rome")]


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def single(folder: Path) -> None:
    pass


def sharded(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="4KB")


def in_subfolder(folder: Path) -> None:
    sharded(folder)
    (folder / "parts").mkdir()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for name in set(index["weight_map"].values()):
        (folder / name).rename(folder / "parts" / name)
    index["weight_map"] = {key: f"parts/{name}" for key, name in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def pickled_in_shards(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    shards: list[dict[str, torch.Tensor]] = [{}, {}]
    for i, (key, value) in enumerate(weights.items()):
        shards[i % 2][key] = value
    for name, shard in zip(names, shards, strict=True):
        torch.save(shard, folder / name)
    index = {"metadata": {}, "weight_map": {key: names[i % 2] for i, key in enumerate(weights)}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def named(folder: Path) -> None:
    """config.json names the file; one of the usual name lies beside it."""
    weights = load_file(folder / "model.safetensors")
    save_file({key: value + 1 for key, value in weights.items()}, folder / "other.safetensors", {"format": "pt"})
    edit_json(folder / "config.json", transformers_weights="other.safetensors")


def named_index(folder: Path) -> None:
    sharded(folder)
    (folder / "model.safetensors.index.json").rename(folder / "other.safetensors.index.json")
    edit_json(folder / "config.json", transformers_weights="other.safetensors.index.json")


LAYOUTS = (single, sharded, in_subfolder, pickled, pickled_in_shards, named, named_index)
DECOYS = ("README.md", "run.json", "notes.py", "optimizer.pt", "model.fp16.safetensors", "pytorch_model.bin", "x.gguf")


@pytest.fixture(params=LAYOUTS, ids=lambda layout: layout.__name__)
def laid_out(request: pytest.FixtureRequest, save_model: Case) -> Path:
    """A model in each layout, with files beside it that nothing reads, and one of every kind that tokenizers read."""
    folder = save_model("model")
    request.param(folder)
    for name in DECOYS:
        if not (folder / name).exists() and not (name == "pytorch_model.bin" and request.param is pickled_in_shards):
            (folder / name).write_text(name)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    return folder


def source_of(folder: Path) -> ModelRef:
    return ModelRef.open(str(folder), LoadOptions(allow_pickle=True))


def outcome(folder: Path) -> Any:
    """Return what comes of a folder: weights, tokens, templates, settings; the kind of error where it is refused."""
    try:
        subject = source_of(folder).load()
    except UserError:
        return "refused"
    weights = {key: value.sum(dtype=torch.float64).item() for key, value in subject.model.state_dict().items()}
    read = [subject.tokenizer(text)["input_ids"] for text in tokens.PROBES]
    model: Any = subject.model
    return weights, read, subject.tokenizer.chat_template, model.generation_config.to_dict(), subject.fingerprint


def every_file(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_change_of_any_file_that_is_read_changes_the_fingerprint(laid_out: Path) -> None:
    """And of no other: each file in turn is cut to half, which changes what is read or makes it unreadable."""
    before, fingerprint = outcome(laid_out), modelfiles.fingerprint(laid_out)
    assert before[-1] == fingerprint
    for path in every_file(laid_out):
        content, name = path.read_bytes(), str(path.relative_to(laid_out))
        path.write_bytes(content[: len(content) // 2])
        is_read = outcome(laid_out) != before
        try:
            has_changed = modelfiles.fingerprint(laid_out) != fingerprint
        except UserError:  # an index that cannot be read
            has_changed = True
        path.write_bytes(content)
        assert is_read == has_changed, name
        assert not (is_read and name in DECOYS and path not in modelfiles.ModelFiles(laid_out).weights), name
    assert outcome(laid_out) == before


def test_any_byte_of_the_files_counts(laid_out: Path) -> None:
    fingerprint = modelfiles.fingerprint(laid_out)
    for path in modelfiles.ModelFiles(laid_out).all():
        content = path.read_bytes()
        if path.suffix == ".json":  # white space keeps it readable
            path.write_bytes(content + b" ")
        else:
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert modelfiles.fingerprint(laid_out) != fingerprint, path.name
        path.write_bytes(content)


@pytest.mark.parametrize("layout", [single, sharded, in_subfolder, named, named_index], ids=lambda f: f.__name__)
def test_weights_on_disk_are_those_that_are_loaded(layout: Case, save_model: Case) -> None:
    folder = save_model("model")
    layout(folder)
    source = source_of(folder)
    model = source.load().model
    skeleton = source.skeleton
    found = stored(source, skeleton, linears(skeleton))
    assert all(torch.equal(found[layer.name].read(), layer.read()) for layer in linears(model))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("../elsewhere.safetensors", "names weights outside of its folder"),
        ("/elsewhere.safetensors", "names weights outside of its folder"),
        ("model.bin", "transformers_weights is 'model.bin', which is no safetensors file"),
        (3, "transformers_weights is 3"),
        ("missing.safetensors", "lacks missing.safetensors, which its index or config names"),
        ("missing.safetensors.index.json", "no file .*missing.safetensors.index.json"),
    ],
)
def test_a_name_of_weights_that_leads_nowhere_is_refused(value: object, words: str, save_model: Case) -> None:
    folder = save_model("model")
    edit_json(folder / "config.json", transformers_weights=value)
    with pytest.raises(UserError, match=words):
        source_of(folder)


def test_an_index_leads_nowhere_outside(save_model: Case) -> None:
    folder = save_model("model")
    sharded(folder)
    edit_json(folder / "model.safetensors.index.json", weight_map={"a": "../model.safetensors"})
    with pytest.raises(UserError, match="names weights outside of its folder"):
        source_of(folder)


def test_code_counts_where_the_model_asks_for_it(save_model: Case) -> None:
    folder = save_model("model")
    (folder / "parts").mkdir()
    for name in ("modeling_x.py", "parts/layers.py"):
        (folder / name).write_text("x = 1")
    assert not [path for path in modelfiles.ModelFiles(folder).all() if path.suffix == ".py"]
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    code = [path.name for path in modelfiles.ModelFiles(folder).all() if path.suffix == ".py"]
    assert code == ["modeling_x.py", "layers.py"]


def test_all_names_of_vocabularies_are_covered() -> None:
    """Of the tokenizer classes of transformers; what is left out belongs to no causal language model."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

    of_others = {"emoji.json", "normalizer.json", "byte_maps.json", "entity_vocab.json", "prophetnet.tokenizer"}
    of_others |= {"word_shape.json", "word_pronunciation.json", "vocab-src.json", "vocab-tgt.json"}
    names: set[str] = set()
    for class_name in filter(None, set(TOKENIZER_MAPPING_NAMES.values())):
        try:
            names |= set(tokenizer_class_from_name(class_name).vocab_files_names.values())  # type: ignore[union-attr]
        except (ImportError, AttributeError):
            continue
    assert "spiece.model" in names
    assert not [n for n in names - of_others if not any(Path(n).match(pattern) for pattern in modelfiles.COMPANIONS)]


# --- Adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(cli: Case, tmp_path: Path) -> Case:
    """Return run(command, model, …options): a command on a model with three items, into the folder "out"."""
    rows = [json.dumps({"question": q, "answer": a}) + "\n" for q, a in BENCHMARK]
    forget, retain = tmp_path / "f.jsonl", tmp_path / "r.jsonl"
    forget.write_text("".join(rows[:2]))
    retain.write_text(rows[2])
    data, out = ["--benchmark", f"jsonl:forget={forget},retain={retain}"], ["--out", tmp_path / "out"]

    def call(command: str, model: Path, *options: object) -> Any:
        given: dict[str, list[object]] = {
            "unlearn": [model, *data, *out, "--steps", 2],
            "audit": [model, *data, *out, "--variants", "full"],
            "diagnose": [model],
            "quantize": [model, "--to", "int8", *out],
        }
        return cli(command, *given[command], *options)

    return call


@pytest.mark.parametrize("command", ["unlearn", "audit", "diagnose", "quantize"])
def test_an_adapter_beside_the_weights_is_refused(command: str, run: Case, save_model: Case, tmp_path: Path) -> None:
    """Where peft is installed transformers would add it, and save adapter files alone."""
    plain, model = save_model("plain"), save_model("model")
    (model / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    rest = {"audit": ["--original", plain], "diagnose": [plain]}
    ran = run(command, model, *rest.get(command, []))
    assert (ran.code, ran.out) == (2, "")
    assert "holds an adapter (adapter_config.json)" in ran.err
    assert "merge_and_unload" in ran.err
    assert not (tmp_path / "out" / "run.json").exists()


# --- Models that change -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "generation_config.json", "chat_template.jinja"]
)
def test_a_model_that_changes_after_its_fingerprint_was_taken_is_refused(name: str, save_model: Case) -> None:
    folder, other = save_model("model"), save_model("other", seed=1)
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text().replace('"Rome"', '"Roma"'))
    edit_json(other / "generation_config.json", eos_token_id=5)
    (other / "chat_template.jinja").write_text("{{ messages }}")
    source = source_of(folder)
    assert source.fingerprint == source.load().fingerprint
    shutil.copy(other / name, folder / name)
    with pytest.raises(UserError, match=r"model changed while it was read\n.*run it again"):
        source.load()


def test_a_file_that_is_copied_over_the_model_while_an_audit_runs_is_noticed(
    run: Case, save_model: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, subject, control = (save_model(name, seed=i) for i, name in enumerate(("original", "subject", "control")))
    load = ModelRef.load

    def late(ref: ModelRef, *label: Any) -> Any:
        if ref.folder == subject:
            shutil.copy(control / "model.safetensors", subject / "model.safetensors")
        return load(ref, *label)

    monkeypatch.setattr(ModelRef, "load", late)
    ran = run("audit", subject, "--original", original, "--control", control)
    assert ran.code == 2
    assert f"{subject} changed while it was read" in ran.err
    assert not (tmp_path / "out" / "report.json").exists()


def test_weights_under_another_name_are_what_an_audit_goes_by(run: Case, save_model: Case, tmp_path: Path) -> None:
    """A change of the file that is read is a change of the model; one of the file that is not is none."""
    original, subject = save_model("original"), save_model("subject", seed=1)
    named(subject)
    assert run("audit", subject, "--original", original).code in (4, 5)
    report = tmp_path / "out" / "report.json"
    first = json.loads(report.read_text())["subjects"][0]
    (subject / "model.safetensors").write_bytes(b"")
    run("audit", subject, "--original", original, "--overwrite")
    assert json.loads(report.read_text())["subjects"][0]["fingerprint"] == first["fingerprint"]
    shutil.copy(original / "model.safetensors", subject / "other.safetensors")
    run("audit", subject, "--original", original, "--overwrite")
    last = json.loads(report.read_text())["subjects"][0]
    assert last["fingerprint"] != first["fingerprint"]
    assert last["cells"] != first["cells"]


def test_diagnose_reads_the_weights_that_the_configuration_names(save_model: Case) -> None:
    original, subject = save_model("original"), save_model("subject")
    named(subject)
    found = diagnose.diagnose(str(original), str(subject), "rtn:bits=8:group=0")["formats"][0]
    assert found["changed"] == 1


def test_a_file_that_is_copied_over_a_model_while_it_is_diagnosed_is_noticed(
    save_model: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else some matrices would be of one model, some of another."""
    original, subject, other = (save_model(name, seed=i) for i, name in enumerate(("original", "subject", "other")))
    compare = diagnose.compare

    def late(*given: Any, **options: Any) -> Any:
        shutil.copy(other / "model.safetensors", subject / "model.safetensors")
        return compare(*given, **options)

    monkeypatch.setattr(diagnose, "compare", late)
    with pytest.raises(UserError, match=r"model\.safetensors changed while it was read"):
        diagnose.diagnose(str(original), str(subject), "rtn:bits=8:group=0")


# --- What is written --------------------------------------------------------------------------------------------------


def flipped(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def nothing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def adapter_only(folder: Path) -> None:
    nothing(folder)
    (folder / "adapter_config.json").write_text("{}")


def narrowed(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({key: value.half() for key, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("damage", [flipped, nothing, adapter_only, narrowed], ids=lambda f: f.__name__)
def test_success_is_said_only_of_weights_that_were_read_back(
    damage: Case, run: Case, save_model: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, save = save_model("model"), PreTrainedModel.save_pretrained

    def spoiled(self: Any, folder: Path, **options: Any) -> None:
        save(self, folder, **options)
        damage(Path(folder))

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", spoiled)
    ran = run("unlearn", model)
    assert ran.code == 2, ran
    assert "Traceback" not in ran.err
    assert not [path for path in every_file(tmp_path / "out") if path.name in ("run.json", "config.json")]


def test_a_tokenizer_that_was_written_otherwise_is_noticed(save_model: Case, tmp_path: Path) -> None:
    subject = source_of(save_model("model")).load()
    save = type(subject.tokenizer).save_pretrained

    class Other(type(subject.tokenizer)):  # type: ignore[misc]
        def save_pretrained(self, folder: Path) -> None:
            save(self, folder)
            edit_json(folder / "tokenizer_config.json", eos_token="<s>")

    subject.tokenizer.__class__ = Other
    with pytest.raises(UserError, match="1 parts differ, the first: eos_token"):
        run_record.save(subject.model, subject.tokenizer, tmp_path / "out", {})


@pytest.mark.parametrize("command", ["unlearn", "quantize"])
def test_no_file_of_another_model_becomes_a_part_of_what_is_written(
    command: str, run: Case, save_model: Case, tmp_path: Path
) -> None:
    if command == "quantize":
        pytest.importorskip("bitsandbytes")
    model, out = save_model("model"), tmp_path / "out"
    for name in ("chat_template.jinja", "adapter_config.json", "special_tokens_map.json", "pytorch_model.bin"):
        out.mkdir(exist_ok=True)
        (out / name).write_text("{}")
        ran = run(command, model)
        assert ran.code == 2
        assert f"{name} exists already" in ran.err
        (out / name).unlink()
    (out / "chat_template.jinja").write_text("{{ messages }}")
    (out / "notes.txt").write_text("mine")
    assert run(command, model, "--overwrite").code == 0
    assert not (out / "chat_template.jinja").exists()
    assert (out / "notes.txt").read_text() == "mine"


def test_several_chat_templates_are_written_and_read_back(save_model: Case, tmp_path: Path) -> None:
    folder = save_model("model")
    templates = {"default": "{{ messages[0].content }}", "tools": "{{ messages[0].content }} {{ tools }}"}
    subject = source_of(folder).load()
    subject.tokenizer.chat_template = templates
    for _ in range(2):  # the second time over the first
        run_record.save(subject.model, subject.tokenizer, tmp_path / "out", {})
    assert os.access(tmp_path / "out" / "additional_chat_templates", os.X_OK)
    assert source_of(tmp_path / "out").tokenizer.chat_template == templates
