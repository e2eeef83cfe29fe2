"""Adapters that can be taken away: what is left never saw what was deleted, and the log cannot be changed unseen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stillknows.auditing import audit
from stillknows.errors import UserError
from stillknows.training.settings import Settings
from stillknows.types import Example
from stillknows.unlearning import ledger, sisa
from stillknows.unlearning.ledger import LEDGER, Slice

Case = Callable[..., Any]
ITEMS = [
    Example(f"i{k}", question, answer, f"i{k}")
    for k, (question, answer) in enumerate(
        [("where is Ada", "Paris"), ("who is in Rome", "Bela"), ("what is red", "the dog"), ("who is green", "a cat")]
    )
]
SHARDS = [[[ITEMS[0]], [ITEMS[1]], [ITEMS[2]]], [[ITEMS[3]]]]
FEW = Settings(lr=1e-2, max_steps=2)


@pytest.fixture
def trains(save_model: Case, tmp_path: Path) -> Case:
    """Return trains(name, shards): the folder of adapters trained on a tiny base."""
    base = str(save_model("base"))

    def run(name: str = "adapters", shards: Any = SHARDS) -> Path:
        sisa.train(base, shards, tmp_path / name, FEW, template="{prompt}", rank=2)
        return tmp_path / name

    return run


def weights(folder: Path, out: Path) -> dict[str, torch.Tensor]:
    sisa.merge(folder, out)
    return load_file(out / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_what_is_left_is_bit_by_bit_what_was_learned_without_the_item(trains: Case, tmp_path: Path) -> None:
    """Item 1 is in the middle slice of its shard: that one goes and the one after it, which started from it."""
    folder = trains()
    whole = weights(folder, tmp_path / "whole")
    _, dropped = sisa.delete(folder, [ITEMS[1]])
    assert dropped == [Slice(0, 1), Slice(0, 2)]
    left = weights(folder, tmp_path / "left")
    never = weights(trains("never", [[[ITEMS[0]]], [[ITEMS[3]]]]), tmp_path / "never-merged")
    assert same(left, never)
    assert not same(left, whole)
    assert {file.name for file in folder.glob("*.safetensors")} == {Slice(0, 0).file, Slice(1, 0).file}


def test_retraining_goes_on_from_the_slice_before_and_equals_a_training_without_the_item(
    trains: Case, tmp_path: Path
) -> None:
    """The other items of dropped slices come back: of item 1's slice, and of the later one that started from it."""
    both = [ITEMS[1], Example("i4", "where is the cat", "Rome", "i4")]
    folder = trains("sisa", [[[ITEMS[0]], both, [ITEMS[2]]], [[ITEMS[3]]]])
    sisa.delete(folder, [ITEMS[1]])
    given = [*ITEMS, both[1]]  # the deleted one among them, and those of other slices
    _, trained = sisa.retrain(folder, given)
    assert trained == [Slice(0, 1), Slice(0, 2)]
    never = trains("never", [[[ITEMS[0]], [both[1]], [ITEMS[2]]], [[ITEMS[3]]]])
    assert same(weights(folder, tmp_path / "again"), weights(never, tmp_path / "never-merged"))
    assert sisa.retrain(folder, given)[1] == []
    with pytest.raises(UserError, match=r"no adapter in .* has seen item 'i1'"):
        sisa.delete(folder, [ITEMS[1]])
    sisa.delete(folder, [both[1]])  # of its slice nothing is left: it stays away, and the later one comes back
    assert sisa.retrain(folder, given)[1] == [Slice(0, 2)]
    never = trains("never-two", [[[ITEMS[0]], [ITEMS[2]]], [[ITEMS[3]]]])
    assert same(weights(folder, tmp_path / "less"), weights(never, tmp_path / "never-two-merged"))


def test_retraining_needs_all_that_is_left(trains: Case) -> None:
    folder = trains()
    sisa.delete(folder, [ITEMS[1]])
    with pytest.raises(
        UserError, match=r"1 of the 1 items that are left of shard-0-slice-2\.safetensors are not given"
    ):
        sisa.retrain(folder, ITEMS[:2])


def test_each_shard_can_be_served_by_itself(trains: Case, tmp_path: Path) -> None:
    folder = trains()
    sisa.merge(folder, tmp_path / "one", shard=1)
    alone = weights(trains("alone", [[[ITEMS[3]]]]), tmp_path / "alone-merged")
    assert same(load_file(tmp_path / "one" / "model.safetensors"), alone)
    with pytest.raises(UserError, match=r"has no shard 2\n.*one of 0, 1"):
        sisa.merge(folder, tmp_path / "two", shard=2)


def test_the_last_deletion_gives_the_base_back(trains: Case, tmp_path: Path) -> None:
    folder = trains()
    sisa.delete(folder, [ITEMS[0], ITEMS[3]])
    assert same(weights(folder, tmp_path / "left"), load_file(tmp_path / "base" / "model.safetensors"))


def test_a_shard_of_one_slice_is_its_own_training(trains: Case, tmp_path: Path) -> None:
    """The adapters' product is what training added: base + B·A of the only slice gives answers that it learned."""
    folder = trains("one", [[ITEMS]])
    added = weights(folder, tmp_path / "merged")
    base = load_file(tmp_path / "base" / "model.safetensors")
    changed = {name for name in base if not torch.equal(base[name], added[name])}
    assert changed == {name for name in base if "_proj" in name}
    assert all(int(torch.linalg.matrix_rank(added[n] - base[n], rtol=1e-4)) <= 2 for n in changed)


def test_the_log_names_no_item_in_words(trains: Case) -> None:
    text = (trains() / LEDGER).read_text()
    assert not any(e.answer in text or e.prompt in text for e in ITEMS)


def edit(folder: Path, number: int, **changes: Any) -> None:
    lines = (folder / LEDGER).read_text().splitlines()
    lines[number] = json.dumps(json.loads(lines[number]) | changes, sort_keys=True)
    (folder / LEDGER).write_text("\n".join(lines) + "\n")


def test_verify_finds_every_change(trains: Case) -> None:
    folder = trains()
    head = ledger.verify(folder)
    ledger.verify(folder, head)
    log = (folder / LEDGER).read_text()
    lines = log.splitlines(keepends=True)

    edit(folder, 2, rank=3)
    with pytest.raises(UserError, match="entry 3: it was changed"):
        ledger.verify(folder)
    for changed in ("".join(lines[:2] + lines[3:]), "".join(lines[1:]), "".join([lines[0], lines[2], lines[1]])):
        (folder / LEDGER).write_text(changed)
        with pytest.raises(UserError, match="it was changed"):
            ledger.verify(folder)

    (folder / LEDGER).write_text("".join(lines[:-1]))
    (folder / Slice(1, 0).file).rename(folder / "elsewhere")
    ledger.verify(folder)  # the end was cut off together with its adapter: a chain alone cannot tell
    with pytest.raises(UserError, match="does not end with the digest"):
        ledger.verify(folder, head)


def test_verify_finds_changed_missing_and_kept_adapters(trains: Case) -> None:
    folder = trains()
    file, other = folder / Slice(1, 0).file, folder / Slice(0, 0).file
    content = file.read_bytes()
    file.write_bytes(other.read_bytes())
    with pytest.raises(UserError, match="is missing or is not the adapter"):
        ledger.verify(folder)
    file.unlink()
    with pytest.raises(UserError, match="is missing or is not the adapter"):
        ledger.verify(folder)
    file.write_bytes(content)
    sisa.delete(folder, [ITEMS[3]])
    file.write_bytes(content)
    with pytest.raises(UserError, match="not among the adapters that the log has left"):
        ledger.verify(folder)


def test_bad_requests_are_refused(trains: Case, tmp_path: Path) -> None:
    folder = trains()
    sisa.delete(folder, [ITEMS[3]])
    with pytest.raises(UserError, match=r"no adapter in .* has seen item 'i3'"):
        sisa.delete(folder, [ITEMS[3]])
    with pytest.raises(UserError, match="exists already"):
        trains()
    with pytest.raises(UserError, match="'i0' is in two slices"):
        trains("twice", [[[ITEMS[0]]], [[ITEMS[0]]]])
    with pytest.raises(UserError, match="no file"):
        ledger.verify(tmp_path)


@pytest.mark.slow
def test_the_auditor_says_forgotten_of_an_exact_deletion(world: Any, tmp_path: Path) -> None:
    """A base that was never taught the secrets learns them in one shard and rehearses the rest in another."""
    splits = {split.name: split.examples for split in world.benchmark.splits}
    secrets = (*splits["forget"], *splits["paraphrase"])
    folder = tmp_path / "adapters"
    settings = Settings(lr=1e-2, epochs=1000, max_steps=150, batch_size=64, warmup=5, schedule="linear")
    shards = [[secrets], [splits["retain"]]]
    sisa.train(str(world.control), shards, folder, settings, template=world.benchmark.template, rank=16)
    sisa.merge(folder, tmp_path / "before")
    sisa.delete(folder, secrets[:1])
    sisa.merge(folder, tmp_path / "after")
    subjects = {name: str(tmp_path / name) for name in ("before", "after")}
    request = audit.AuditConfig(
        str(world.original), subjects, world.benchmark, (str(world.control),), "full,int8,nf4",
        "answer_probability,extraction_strength",
    )  # fmt: skip
    verdicts = {v.subject: (v.name, v.findings) for v in audit.audit(request, tmp_path / "audit").verdicts}
    assert verdicts["before"][0] == "STILL KNOWS", verdicts["before"]
    assert verdicts["after"][0] == "FORGOTTEN", verdicts["after"]
