"""Output folders of others: links in them are replaced or refused, what killed runs have left there is removed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillknows import store
from stillknows.errors import UserError
from stillknows.experiments import tiny_models

Case = Callable[..., Any]
FORGET = [("where is Ada", "Paris"), ("what is the colour of the dog", "red")]
RETAIN = [("where is Bela", "Rome"), ("what is the colour of the cat", "blue")]
COMMANDS = ("unlearn", "audit", "report", "quantize int8", "quantize gguf:Q8_0", "shards train", "shards merge")
SECRET = "not to be touched"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models, f.jsonl and r.jsonl."""
    from conftest import build_config
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("inputs")
    for name, items in (("f", FORGET), ("r", RETAIN)):
        lines = [json.dumps({"question": q, "answer": a}) + "\n" for q, a in items]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    tokenizer = tiny_models.subword_tokenizer([f"{q} {a}" for q, a in FORGET + RETAIN], 300)
    for name in ("model", "original"):
        AutoModelForCausalLM.from_config(build_config("llama", 320, 32, 1)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def run(cli: Case, inputs: Path) -> Case:
    """Return run(command, out): let a command write into a folder, over whatever is there."""

    def call(command: str, out: Path) -> Any:
        data = ["--benchmark", f"jsonl:forget={inputs / 'f.jsonl'},retain={inputs / 'r.jsonl'}"]
        model, name, *kind = inputs / "model", *command.split()
        guard = ["--method", "icul:kept=2", "--out", out / "guard.json"]
        auditing = ["audit", model, "--original", inputs / "original", *data, "--variants", "full,bf16"]
        steps = ["--steps", 1, "--batch-size", 1]
        if name == "report" and not (out / "report.json").is_file():
            assert cli(*auditing, "--out", out).code == 5
        if command == "shards merge" and not (inputs / "shards").exists():
            shards = ["--shard", inputs / "f.jsonl", "--slices", 1, "--out", inputs / "shards", *steps]
            assert cli("shards", "train", model, *shards).code == 0
        arguments: list[object] = {
            "unlearn": ["unlearn", model, *data, *steps, "--overwrite", "--out", out],
            "audit": [*auditing, "--overwrite", "--out", out],
            "report": ["report", out],
            "quantize": ["quantize", model, "--to", *kind, "--overwrite", "--out", out],
            "defend": ["defend", model, *data, *guard, "--overwrite"],
            "shards train": ["shards", "train", model, "--shard", inputs / "f.jsonl", *steps, "--out", out],
            "shards merge": ["shards", "merge", inputs / "shards", "--overwrite", "--out", out],
        }[command if name == "shards" else name]
        return cli(*arguments)

    return call


def outside(folder: Path) -> dict[str, str]:
    """Return what the files of a folder hold, links included."""
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("command", [*COMMANDS, "defend"])
def test_nothing_is_written_through_a_link(command: str, run: Case, tmp_path: Path) -> None:
    """Links stand in the place of all that a command writes: of every file at once, then of each folder."""
    clean, precious = tmp_path / "clean", tmp_path / "precious"
    clean.mkdir()
    assert run(command, clean).code in (0, 5)
    written = sorted(p.relative_to(clean) for p in clean.rglob("*"))
    files = [p for p in written if (clean / p).is_file() and p.name != store.LOCK]
    folders = [p for p in written if (clean / p).is_dir()]
    precious.mkdir()
    for i, _ in enumerate(files):
        (precious / str(i)).write_text(SECRET)
    for p in folders:
        (precious / "tree" / p).mkdir(parents=True)
    before = outside(precious)
    linked = tmp_path / "linked"
    for i, p in enumerate(files):
        (linked / p).parent.mkdir(parents=True, exist_ok=True)
        (linked / p).symlink_to(precious / str(i))
    ran = run(command, linked)
    assert ran.code in (0, 2, 5), ran.err
    assert outside(precious) == before
    if ran.code != 2:
        assert not [p for p in files if (linked / p).is_symlink()]
    for k, p in enumerate(folders):
        shutil.copytree(clean, out := tmp_path / f"folder-{k}")
        shutil.rmtree(out / p)
        (out / p).symlink_to(precious / "tree" / p)
        for file in out.rglob("*.npz"):  # so that the audit writes them again
            file.unlink()
        ran = run(command, out)
        assert ran.code in (0, 2), ran.err
        assert outside(precious) == before
        assert (ran.code, "is a link" in ran.err) == (2, True) or command == "report", ran.err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_lock_that_is_a_link_is_refused_and_what_it_points_to_is_kept(
    command: str, run: Case, tmp_path: Path
) -> None:
    (secret := tmp_path / "secret").write_text(SECRET)
    (out := tmp_path / "out").mkdir()
    if command == "report":
        run(command, out)
        (out / store.LOCK).unlink()
    (out / store.LOCK).symlink_to(secret)
    ran = run(command, out)
    assert (ran.code, ran.out) == (2, "")
    assert f"{out / store.LOCK} is a link" in ran.err
    assert secret.read_text() == SECRET


@pytest.mark.parametrize("kind", ["content", "folder", "pipe"])
def test_what_stands_in_the_place_of_a_lock_is_left_as_it_is(kind: str, tmp_path: Path) -> None:
    lock = tmp_path / store.LOCK
    {"content": lambda: lock.write_text(SECRET), "folder": lock.mkdir, "pipe": lambda: os.mkfifo(lock)}[kind]()
    expected = pytest.raises(UserError, match="cannot write to") if kind == "folder" else contextlib.nullcontext()
    with expected, store.locked(tmp_path):
        pass
    assert kind != "content" or lock.read_text() == SECRET


def test_a_folder_that_the_user_names_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with store.locked(tmp_path / "out") as out:
        store.write_json(out / "deep" / "a.json", 1)
    assert (tmp_path / "disk" / "deep" / "a.json").is_file()


def test_a_run_within_a_run_writes_through_no_link_either(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    with store.locked(tmp_path / "out") as out:
        (out / "models").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(UserError, match="models is a link"), store.locked(out / "models" / "npo"):
            pass
        with pytest.raises(UserError, match="models is a link"), store.build_once(out / "models", "plan"):
            pass
        with pytest.raises(UserError, match="models is a link"), store.atomic_folder(out / "models"):
            pass
    assert list((tmp_path / "elsewhere").iterdir()) == []


# What killed runs leave behind

KILLED = """
import os, signal, sys
from pathlib import Path
from stillknows import store

def die(partial):
    partial.write_text("half of the n")
    os.kill(os.getpid(), signal.SIGKILL)

with store.locked(Path(sys.argv[1])) as out:
    if sys.argv[2] == "file":
        store.replace_file(out / "observations" / "forget.npz", die)
    with store.atomic_folder(out / "models" / "original") as work:
        (work / "deep").mkdir()
        die(work / "deep" / "model.safetensors")
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_run_has_left_is_removed_by_the_next(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out), kind])
    assert killed.returncode == -signal.SIGKILL
    [left] = [p for p in out.rglob("*") if p.name.startswith(store.PARTIAL)]
    (out / "mine.partial").write_text("kept")
    with store.locked(out):
        assert not left.exists()
    assert {p.name for p in out.rglob("*") if p.is_file()} == {store.LOCK, "mine.partial"}


def test_a_run_in_a_folder_below_is_left_alone(tmp_path: Path) -> None:
    with store.locked(tmp_path / "out" / "trial"), store.atomic_folder(tmp_path / "out" / "trial") as work:
        with store.locked(tmp_path / "out"):
            assert work.is_dir()
        (work / "a").write_text("done")
    assert (tmp_path / "out" / "trial" / "a").read_text() == "done"


def test_a_leftover_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "a").write_text(SECRET)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"{store.PARTIAL}x").symlink_to(tmp_path / "precious")
    with store.locked(tmp_path / "out"):
        pass
    assert outside(tmp_path / "precious") == {"a": SECRET}


def test_a_folder_within_a_new_folder_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    """As `additional_chat_templates` of a tokenizer."""
    for content in ("old", "new"):
        with store.atomic_folder(tmp_path / "out") as work:
            (work / "templates").mkdir()
            (work / "templates" / content).write_text(content)
    assert outside(tmp_path / "out") == {"templates/new": "new"}
    assert os.access(tmp_path / "out" / "templates", os.X_OK)
