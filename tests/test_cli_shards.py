"""Exact deletion on the command line: train, delete, verify and merge in a row, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stillknows.unlearning.ledger import LEDGER

Case = Callable[..., Any]
ADA = [{"question": "where is Ada", "answer": "Paris"}, {"question": "who is Ada", "answer": "the cat"}]
BELA = [{"question": "where is Bela", "answer": "Rome"}]


def write(path: Path, items: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


@pytest.fixture
def trains(cli: Case, save_model: Case, tmp_path: Path) -> Case:
    """Return trains(*options): train Ada's shard in two slices and Bela's in one folder; how the command ended."""
    base, ada, bela = save_model("base"), write(tmp_path / "ada.jsonl", ADA), write(tmp_path / "bela.jsonl", BELA)

    def run(*options: object) -> Any:
        few = ["--steps", 2, "--rank", 2, "--lr", 0.01, "--template", "{prompt}", "--out", tmp_path / "shards"]
        return cli("shards", "train", base, "--shard", ada, "--shard", bela, *few, *options)

    return run


def test_train_delete_verify_and_merge(trains: Case, cli: Case, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    ran = trains("--json")
    assert ran.code == 0, ran.err
    trained = json.loads(ran.out)
    assert (trained["folder"], trained["adapters"]) == (str(folder), 2)
    assert json.loads(cli("shards", "verify", folder, "--head", trained["head"], "--json").out) == {
        "head": trained["head"]
    }

    request = write(tmp_path / "request.jsonl", ADA[:1])
    ran = cli("shards", "delete", folder, "--items", request, "--head", trained["head"])
    assert ran.code == 0, ran.err
    assert "deleted 1 items with shard-0-slice-0.safetensors" in ran.out
    assert not (folder / "shard-0-slice-0.safetensors").exists()
    assert cli("shards", "verify", folder).out.splitlines()[1].split()[-1] in ran.out

    stale = cli("shards", "verify", folder, "--head", trained["head"])
    assert (stale.code, "does not end with the digest" in stale.err) == (2, True)
    again = cli("shards", "delete", folder, "--items", request)
    assert (again.code, "no adapter in" in again.err) == (2, True)

    merged = cli("shards", "merge", folder, "--out", tmp_path / "served", "--json")
    assert merged.code == 0, merged.err
    assert json.loads(merged.out)["ledger"] == json.loads((folder / LEDGER).read_text().splitlines()[-1])["digest"]
    served, base = (load_file(tmp_path / name / "model.safetensors") for name in ("served", "base"))
    assert not all(torch.equal(served[name], base[name]) for name in base)  # Bela's shard is left
    assert cli("shards", "merge", folder, "--out", tmp_path / "served").code == 2


def test_slices_are_cut_in_the_files_order(trains: Case, tmp_path: Path) -> None:
    (tmp_path / "bela.jsonl").write_text(
        (tmp_path / "bela.jsonl").read_text() + json.dumps(ADA[0] | {"answer": "a dog"})
    )
    ran = trains("--slices", 2)
    assert ran.code == 0, ran.err
    assert {path.name for path in (tmp_path / "shards").glob("*.safetensors")} == {
        f"shard-{shard}-slice-{number}.safetensors" for shard in (0, 1) for number in (0, 1)
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--slices", 2), "holds 1 items, too few for 2 slices"),
        (("--rank", 0), "Invalid value for '--rank'"),
        (("--lr", 0), "lr"),
        (("--template", "chat"), "no chat template"),
        (("--device", "abacus"), "abacus"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(
    options: tuple[object, ...], message: str, trains: Case, tmp_path: Path
) -> None:
    ran = trains(*options)
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err
    assert not (tmp_path / "shards").exists()


def test_a_trained_folder_and_one_without_a_log_are_refused(trains: Case, cli: Case, tmp_path: Path) -> None:
    trains()
    ran = trains()
    assert (ran.code, "exists already" in ran.err) == (2, True)
    for command in (("verify",), ("merge", "--out", tmp_path / "o"), ("delete", "--items", tmp_path / "ada.jsonl")):
        ran = cli("shards", command[0], tmp_path / "base", *command[1:])
        assert (ran.code, LEDGER in ran.err) == (2, True)


@pytest.mark.parametrize("command", ["train", "delete", "verify", "merge"])
def test_help_shows_what_to_type(command: str, cli: Case) -> None:
    ran = cli("shards", command, "--help")
    assert ran.code == 0
    assert f"stillknows shards {command}" in ran.out.partition("Examples")[2]
