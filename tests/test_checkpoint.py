"""A run's checkpoint: what is damaged is refused, whatever was damaged, and gives no other weights."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SettingsThatSave

from stillknows.errors import UserError
from stillknows.training import loop
from stillknows.training.checkpoint import open_checkpoint, write_checkpoint
from stillknows.unlearning import choices, unlearn

Case = Callable[..., Any]
DAMAGES = 300  # of each kind


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint.safetensors"
    tensors = {
        "weights/a": torch.arange(12.0).reshape(3, 4),
        "weights/b": torch.ones(5, dtype=torch.bfloat16),
        "optimizer.step/a": torch.tensor(3.0),
        "state/none": torch.empty(0, 2),
        "state/flags": torch.tensor([True, False]),
        "rest/a": torch.arange(6, dtype=torch.int16).reshape(2, 3),
    }
    write_checkpoint(path, tensors, {"key": "plan", "fit": json.dumps({"steps": 3})})
    return path


def read(path: Path) -> tuple[dict[str, str], dict[str, tuple[torch.dtype, tuple[int, ...], list[Any]]]]:
    with open_checkpoint(path) as (texts, tensors):
        told = {name: text for name, text in texts.items() if name != "digest"}
        return told, {name: (value.dtype, tuple(value.shape), value.tolist()) for name, value in tensors}


def damages(whole: bytes) -> Iterator[bytes]:
    """Yield bytes changed, bits flipped and ends cut off, and pieces that are lost or doubled."""
    draw = random.Random(0)
    for _ in range(DAMAGES):
        place = draw.randrange(len(whole))
        yield whole[:place] + bytes([whole[place] ^ draw.randrange(1, 256)]) + whole[place + 1 :]
        yield whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :]
        yield whole[:place]
        yield whole[:place] + whole[place + draw.randrange(1, 9) :]
        yield whole[:place] + whole[max(0, place - draw.randrange(1, 9)) :]


def test_it_comes_back_as_it_was(stored: Path) -> None:
    texts, tensors = read(stored)
    assert texts == {"key": "plan", "fit": '{"steps": 3}'}
    assert tensors["weights/a"] == (torch.float32, (3, 4), [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]])
    assert len(tensors) == 6


def test_damage_of_any_kind_is_refused(stored: Path) -> None:
    before, refused = read(stored), 0
    for content in damages(stored.read_bytes()):
        stored.write_bytes(content)
        try:
            found = read(stored)
        except UserError as error:
            refused += "is damaged: it is not as it was written\n  begin anew with `overwrite`" in str(error)
        else:  # space between the parts of the header
            assert found == before
            refused += 1
    assert refused == 5 * DAMAGES


def test_what_carries_no_digest_is_refused(stored: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file(load_file(stored), stored, metadata={"key": "plan", "fit": "{}"})
    with pytest.raises(UserError, match="is damaged"):
        read(stored)


def test_tensors_that_changed_names_are_refused(stored: Path) -> None:
    content = stored.read_bytes()
    stored.write_bytes(content.replace(b"weights/a", b"weights/c"))
    with pytest.raises(UserError, match="is damaged"):
        read(stored)


@pytest.mark.parametrize("damage", ["byte", "cut", "empty", "text"])
def test_resuming_from_a_damaged_checkpoint_is_one_message(
    damage: str, save_model: Case, cli: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, question, answer in (("f", "where is Ada", "Paris"), ("r", "where is Bela", "Rome")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": question, "answer": answer}) + "\n")
    data = f"jsonl:forget={tmp_path / 'f.jsonl'},retain={tmp_path / 'r.jsonl'}"
    out = tmp_path / "out"
    command = ["unlearn", save_model("model"), "--benchmark", data, "--lr", 1e-3]
    command += ["--steps", 4, "--check-every", 1, "--out", out]
    step = loop._Loop.step

    def interrupted(self: loop._Loop, total: int) -> float:
        if self.done.steps == 2:
            raise KeyboardInterrupt
        return step(self, total)

    with monkeypatch.context() as patch:
        patch.setattr(choices, "Settings", SettingsThatSave)
        patch.setattr(loop._Loop, "step", interrupted)
        assert cli(*command).code == 130
    path = out / unlearn.CHECKPOINT
    whole = path.read_bytes()
    path.write_bytes(
        {
            "byte": whole[:-99] + bytes([whole[-99] ^ 1]) + whole[-98:],
            "cut": whole[: len(whole) // 2],
            "empty": b"",
            "text": whole.replace(b"steps", b"stepz"),
        }[damage]
    )
    ran = cli(*command, "--resume")
    assert (ran.code, ran.out) == (2, "")
    assert f"{path} is damaged" in ran.err
    assert "--overwrite" in ran.err
    assert [p.name for p in out.iterdir() if p.suffix == ".safetensors"] == [unlearn.CHECKPOINT]
    assert cli(*command, "--overwrite").code == 0
