"""Every file that a command reads, damaged in every way: one message that names the file, exit code 2, no traceback.

The models are refused before any weights are loaded, and most before torch has anything to do.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

Case = Callable[..., Any]
DEEP = "[" * 100_000 + "]" * 100_000


def replaced(content: bytes | str) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content) and None


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "nowhere")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


ANY: dict[str, Callable[[Path], None]] = {
    "empty": replaced(b""),
    "binary": replaced(b"\xff\xfe\x00\xd8"),
    "folder": folder_instead,
    "dangling link": dangling,
}
JSON = ANY | {
    "truncated": cut,
    "not JSON": replaced("{'a': 1}"),
    "list": replaced("[1]"),
    "null": replaced("null"),
    "text": replaced('"text"'),
    "deep": replaced(f'{{"a": {DEEP}}}'),
    "deep for other parsers": replaced(f'{{"a": {"[" * 200 + "]" * 200}}}'),
    "huge number": replaced(f'{{"a": {"1" * 5000}}}'),
    "half a character": replaced(r'{"a": "\ud800"}'),
}
ITEMS = {name: change for name, change in JSON.items() if name != "text"}  # which is an item
WEIGHTS = ANY | {"truncated": cut, "long header": replaced(b"\xff" * 8 + b"{}"), "no header": replaced(b"\0" * 8)}
MODEL: dict[str, dict[str, Callable[[Path], None]]] = {
    **dict.fromkeys(("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"), JSON),
    **dict.fromkeys(("special_tokens_map.json", "added_tokens.json", "vocab.json", "adapter_config.json"), JSON),
    "model.safetensors.index.json": JSON,
    "model.safetensors": WEIGHTS,
    "chat_template.jinja": {name: change for name, change in ANY.items() if name != "empty"},
}
EXTRA = ("special_tokens_map.json", "added_tokens.json", "vocab.json", "adapter_config.json", "chat_template.jinja")


class Place(NamedTuple):
    """A model, the files beside it, and the commands that read them."""

    root: Path
    commands: dict[str, list[object]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, saved: Case) -> Place:
    root = tmp_path_factory.mktemp("hostile")
    saved(root / "model", seed=0)
    saved(root / "other", seed=1)
    saved(root / "run", seed=2)
    items = {"f": ("where is Ada", "Paris"), "r": ("where is Bela", "Rome")}
    for name, (question, answer) in items.items():
        (root / f"{name}.jsonl").write_text(json.dumps({"question": question, "answer": answer}) + "\n")
    (root / "refusals.txt").write_text("no\n")
    (root / "text.txt").write_text("the river flows to Rome . " * 50)
    items_ = f"jsonl:forget={root}/f.jsonl,retain={root}/r.jsonl,refusals={root}/refusals.txt"
    (root / "guard.json").write_text(suppression(root))
    model, out = root / "model", ["--out", root / "out"]
    audit = ["--original", model, "--benchmark", items_, "--variants", "full,gptq:group=8", *out]
    return Place(
        root,
        {
            "unlearn": ["unlearn", model, "--benchmark", items_, *out],
            "audit": ["audit", root / "other", *audit, "--calibration", root / "text.txt"],
            "audit of a suppression": ["audit", root / "guard.json", *audit],
            "quantize": ["quantize", model, "--to", "gptq:group=8", "--calibration", root / "text.txt", *out],
            "unlearn after a run": ["unlearn", model, "--benchmark", items_, "--after", root / "run", *out],
            "defend": [
                *("defend", model, "--benchmark", items_, "--method", "thrust", "--out", root / "out.json"),
                *("--passages", root / "passages.txt"),
            ],
            "verify": ["shards", "verify", root / "shards"],
            "score": ["score", root / "log.json", "--format", "muse"],
            "diagnose": ["diagnose", model, root / "other", "--formats", "rtn:group=8"],
        },
    )


def suppression(root: Path, **changes: object) -> str:
    item = {"id": "f-1", "prompt": "where is Ada", "answer": "Paris", "fact": "f-1"}
    content = {"stillknows": "0", "suppression": "guard", "model": str(root / "other"), "helpers": {}}
    return json.dumps({**content, "forget": [item], "retain": [], "passages": [], **changes})


def refused(ran: Any, *words: str) -> None:
    """Check that a command ended in one message that holds these words."""
    assert ran.code == 2, ran
    assert ran.out == ""
    assert ran.err.count("stillknows: ") == 1, ran.err
    lines = [line for line in ran.err.strip().splitlines() if not line.startswith("unlearning ")]
    assert len(lines) <= 2, ran.err
    for word in words:
        assert word in ran.err, (word, ran.err)


def tried(cli: Case, place: Place, command: str, file: Path, changes: dict[str, Callable[[Path], None]]) -> None:
    """Damage a file in each way and see the command refuse it by name; then put the file back."""
    content = file.read_bytes() if file.is_file() else None
    for name, damage in changes.items():
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content or b"{}")
        damage(file)
        try:
            refused(cli(*place.commands[command]), file.name)
        except AssertionError as error:
            raise AssertionError(f"{command}, {file.name}: {name}") from error
        finally:
            shutil.rmtree(file) if file.is_dir() else file.unlink()
            if content is not None:
                file.write_bytes(content)
    assert not (place.root / "out").exists()


@pytest.mark.parametrize("file", MODEL)
@pytest.mark.parametrize("command", ["unlearn", "audit", "quantize", "diagnose"])
def test_a_damaged_file_of_a_model_is_named(command: str, file: str, cli: Case, place: Place) -> None:
    tried(cli, place, command, place.root / "model" / file, MODEL[file])


BESIDE = {
    ("unlearn after a run", "run/run.json"): JSON,
    ("defend", "passages.txt"): ANY,
    ("verify", "shards/ledger.jsonl"): JSON,
    ("score", "log.json"): JSON,
    ("unlearn", "f.jsonl"): ITEMS,
    ("unlearn", "r.jsonl"): ITEMS,
    ("unlearn", "refusals.txt"): ANY,
    ("audit", "f.jsonl"): ITEMS,
    ("audit", "refusals.txt"): ANY,
    ("audit", "text.txt"): ANY,
    ("quantize", "text.txt"): ANY,
    ("audit of a suppression", "guard.json"): JSON,
}


@pytest.mark.parametrize(("command", "file"), BESIDE)
def test_a_damaged_file_beside_the_model_is_named(command: str, file: str, cli: Case, place: Place) -> None:
    tried(cli, place, command, place.root / file, BESIDE[command, file])


def edited(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BAD_REGEX = {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}
VALUES: list[tuple[str, dict[str, Any], str]] = [
    ("config.json", {"num_hidden_layers": 10**7}, "config.json says num_hidden_layers = 10,000,000, and the weight"),
    ("config.json", {"text_config": {"n_layers": 10**7}}, "config.json says n_layers = 10,000,000"),
    ("config.json", {"num_local_experts": 10**7}, "config.json says num_local_experts = 10,000,000"),
    ("config.json", {"vocab_size": 10**9}, "config.json describes a model of 32,000,0"),
    ("config.json", {"hidden_size": 2**40}, "config.json describes"),
    ("config.json", {"hidden_size": 10**300}, "config.json"),
    ("config.json", {"architectures": 5}, "config.json cannot be used"),
    ("config.json", {"quantization_config": [1]}, "config.json"),
    ("tokenizer_config.json", {"model_max_length": "many"}, "tokenizer_config.json: its model_max_length 'many' is no"),
    ("tokenizer_config.json", {"tokenizer_class": 5}, "no tokenizer that can be loaded"),
    ("tokenizer_config.json", {"eos_token": ["</s>"]}, "no tokenizer that can be loaded"),
    ("tokenizer_config.json", {"chat_template": [1]}, "no tokenizer that can be loaded"),
    ("tokenizer.json", {"pre_tokenizer": BAD_REGEX}, "no tokenizer that can be loaded: Oniguruma error"),
    ("tokenizer.json", {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}}, "Missing [UNK] token"),
    ("tokenizer.json", {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "A"}}, "Precompiled"),
    ("tokenizer.json", {"added_tokens": [1]}, "no tokenizer that can be loaded"),
]


@pytest.mark.parametrize(("file", "changes", "words"), VALUES, ids=range(len(VALUES)))
def test_an_absurd_value_in_a_file_of_a_model_is_named(
    file: str, changes: dict[str, Any], words: str, cli: Case, place: Place
) -> None:
    path = place.root / "model" / file
    content = path.read_text()
    edited(path, **changes)
    try:
        refused(cli(*place.commands["unlearn"]), words)
    finally:
        path.write_text(content)


@pytest.mark.parametrize("settings", [{"temperature": 0.5, "do_sample": False}, {"top_k": "hot"}])
def test_settings_for_generation_that_published_models_have_come_through(
    settings: dict[str, Any], saved: Case, tmp_path: Path
) -> None:
    """transformers refuses to write some of them, which would lose the trained model."""
    from stillknows.model import saving
    from stillknows.model.ref import ModelRef

    edited(saved(tmp_path / "model") / "generation_config.json", **settings)
    subject = ModelRef.open(str(tmp_path / "model")).load()
    (tmp_path / "out").mkdir()
    saving.save(subject.model, subject.tokenizer, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {name: written.get(name) for name in settings if settings[name]} == {k: v for k, v in settings.items() if v}
    ModelRef.open(str(tmp_path / "out")).load()


@pytest.mark.parametrize(
    "error", [OSError(12, "Cannot allocate memory"), RuntimeError("std::bad_alloc"), MemoryError()]
)
def test_memory_that_runs_out_while_a_model_is_read_is_no_fault_of_its_files(
    error: Exception, cli: Case, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    ran = cli(*place.commands["unlearn"])
    refused(ran, "out of memory", "a machine with more of it", "--device cpu")
    assert "download" not in ran.err


TOTAL = {"seconds": 1.0, "tokens": 1, "forward_tokens": 1, "flops": 1.0}
REQUEST = {"number": 1, "original": "abc", "earlier": [], "forgotten": ["d"], "total": TOTAL}
RECORDS: list[dict[str, Any]] = [
    {"request": 5},
    {"request": {}},
    {"request": REQUEST | {"earlier": 5}},
    {"request": REQUEST | {"earlier": [5]}},
    {"request": REQUEST | {"forgotten": 5}},
    {"request": REQUEST | {"total": {}}},
    {"request": REQUEST | {"total": TOTAL | {"flops": "many"}}},
    {"request": REQUEST, "benchmark": None},
]


@pytest.mark.parametrize("changes", RECORDS, ids=range(len(RECORDS)))
def test_a_record_that_is_not_as_it_was_written_is_named(changes: dict[str, Any], tmp_path: Path) -> None:
    from stillknows.errors import UserError
    from stillknows.store import write_sealed
    from stillknows.unlearning.sequence import follow

    record: dict[str, Any] = {"stillknows": "0", "model": "m", "benchmark": "b", "method": "ga", "request": REQUEST}
    write_sealed(tmp_path / "run.json", record)
    assert follow(tmp_path, "abc", "m").requests[0]["forgotten"] == ["d"]
    write_sealed(tmp_path / "run.json", {k: v for k, v in (record | changes).items() if v is not None})
    with pytest.raises(UserError, match=r"run\.json is not as .*\n.*repeat that run"):
        follow(tmp_path, "abc", "m")
