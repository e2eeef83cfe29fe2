"""Every bad input ends in one clear message and exit code 2, before a model is loaded where that is possible.

Nothing is written then, nothing is lost, and no traceback is shown.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SettingsThatSave
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from stillknows import cli as command_line
from stillknows import store
from stillknows.auditing import audit, collect
from stillknows.errors import UserError
from stillknows.experiments import tiny_models
from stillknows.labels import labels
from stillknows.ledger import LEDGER
from stillknows.model import layers, loading, modelfiles, run_record
from stillknows.model.ref import ModelRef
from stillknows.training import loop, objective_inputs
from stillknows.training.settings import Settings
from stillknows.types import Benchmark, Example, Role, Split
from stillknows.unlearning import choices, execution, unlearn

Case = Callable[..., Any]
FORGET = [("where is Ada", "Paris"), ("what is the colour of the dog", "red")]
RETAIN = [("where is Bela", "Rome"), ("what is the colour of the cat", "blue")]


def write_items(path: Path, items: Sequence[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in items), encoding="utf-8")
    return path


PASSING = (store.LOCK, execution.RANGE_TEST)  # locks of runs that have ended; a rate that was found for a run to come


def snapshot(folder: Path) -> dict[str, str]:
    """Return what a folder holds but for what is PASSING, and folders that hold nothing else."""
    found = [path for path in folder.rglob("*") if path.name not in PASSING]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in found
        if not path.is_dir() or {child.name for child in path.iterdir()} - {*PASSING} or not any(path.iterdir())
    }


def refused(ran: Any, *words: str, fix: bool | None = True, begun: bool = False) -> None:
    """Check that a command ended in one message that says what is wrong and, if there is a `fix`, what to type.

    Nothing stands before it but the line in which `unlearn` says what it is about to do, unless work had `begun`, of
    which the log tells where it took some time.
    """
    assert ran.code == 2, ran
    assert ran.out == ""
    log, _, message = ran.err.partition("stillknows: ")
    assert begun or all(line.startswith("unlearning ") for line in log.splitlines()), ran.err
    assert "stillknows: " not in message
    assert "Traceback" not in ran.err
    assert len(message.strip().splitlines()) in ((1, 2) if fix is None else (1 + fix,)), ran.err
    for word in words:
        assert word in ran.err


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test when a model is loaded."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))


@pytest.fixture
def data(tmp_path: Path) -> str:
    """The benchmark that most tests use: two items to forget, two to keep."""
    forget, retain = (write_items(tmp_path / f"{n}.jsonl", i) for n, i in (("f", FORGET), ("r", RETAIN)))
    return f"jsonl:forget={forget},retain={retain}"


@pytest.fixture
def run_unlearn(cli: Case, data: str, tmp_path: Path) -> Case:
    """Return run(model, *options, benchmark=…): unlearn two steps into the folder "out"."""

    def run(model: object, *options: object, benchmark: str = data, out: object = tmp_path / "out") -> Any:
        few = ["--steps", 2, "--batch-size", 2]
        return cli("unlearn", model, "--benchmark", benchmark, "--out", out, *few, *options)

    return run


@pytest.fixture
def run_audit(cli: Case, data: str, tmp_path: Path) -> Case:
    """Return run(original, subject, *options): audit in full precision into the folder "audit"."""

    def run(original: object, subject: object, *options: object, benchmark: str = data) -> Any:
        fixed = ["--original", original, "--benchmark", benchmark, "--out", tmp_path / "audit"]
        return cli("audit", subject, *fixed, *([] if "--variants" in options else ["--variants", "full"]), *options)

    return run


@pytest.fixture
def untouched(tmp_path: Path) -> Iterator[Callable[[], None]]:
    """Give check(): after it was called once, the test ends by checking that no file has changed since."""
    before: dict[str, str] = {}
    yield lambda: before.update(snapshot(tmp_path))
    assert before == snapshot(tmp_path)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder: Path) -> list[Path]:
    """Store a saved model in several files instead of one."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="4KB")
    return sorted(folder.glob("model-*.safetensors"))


# What is wrong with a model


def no_folder(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def remove_shard(folder: Path) -> None:
    shard(folder)[1].unlink()


def remove_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "lla')


def config_without_object(folder: Path) -> None:
    (folder / "config.json").write_text("[1, 2]")


def unknown_type(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="nonesuch")


def impossible_shape(folder: Path) -> None:
    edit_json(folder / "config.json", num_attention_heads=0)


def impossible_sizes(folder: Path) -> None:
    edit_json(folder / "config.json", intermediate_size=-4)


def own_code(folder: Path) -> None:
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "own.Own", "AutoConfig": "own.OwnConfig"})
    (folder / "own.py").write_text("raise SystemExit('the code that came with the model was run')")


def own_tokenizer(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]})
    (folder / "own.py").write_text("raise SystemExit('the code that came with the model was run')")


def quantized_already(folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def no_end(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def more_tokens(folder: Path) -> None:
    tokens = json.loads((folder / "tokenizer.json").read_text())
    tokens["model"]["vocab"]["Paris"] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(tokens))


BROKEN: Mapping[str, tuple[Callable[[Path], object], list[str]]] = {
    "no folder": (no_folder, ["no folder", "org/model"]),
    "no config": (remove_config, ["not a model", "config.json"]),
    "damaged config": (damage_config, ["config.json is not JSON"]),
    "config is a list": (config_without_object, ["config.json does not hold a JSON object"]),
    "unknown type": (unknown_type, ["config.json cannot be used", "nonesuch"]),
    "impossible shape": (impossible_shape, ["config.json cannot be used"]),
    "impossible sizes": (impossible_sizes, ["config.json describes no model"]),
    "no weights": (remove_weights, ["no weights", "model.safetensors"]),
    "truncated weights": (truncate, ["model.safetensors is truncated or damaged"]),
    "missing shard": (remove_shard, ["lacks model-00002-of-", "index"]),
    "only pickles": (pickled, ["pytorch_model.bin", "--allow-pickle"]),
    "own code": (own_code, ["auto_map", "--trust-remote-code"]),
    "own tokenizer code": (own_tokenizer, ["auto_map", "--trust-remote-code"]),
    "quantized already": (quantized_already, ["quantized already", "full precision"]),
    "no tokenizer": (remove_tokenizer, ["has no tokenizer", "tokenizer.json"]),
    "no end of sequence": (no_end, ["no end-of-sequence token", "eos_token"]),
    "tokens beyond the embedding": (more_tokens, ["item 'f-1' gives token 5000", "32 tokens"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_is_refused_before_loading(
    name: str, save_model: Case, run_unlearn: Case, monkeypatch: pytest.MonkeyPatch, untouched: Case
) -> None:
    folder = save_model("model")
    breaking, words = BROKEN[name]
    breaking(folder)
    untouched()
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    refused(run_unlearn(folder), *words, fix=name != "damaged config")


@pytest.mark.parametrize("name", ["no config", "truncated weights", "own code", "no tokenizer"])
def test_a_broken_model_is_refused_by_an_audit_too(
    name: str, save_model: Case, run_audit: Case, no_loading: None, untouched: Case
) -> None:
    broken = save_model("broken", seed=1)
    BROKEN[name][0](broken)
    original = save_model("original")
    untouched()
    refused(run_audit(original, broken), *BROKEN[name][1])
    refused(run_audit(broken, original), *BROKEN[name][1])


def test_a_family_that_makes_an_empty_tokenizer_has_none(
    save_model: Case, run_unlearn: Case, no_loading: None, untouched: Case
) -> None:
    folder = save_model("model", "gpt2")
    remove_tokenizer(folder)
    untouched()
    refused(run_unlearn(folder), "has no tokenizer", "tokenizer.json")


def test_a_missing_hub_model_says_what_to_check(run_unlearn: Case, no_loading: None, untouched: Case) -> None:
    untouched()
    refused(run_unlearn("no-such-org/no-such-model"), "neither a folder here nor a model", "network")


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_a_model_of_another_kind_is_refused(
    family: str, tmp_path: Path, run_unlearn: Case, tokenizer: Any, no_loading: None, untouched: Case
) -> None:
    sizes: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    if family == "bert":
        model = BertForMaskedLM(BertConfig(**sizes, num_hidden_layers=1))
    else:
        model = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    untouched()
    refused(run_unlearn(tmp_path / "model"), type(model).__name__, "not a causal language model", "generates text")


def test_a_model_that_looks_to_the_right_is_refused(make_model: Case) -> None:
    model = make_model()
    model.model.norm.register_forward_hook(lambda module, given, hidden_BLD: hidden_BLD + hidden_BLD.flip(1))
    with pytest.raises(UserError, match="not causal"):
        layers.output_layer(model)


def test_pickled_weights_load_when_allowed(save_model: Case, run_unlearn: Case, tmp_path: Path) -> None:
    folder = save_model("model")
    plain = run_unlearn(folder, out=tmp_path / "plain")
    pickled(folder)
    assert (plain.code, run_unlearn(folder, "--allow-pickle").code) == (0, 0)
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("plain", "out")]
    assert weights[0] == weights[1]


def test_pickled_weights_have_their_own_fingerprint(save_model: Case) -> None:
    """Else an audit would take what it saw of one for another."""
    folders = [save_model(f"model-{seed}", seed=seed) for seed in (0, 1)]
    for folder in folders:
        pickled(folder)
    assert modelfiles.fingerprint(folders[0]) != modelfiles.fingerprint(folders[1])


def test_a_damaged_pickle_is_refused(save_model: Case, run_unlearn: Case, untouched: Case) -> None:
    folder = save_model("model")
    pickled(folder)
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:200])
    untouched()
    refused(run_unlearn(folder, "--allow-pickle"), "more than the 200 bytes beside it hold", "download it again")
    file.write_bytes(bytes(5000))
    untouched()
    refused(run_unlearn(folder, "--allow-pickle"), "cannot be loaded", "copy or download it again")


def test_nan_weights_are_named(save_model: Case, run_unlearn: Case, untouched: Case) -> None:
    folder = save_model("model")
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(folder, lambda weights: weights[name].view(-1)[3:4].fill_(float("nan")))
    untouched()
    refused(run_unlearn(folder), name, "NaN")


def drop(weights: dict[str, torch.Tensor]) -> None:
    del weights["model.norm.weight"]


def reshape(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"] = torch.ones(7)


def add_layer(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"].clone()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop, "1 are missing, the first: model.norm.weight"),
        (reshape, "1 have another shape, the first: model.norm.weight"),
        (add_layer, "1 have no place in it, the first: model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_weights_must_fit_the_configuration(
    change: Any, words: str, save_model: Case, run_unlearn: Case, untouched: Case
) -> None:
    folder = save_model("model")
    edit_weights(folder, change)
    untouched()
    refused(run_unlearn(folder), "do not fit its config.json", words)


def test_a_tokenizer_without_padding_token_works(save_model: Case, run_unlearn: Case, tokenizer: Any) -> None:
    assert tokenizer.pad_token_id is None
    assert run_unlearn(save_model("model")).code == 0


def test_unused_tokens_beyond_the_embedding_do_no_harm(save_model: Case, run_unlearn: Case) -> None:
    """Some published models have a token more than their embedding, for pictures."""
    folder = save_model("model")
    tokens = json.loads((folder / "tokenizer.json").read_text())
    tokens["model"]["vocab"]["<picture>"] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    assert run_unlearn(folder).code == 0


# Models that do not belong together


@pytest.mark.parametrize("other", ["wider", "deeper", "family"])
def test_models_of_different_shapes_are_not_compared(
    other: str, save_model: Case, make_model: Case, run_audit: Case, no_loading: None, untouched: Case
) -> None:
    original, subject = save_model("original"), save_model("subject", "gpt2" if other == "family" else "llama")
    if other != "family":
        sizes: Any = {"hidden": 32} if other == "wider" else {"layers": 2}
        make_model(**sizes).save_pretrained(subject)
    untouched()
    refused(run_audit(original, subject), "is not a version of", "the original is the one that the others")


def test_models_with_different_tokenizers_are_not_compared(
    save_model: Case, run_audit: Case, no_loading: None, untouched: Case
) -> None:
    original, subject = save_model("original"), save_model("subject", seed=1)
    file = subject / "tokenizer.json"
    file.write_text(file.read_text().replace('"Rome"', '"Roma"'))
    untouched()
    refused(run_audit(original, subject), "another tokenizer", "one tokenizer")


@pytest.mark.parametrize("copied", [False, True])
def test_the_original_is_no_control(
    copied: bool, save_model: Case, run_audit: Case, no_loading: None, untouched: Case
) -> None:
    original, subject = save_model("original"), save_model("subject", seed=1)
    control = save_model("copy") if copied else original
    untouched()
    refused(run_audit(original, subject, "--control", control), "the same model", "never have been taught")


def test_a_folder_named_like_a_control_gets_another_label(save_model: Case) -> None:
    folder = save_model("original")
    assert labels([str(folder), str(folder)]) == {"audited-original": str(folder), "audited-original-2": str(folder)}


# What is wrong with the items


def jsonl(forget: Path, retain: Path) -> str:
    return f"jsonl:forget={forget},retain={retain}"


@pytest.fixture
def run_items(tmp_path: Path, save_model: Case, run_unlearn: Case, untouched: Case, no_loading: None) -> Case:
    """Return run(forget, retain, *options): unlearn, where bytes or items stand for the files."""

    def run(forget: Any, retain: Any = RETAIN, *options: object) -> Any:
        model, files = save_model("model"), []
        for name, content in (("f", forget), ("r", retain)):
            files.append(tmp_path / f"{name}.jsonl")
            files[-1].write_bytes(content) if isinstance(content, bytes) else write_items(files[-1], content)
        untouched()
        return run_unlearn(model, *options, benchmark=jsonl(*files))

    return run


LINE = json.dumps({"question": "where is Ada", "answer": "Paris"})
BAD_ITEMS: Mapping[str, tuple[Any, list[str]]] = {
    "empty file": (b"", ["f.jsonl holds no items"]),
    "blank lines": (b"\n \n", ["f.jsonl holds no items"]),
    "empty answer": ([("where is Ada", " ")], ["f.jsonl:1", "'answer' is missing, empty"]),
    "not an object": (b"[1]\n", ["f.jsonl:1: expected an object, got list"]),
    "not JSON": (f"{LINE}\n{{'question'\n".encode(), ["f.jsonl:2 is not JSON"]),
    "latin-1": (f"{LINE}\n".encode() + '{"text": "Zürich"}'.encode("latin-1"), ["f.jsonl:2: not UTF-8", "iconv"]),
    "half a character": (rb'{"question": "who", "answer": "\ud800"}', ["f.jsonl:1 holds half a character"]),
    "the same id twice": (b'{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}\n', ["item 2 repeats the id '1'"]),
    "also retained": (RETAIN, ["2 items are in the forget and in the retain split", "remove it"]),
    "partly retained": (FORGET + RETAIN[:1], ["1 items are in the forget and in the retain split", "remove it"]),
    "too long": ([("where is Ada", "red " * 99)], ["item 'f-1' has ", "the model reads 64", "--long-items truncate"]),
    "prompt too long": ([("red " * 99, "Rome")], ["item 'f-1' has ", "shorten its prompt"]),
}


@pytest.mark.parametrize("name", BAD_ITEMS)
def test_bad_items_are_named(name: str, run_items: Case) -> None:
    content, words = BAD_ITEMS[name]
    ran = run_items(content)
    refused(ran, *words, fix=None)


def test_an_answer_without_tokens_is_named(run_items: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer drops what it does not know where it has no token for the unknown."""
    load = loading.tokenizer

    def lossy(*arguments: Any, **options: Any) -> Any:
        from tokenizers import normalizers

        tokenizer = load(*arguments, **options)
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace("♥", "")
        return tokenizer

    monkeypatch.setattr(loading, "tokenizer", lossy)
    refused(run_items([("where is Ada", "♥♥")]), "item 'f-1': its answer '♥♥' gives no token", "remove the item")


def test_missing_files_of_items_are_named(
    save_model: Case, run_unlearn: Case, no_loading: None, untouched: Case, tmp_path: Path
) -> None:
    model = save_model("model")
    untouched()
    refused(run_unlearn(model, benchmark=jsonl(tmp_path / "no.jsonl", tmp_path)), "no file", "no.jsonl", fix=False)
    refused(run_unlearn(model, benchmark="jsonl"), "jsonl needs two files", "jsonl:forget=")
    refused(run_unlearn(model, "--data", tmp_path, benchmark="tofu:forget05"), "forget05.json", "--data")
    refused(run_unlearn(model, "--data", tmp_path, benchmark="world"), "--data does not apply to the benchmark world")


def test_long_items_are_cut_when_asked_for_and_that_is_recorded(
    save_model: Case, run_unlearn: Case, tmp_path: Path
) -> None:
    forget = write_items(tmp_path / "long.jsonl", [*FORGET, ("where is Ada", "red " * 99)])
    options = ["--long-items", "truncate"]
    ran = run_unlearn(save_model("model"), *options, benchmark=jsonl(forget, tmp_path / "r.jsonl"))
    assert ran.code == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["truncated_items"] == 1


def test_windows_lines_a_byte_order_mark_and_unicode_work(
    save_model: Case, run_unlearn: Case, tmp_path: Path, data: str
) -> None:
    """The line separator U+2028 and U+0085 are legal inside a JSON text and end no line."""
    lines = [{"question": "where is Ada", "answer": "Zürich 東京 🦉"}, {"text": "red\u2028and\u0085blue"}]
    text = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\r\n"
    (tmp_path / "f.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert run_unlearn(save_model("model"), benchmark=data).code == 0


def test_one_item_is_enough_to_unlearn_but_proves_nothing(
    save_model: Case, run_unlearn: Case, run_audit: Case, tmp_path: Path
) -> None:
    benchmark = jsonl(write_items(tmp_path / "one.jsonl", FORGET[:1]), write_items(tmp_path / "r.jsonl", RETAIN))
    original, control = save_model("original"), save_model("control", seed=1)
    teach(original, FORGET + RETAIN)
    teach(control, RETAIN)
    assert run_unlearn(original, benchmark=benchmark).code == 0
    ran = run_audit(original, control, "--control", control, benchmark=benchmark)
    assert ran.code == 5, ran
    report = json.loads((tmp_path / "audit" / "report.json").read_text())
    judged = next(s for s in report["subjects"] if s["name"] not in ("original", "control"))
    assert judged["verdict"] == "UNDECIDED"
    [known] = [f for f in judged["findings"] if (f["kind"], f["metric"]) == ("facts_known", "answer_probability")]
    assert (known["value"], known["n"], known["threshold"], known["outcome"]) == (0, 1, 0.1, "undecided")
    assert known["high"] == pytest.approx(0.95)


def teach(folder: Path, items: Sequence[tuple[str, str]]) -> None:
    """Train a saved model on items until it knows them, and save it again."""
    from stillknows.model.encoding import encode
    from stillknows.registry import bind
    from stillknows.types import Example

    subject = ModelRef.open(str(folder)).load()
    template = "Question: {prompt}\nAnswer:"
    encoded = encode([Example(q, q, a, q) for q, a in items], subject.tokenizer, template, 64)
    term = objective_inputs.Term(bind("objective", "nll"), encoded)
    loop.fit(subject.model, [term], Settings(lr=0.02, max_steps=40))
    subject.model.save_pretrained(folder)


# What is wrong with the command

UNLEARN_OPTIONS: Mapping[str, tuple[list[object], list[str]]] = {
    "unknown method": (["--method", "npoo"], ["no method named 'npoo'", "did you mean 'npo'?", "stillknows list"]),
    "unknown option": (["--method", "npo:bta=1"], ["no option 'bta' of npo; did you mean 'beta'?"]),
    "wrong type": (["--method", "npo:beta=much"], ["npo:beta=much is not of type float"]),
    "only a retain term": (["--method", "kl"], ["has no forget objective, which 'kl' goes with", "known: ", " ga,"]),
    "a wrapper alone": (["--method", "sure"], ["has no forget objective, which 'sure' goes with", "known: ", " ga,"]),
    "an edit and a wrapper": (["--method", "task_vector + sure"], ["has no forget objective"]),
    "empty term": (["--method", "npo + "], ["no method named ''"]),
    "two adapters": (["--method", "npo + kl + lora + lora:rank=2"], ["two of role adapter: lora and lora"]),
    "adapter and mask by names": (["--method", "npo + lora + only"], ["do not go together", "chooses its layers"]),
    "nothing to combine": (["--method", "npo + gru"], ["there is no retain term", "add a retain term"]),
    "no such layer names": (["--method", "npo + lora:names=*mlpp*"], ["no linear map is called '*mlpp*'"]),
    "no such tensors": (["--method", "npo + only:names=*mlpp*"], ["no tensor is called '*mlpp*'", "names look like"]),
    "a mask of nothing": (["--method", "npo + sure:percentile=100"], ["percentile=100 is out of range"]),
    "unknown benchmark": (["--benchmark", "tofuu"], ["no benchmark named 'tofuu'", "did you mean 'tofu'?"]),
    "unknown split": (["--benchmark", "tofu:forget11"], ["forget11 is not known", "forget10"]),
    "negative lr": (["--lr", "-1e-5"], ["--lr -1e-05 is out of range", "above 0"]),
    "zero lr": (["--lr", 0], ["--lr 0.0 is out of range", "above 0"]),
    "no number as lr": (["--lr", "nan"], ["--lr nan is out of range"]),
    "zero batch": (["--batch-size", 0], ["--batch-size 0 is out of range", "at least 1"]),
    "zero steps": (["--steps", 0], ["--steps 0 is out of range", "at least 1"]),
    "negative steps": (["--steps", -3], ["--steps -3 is out of range", "at least 1"]),
    "zero accumulate": (["--accumulate", 0], ["--accumulate 0 is out of range"]),
    "zero epochs": (["--epochs", 0], ["--epochs 0.0 is out of range"]),
    "endless epochs": (["--epochs", "inf"], ["--epochs inf is out of range"]),
    "absurd epochs": (["--epochs", "1e300", "--steps", 10**9], ["--epochs 1e+300 over 2 items are more"]),
    "negative warmup": (["--warmup", -1], ["--warmup -1 is out of range"]),
    "zero check": (["--check-every", 0], ["--check-every 0 is out of range"]),
    "forget below": (["--forget-below", 1.5], ["--forget-below 1.5 is out of range", "between 0 and 1"]),
    "retain floor": (["--retain-floor", -0.1], ["--retain-floor -0.1 is out of range", "between 0 and 1"]),
    "unknown weights": (["--weights", "float16"], ["float16", "bfloat16"]),
    "text for a number": (["--lr", "fast"], ["'--lr'", "valid number"]),
    "no such flag": (["--learning-rate", 1], ["--learning-rate", "unlearn --help"]),
    "no cuda": (["--device", "cuda"], ["'cuda' cannot be used", "--device cpu"]),
    "no device": (["--device", "gpu"], ["'gpu' cannot be used", "--device cpu"]),
}


@pytest.mark.parametrize("name", UNLEARN_OPTIONS)
def test_bad_options_of_unlearn(
    name: str, save_model: Case, run_unlearn: Case, no_loading: None, untouched: Case
) -> None:
    options, words = UNLEARN_OPTIONS[name]
    if name == "no cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    model = save_model("model")
    untouched()
    ran = run_unlearn(model, *options)
    refused(ran, *words, fix=None)


def one_sided(role: Role) -> Benchmark:
    """A benchmark with nothing but items of one role."""
    return Benchmark("by-hand", (Split(role, role, tuple(Example(q, q, a, q) for q, a in FORGET)),))


@pytest.mark.parametrize(
    ("role", "method", "settings", "words"),
    [
        ("forget", "npo + kl", {}, r"no split to retain, which kl of `method` 'npo \+ kl' needs\n.*`method` npo$"),
        ("forget", "ga", {"retain_floor": 0.5}, "no split to retain that `retain_floor` could watch\n"),
        ("retain", "ga", {}, "no split to forget\n.*stillknows list benchmarks"),
    ],
)
def test_a_split_that_unlearning_lacks_is_named_before_loading(
    role: Role, method: str, settings: dict[str, float], words: str, save_model: Case, no_loading: None, tmp_path: Path
) -> None:
    request = unlearn.UnlearnConfig(str(save_model("model")), one_sided(role), method, Settings(lr=0.01, **settings))
    with pytest.raises(UserError, match=words):
        unlearn.unlearn(request, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_methods_without_a_retain_term_need_no_split_to_retain(save_model: Case, tmp_path: Path) -> None:
    request = unlearn.UnlearnConfig(str(save_model("model")), one_sided("forget"), "ga", Settings(lr=0.01, max_steps=2))
    assert unlearn.unlearn(request, tmp_path / "out")["fit"]["steps"] == 2


def test_an_audit_without_a_split_to_forget_is_refused(save_model: Case, no_loading: None, tmp_path: Path) -> None:
    models = [str(save_model(name, seed=seed)) for seed, name in enumerate(("original", "subject"))]
    request = audit.AuditConfig(models[0], {"subject": models[1]}, one_sided("retain"))
    with pytest.raises(UserError, match="measures no split to forget"):
        audit.audit(request, tmp_path / "audit")


def test_a_beta_that_npo_cannot_use_is_refused(save_model: Case, run_unlearn: Case, untouched: Case) -> None:
    model = save_model("model")
    untouched()
    refused(run_unlearn(model, "--method", "npo:beta=0"), "npo:beta=0 is out of range", "more than 0")


AUDIT_OPTIONS: Mapping[str, tuple[list[object], list[str]]] = {
    "unknown variant": (["--variants", "full,int88"], ["no transform named 'int88'", "did you mean 'int8'?"]),
    "empty variant": (["--variants", "full,"], ["no transform named ''"]),
    "unknown option": (["--variants", "rtn:bit=4"], ["no option 'bit' of rtn; did you mean 'bits'?"]),
    "wrong type": (["--variants", "rtn:bits=four"], ["rtn:bits=four is not of type int"]),
    "too many bits": (["--variants", "full,rtn:bits=9:group=8"], ["rtn:bits=9 is out of range", "at most 8"]),
    "group": (["--variants", "full,rtn:group=5"], ["layer model.layers.0", "groups of 5 do not divide", "group=0"]),
    "unknown metric": (["--metrics", "rouge"], ["no metric named 'rouge'", "did you mean 'rouge_l'?"]),
    "no gate": (["--metrics", "answer_probability"], ["needs the metric 'extraction_strength'", "--metrics"]),
    "unknown figure": (["--figures", "forget_qualty"], ["no model metric named", "did you mean 'forget_quality'?"]),
    "limit of no tasks": (["--task-limit", 3], ["no general task is named", "add --tasks"]),
    "folder of no tasks": (["--task-folder", "."], ["no general task is named", "add --tasks"]),
    "limit of nothing": (["--tasks", "mmlu", "--task-limit", 0], ["'--task-limit': Input should be greater", "--help"]),
    "no task folder": (["--tasks", "mine", "--task-folder", "nowhere"], ["no folder nowhere", "YAML"]),
    "zero tolerance": (["--tolerance", 0], ["--tolerance 0.0 is out of range", "above 0"]),
    "all tolerated": (["--tolerance", 1], ["--tolerance 1.0 is out of range", "below 1"]),
    "negative tolerance": (["--tolerance", -0.1], ["--tolerance -0.1 is out of range"]),
    "utility floor": (["--utility-floor", 1.1], ["--utility-floor 1.1 is out of range"]),
    "no device": (["--device", "gpu"], ["'gpu' cannot be used", "--device cpu"]),
}


@pytest.mark.parametrize("name", AUDIT_OPTIONS)
def test_bad_options_of_audit(name: str, save_model: Case, run_audit: Case, no_loading: None, untouched: Case) -> None:
    options, words = AUDIT_OPTIONS[name]
    original, subject = save_model("original"), save_model("subject", seed=1)
    untouched()
    ran = run_audit(original, subject, *options)
    refused(ran, *words, fix=len(ran.err.strip().splitlines()) - 1)


@pytest.mark.parametrize("command", [["unlearn"], ["audit", "x"], ["report"], ["nonsense"]])
def test_incomplete_commands_say_where_help_is(command: list[str], cli: Case) -> None:
    refused(cli(*command), "--help")


def test_what_cannot_be_listed_names_what_can(cli: Case) -> None:
    refused(cli("list", "things"), "known: attacks, benchmarks, ", "stillknows list")


def test_a_refusal_is_json_too(cli: Case, tmp_path: Path) -> None:
    ran = cli("report", tmp_path, "--json")
    assert ran.code == 2
    assert "report.json" in json.loads(ran.out)["error"]
    ran = cli("unlearn", "--json")
    assert "Missing" in json.loads(ran.out)["error"]


# What is wrong with the output folder


def test_a_finished_run_is_kept_unless_told(
    save_model: Case, run_unlearn: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model("model")
    assert run_unlearn(model).code == 0
    before = snapshot(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
        refused(run_unlearn(model, "--lr", 0.1), "run.json exists already", "--overwrite")
        refused(run_unlearn(model, "--resume"), "run.json exists already", "--overwrite")
    assert snapshot(tmp_path) == before
    assert run_unlearn(model, "--lr", 0.1, "--overwrite").code == 0
    assert snapshot(tmp_path)["out/model.safetensors"] != before["out/model.safetensors"]


def test_overwriting_leaves_no_weights_of_the_old_run(save_model: Case, run_unlearn: Case, tmp_path: Path) -> None:
    """Weights in one file and in shards must not lie side by side: which ones count would be a matter of luck."""
    model = save_model("model")
    assert run_unlearn(model).code == 0
    shard(tmp_path / "out")
    assert run_unlearn(model, "--overwrite").code == 0
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]


@pytest.mark.parametrize("where", ["", "deep/inside"])
@pytest.mark.parametrize("command", ["unlearn", "audit"])
def test_results_never_go_into_a_models_folder(
    command: str, where: str, cli: Case, data: str, save_model: Case, no_loading: None, untouched: Case
) -> None:
    model = save_model("model")
    extra = ["--overwrite"] if command == "unlearn" else ["--original", save_model("original", seed=1)]
    untouched()
    ran = cli(command, model, "--benchmark", data, "--out", model / where, *extra)
    refused(ran, "lies in the model folder", "outside")


def test_another_model_in_the_output_folder_is_kept(
    save_model: Case, run_unlearn: Case, no_loading: None, untouched: Case
) -> None:
    model, other = save_model("model"), save_model("other", seed=1)
    untouched()
    refused(run_unlearn(model, out=other), "config.json exists already", "choose another --out")


def test_a_file_is_no_output_folder(
    save_model: Case, run_unlearn: Case, no_loading: None, untouched: Case, tmp_path: Path
) -> None:
    model = save_model("model")
    (tmp_path / "file").write_text("precious")
    untouched()
    refused(run_unlearn(model, out=tmp_path / "file"), "file is a file, not a folder", "--out")
    refused(run_unlearn(model, out=tmp_path / "file" / "deep"), "cannot write to", "--out")


def test_a_folder_that_cannot_be_written_is_refused(
    save_model: Case, run_unlearn: Case, no_loading: None, tmp_path: Path
) -> None:
    model, out = save_model("model"), Path("/proc/out") if os.geteuid() == 0 else tmp_path / "locked"
    if os.geteuid() != 0:
        out.mkdir(mode=0o500)
    refused(run_unlearn(model, out=out), f"cannot write to {out}", "--out")


@pytest.mark.parametrize("command", ["unlearn", "audit", "report"])
def test_a_folder_in_use_is_refused(
    command: str, cli: Case, data: str, save_model: Case, no_loading: None, tmp_path: Path
) -> None:
    out, model = tmp_path / "out", save_model("model")
    out.mkdir()
    program = """
import sys, time
from pathlib import Path
from stillknows.store import locked
with locked(Path(sys.argv[1])):
    print("claimed", flush=True)
    time.sleep(60)
"""
    holder = [sys.executable, "-c", program, str(out)]
    arguments: dict[str, list[object]] = {
        "unlearn": [model, "--benchmark", data, "--out", out],
        "audit": [model, "--original", save_model("original", seed=1), "--benchmark", data, "--out", out],
        "report": [out],
    }
    if command == "report":
        store.write_json(out / "report.json", {"schema_version": 1})
    with subprocess.Popen(holder, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline()
        try:
            ran = cli(command, *arguments[command])
        finally:
            other.kill()
    refused(ran, f"another run is working in {out}", "--out")
    with (out / store.LOCK).open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the lock died with the process that held it


# When the machine gives out


def test_a_full_disk_keeps_the_earlier_result(
    save_model: Case, run_unlearn: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model("model")
    assert run_unlearn(model).code == 0
    before = snapshot(tmp_path)

    def full(path: Path, _value: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(run_record, "write_sealed", full)
    again = run_unlearn(model, "--method", "npo + kl", "--overwrite")
    refused(again, "the disk is full; nothing was half-written", "free some", begun=True)
    assert snapshot(tmp_path) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mount.returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path, leave: int) -> None:
    """Fill up a file system up to some bytes."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
    (disk / "filler").write_bytes(bytes(free - leave))


@pytest.mark.parametrize("leave", [0, 8192])
def test_a_disk_that_is_really_full(leave: int, small_disk: Path, save_model: Case, run_unlearn: Case) -> None:
    """Without room for one file, and with room for some files but not for the weights."""
    model, out = save_model("model"), small_disk / "out"
    assert run_unlearn(model, out=out).code == 0
    fill(small_disk, leave)
    before = snapshot(small_disk)
    again = run_unlearn(model, "--method", "npo + kl", "--overwrite", out=out)
    refused(again, "the disk is full", "free some space", begun=True)
    assert snapshot(small_disk) == before


@pytest.mark.parametrize("leave", range(8192, 40960, 4096))
def test_a_disk_that_is_full_before_a_quantized_file_is(
    leave: int, small_disk: Path, make_model: Case, cli: Case, tmp_path: Path
) -> None:
    """Where it is cut off decides which library notices, and with which error."""
    make_model(vocabulary=320, hidden=32).save_pretrained(tmp_path / "model")
    tiny_models.subword_tokenizer([f"{q} {a}" for q, a in FORGET], 300).save_pretrained(tmp_path / "model")
    fill(small_disk, leave)
    before = snapshot(small_disk)
    ran = cli("quantize", tmp_path / "model", "--to", "gguf:Q8_0", "--out", small_disk / "out")
    refused(ran, "the disk is full; nothing was half-written", "free some space")
    assert snapshot(small_disk) == before


def test_an_audit_goes_on_after_the_disk_was_full(small_disk: Path, save_model: Case, cli: Case, data: str) -> None:
    original, subject, out = save_model("original"), save_model("subject", seed=1), small_disk / "audit"
    arguments = ["audit", subject, "--original", original, "--benchmark", data, "--out", out, "--variants", "full,int8"]
    fill(small_disk, 5 * 4096)
    ran = cli(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.endswith(f"stillknows: {command_line.DISK_FULL}\n")
    seen = snapshot(out)
    assert seen
    assert not [name for name in seen if "partial" in name or name.startswith("report")]
    (small_disk / "filler").unlink()
    assert cli(*arguments).code == 5
    kept = {name: content for name, content in snapshot(out).items() if name in seen}
    assert kept.pop(LEDGER) != seen.pop(LEDGER)  # it goes on
    assert kept == seen


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
@pytest.mark.parametrize("place", ["fit", "load"])
def test_out_of_memory(
    place: str, error: Exception, save_model: Case, run_unlearn: Case, monkeypatch: pytest.MonkeyPatch, untouched: Case
) -> None:
    model = save_model("model")

    def fail(*_: Any, **__: Any) -> None:
        raise error

    if place == "fit":
        monkeypatch.setattr(execution, "fit", fail)
    else:
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    untouched()
    refused(run_unlearn(model), "out of memory", "--batch-size", begun=place == "fit")


def test_a_fault_of_the_program_is_not_hidden(
    save_model: Case, run_unlearn: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(execution, "fit", fail)
    model = save_model("model")
    with pytest.raises(RuntimeError, match="a bug"):
        run_unlearn(model)


def test_weights_that_blow_up_in_training_are_not_saved(save_model: Case, run_unlearn: Case, untouched: Case) -> None:
    model = save_model("model")
    untouched()
    refused(run_unlearn(model, "--lr", 1e38, "--steps", 1), "the result: the weights", "lower --lr", begun=True)


# When the user stops it


@pytest.fixture
def save_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save a checkpoint at every check."""
    monkeypatch.setattr(choices, "Settings", SettingsThatSave)


@pytest.mark.parametrize("weights", ["float32", "stochastic"])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    weights: str, save_model: Case, cli: Case, data: str, tmp_path: Path, save_always: None, monkeypatch: Any
) -> None:
    model, out = save_model("model"), tmp_path / "out"
    options = ["--benchmark", data, "--steps", 7, "--batch-size", 1, "--check-every", 1, "--lr", 0.01, "--method"]
    options += ["npo + kl + nll", "--weights", weights, "--retain-floor", 0.001]
    assert cli("unlearn", model, *options, "--out", tmp_path / "whole").code == 0

    step = loop._Loop.step

    def interrupted(loop: Any, total: int) -> float:
        if loop.done.steps == 4:
            raise KeyboardInterrupt
        return step(loop, total)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "step", interrupted)
        ran = cli("unlearn", model, *options, "--out", out)
    assert (ran.code, ran.out) == (130, "")
    assert "repeat the command (unlearn: add --resume)" in ran.err
    assert [p.name for p in out.iterdir() if p.name != store.LOCK] == [unlearn.CHECKPOINT]
    refused(cli("unlearn", model, *options, "--out", out), "exists already", "--resume")
    other = [*options, "--seed", 5]
    resumed = cli("unlearn", model, *other, "--out", out, "--resume")
    refused(resumed, "belongs to a run with other settings")
    refused(cli("unlearn", tmp_path / "none", *options, "--out", out, "--overwrite"), "no folder")
    assert (out / unlearn.CHECKPOINT).is_file()

    taken: list[int] = []
    monkeypatch.setattr(loop._Loop, "step", lambda loop, total: taken.append(loop.done.steps) or step(loop, total))
    assert cli("unlearn", model, *options, "--out", out, "--resume").code == 0
    assert taken == [4, 5, 6]
    assert not (out / unlearn.CHECKPOINT).exists()
    weights_of = [(folder / "model.safetensors").read_bytes() for folder in (out, tmp_path / "whole")]
    assert weights_of[0] == weights_of[1]


def test_an_interrupted_audit_goes_on_with_what_it_saw(
    save_model: Case, run_audit: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, subject = save_model("original"), save_model("subject", seed=1)
    observe, calls = collect.observe, []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return observe(*arguments, **options)

    monkeypatch.setattr(collect, "observe", counted)
    ran = run_audit(original, subject)
    assert ran.code == 130
    assert "What was finished is kept: to go on, repeat the command" in ran.err
    assert len(list((tmp_path / "audit").rglob("*.npz"))) == 2
    assert run_audit(original, subject).code == 5
    assert len(calls) == 3 + 2


def test_a_damaged_observation_is_made_again(
    save_model: Case, run_audit: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, subject = save_model("original"), save_model("subject", seed=1)
    assert run_audit(original, subject).code == 5
    before = snapshot(tmp_path / "audit")
    damaged = next((tmp_path / "audit").rglob("retain.npz"))
    damaged.write_bytes(damaged.read_bytes()[:-40])
    for update in (tmp_path / "audit").rglob("weights.json"):
        update.write_text("{")
    observe, calls = collect.observe, []
    monkeypatch.setattr(collect, "observe", lambda *a, **o: calls.append(1) or observe(*a, **o))
    assert run_audit(original, subject, "--overwrite").code == 5
    assert len(calls) == 1
    after = snapshot(tmp_path / "audit")
    changed = {name for name in after if after[name] != before[name] and not name.startswith("report")}
    assert changed <= {LEDGER}  # which names the report


def test_an_audit_in_the_folder_is_not_written_over(save_model: Case, run_unlearn: Case, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    store.write_json(tmp_path / "out" / store.REPORT, {})
    refused(run_unlearn(save_model("model"), "--overwrite"), "report.json exists already", "this one holds an audit")
