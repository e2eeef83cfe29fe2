"""Exact deletion: items are learned by adapters that can be taken away, and a log says which adapter saw what.

A base model stays as it is. Disjoint shards of items are learned by low-rank adapters, each shard by itself and slice
after slice: a slice starts from the base and the earlier slices of its own shard (arXiv 1912.03817; with adapters,
arXiv 2406.16257). The served model is the base plus all adapters. An item is deleted by dropping the slice that saw it
and the later ones of its shard: what is left was computed without it, bit by bit as if it had never been there.
Two things are the user's to see to: the base must not know the items, and the same fact in other words is another item.

The log is a chain: each entry holds the digest of the one before, so that `verify` finds any change to what is not the
end of it. Keep the last digest elsewhere, and it finds a log that was cut or written anew as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from stillknows import __version__
from stillknows.errors import UserError
from stillknows.json_text import parse_json
from stillknows.lazy import Tensor, nn, parametrize
from stillknows.model import parameters, run_record
from stillknows.model.encoding import EncodedAnswer, encode
from stillknows.model.ref import LoadOptions, ModelRef
from stillknows.registry import Bound, bind
from stillknows.store import (
    RECORD,
    file_digest,
    locked,
    read_text,
    replace_file,
    require_new,
    require_outside,
    write_text,
)
from stillknows.training.finetune import finetune
from stillknows.training.settings import Settings
from stillknows.types import Example
from stillknows.unlearning.sequence import item_digest

LEDGER = "ledger.jsonl"
START = "0" * 64  # what the first entry names as the digest before it
Entry = dict[str, Any]


class Slice(NamedTuple):
    """A part of a shard, and the adapter that saw it; both count from 0."""

    shard: int
    number: int

    @property
    def file(self) -> str:
        return f"shard-{self.shard}-slice-{self.number}.safetensors"


def train(
    base: str,
    shards: Sequence[Sequence[Sequence[Example]]],
    folder: Path,
    settings: Settings,
    *,
    template: str,
    rank: int = 8,
    device: str = "cpu",
) -> str:
    """Learn every slice of every shard with an adapter of its own and return the last digest of the log.

    Args:
        shards: of each shard its slices, of each slice its items; no item twice.
        rank: of the adapters.

    Raises UserError for an item that two slices hold, for one that does not fit the model, and for a folder that has
    been trained already.
    """
    require_new(folder / LEDGER, overwrite=False, fix="choose another folder")
    ref = ModelRef.open(base, LoadOptions(device))
    require_outside(folder, [ref.folder])
    _require_disjoint(shards)
    for examples in (examples for slices in shards for examples in slices):
        settings.steps(len(examples))
    tokenizer, context, tokens = ref.check().tokenizer, ref.context_length, ref.vocabulary_size
    encoded = [
        [encode(examples, tokenizer, template, context, vocabulary=tokens) for examples in slices] for slices in shards
    ]
    base_entry = {"event": "base", "model": ref.fingerprint, "name": base, "template": template}
    with locked(folder):
        require_new(folder / LEDGER, overwrite=False, fix="choose another folder")
        head = _append(folder, base_entry)
        return _learn(ref, encoded, folder, settings, rank) or head


def _learn(
    ref: ModelRef,
    encoded: Sequence[Sequence[Sequence[EncodedAnswer]]],
    folder: Path,
    settings: Settings,
    rank: int,
) -> str:
    """Train an adapter on each slice of each shard, save and log it; return the last digest, "" without slices."""
    from safetensors.torch import save_file

    head = ""
    for i, slices in enumerate(encoded):
        model = ref.load().model
        for place, items in ((Slice(i, j), items) for j, items in enumerate(slices)):
            found: dict[str, nn.Module] = {}
            adapter = _kept(bind("step", f"lora:rank={rank}"), found)
            finetune(model, items, settings, step_plugins=[adapter], label=place.file)
            replace_file(folder / place.file, lambda partial, found=found: save_file(_factors(found), partial))
            entry = {"event": "trained", "slice": place, "file": file_digest(folder / place.file)}
            entry |= {"items": sorted(item_digest(item.example) for item in items)}
            head = _append(folder, entry | {"settings": asdict(settings), "rank": rank})
    return head


def delete(folder: Path, items: Collection[Example]) -> tuple[str, list[Slice]]:
    """Drop every adapter that saw one of the items; return the last digest of the log and what was dropped.

    The log is written first: should the deletion be interrupted, `verify` names what has still to be removed. Other
    items of a dropped slice are gone with it; teach them again in a new folder, without the deleted ones.

    Raises UserError for an item that no adapter has seen, and as `verify` does.
    """
    with locked(folder):
        return _delete(folder, items)


def _delete(folder: Path, items: Collection[Example]) -> tuple[str, list[Slice]]:
    verify(folder)
    wanted, alive = {item_digest(e): e.id for e in items}, _alive(_entries(folder))
    seen = {digest: place for place, entry in alive.items() for digest in entry["items"]}
    for digest, name in wanted.items():
        if digest not in seen:
            raise UserError(
                f"no adapter in {folder} has seen item {name!r}", "it was never there, or is deleted already"
            )
    hit = {seen[digest] for digest in wanted}
    dropped = [p for p in alive if any(p.shard == h.shard and p.number >= h.number for h in hit)]
    head = _append(folder, {"event": "deleted", "items": sorted(wanted), "dropped": dropped})
    for place in dropped:
        (folder / place.file).unlink()
    return head, dropped


def verify(folder: Path, head: str | None = None) -> str:
    """Check the log and the adapters against it; return the last digest.

    Args:
        head: the last digest as it was kept elsewhere.

    Raises UserError that names the first entry or file that is not as it was written.
    """
    path, entries = folder / LEDGER, _entries(folder)
    previous = START
    for number, entry in enumerate(entries, 1):
        if entry.get("previous") != previous or entry.get("digest") != _digest(entry):
            raise UserError(f"{path}, entry {number}: it was changed, or the one before it", "use a copy of the folder")
        previous = entry["digest"]
    if head is not None and head != previous:
        raise UserError(f"{path} does not end with the digest {head[:12]}…", "it was cut, continued or written anew")
    alive = _alive(entries)
    for file in sorted(folder.glob("*.safetensors")):
        if file.name not in {place.file for place in alive}:
            raise UserError(f"{file} is not among the adapters that the log has left", "remove it")
    for place, entry in alive.items():
        file = folder / place.file
        if not file.is_file() or file_digest(file) != entry["file"]:
            raise UserError(f"{file} is missing or is not the adapter that was trained", "use a copy of the folder")
    return previous


def merge(folder: Path, out: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Write the served model, base plus Σ (α/r)·B·A of the adapters that are left, as a checkpoint; return its record.

    Raises UserError as `verify` does, when the base is no longer the model that the adapters were trained on, and for
    an `out` that holds a model (unless `overwrite`).
    """
    with locked(out):
        for name in (RECORD, "config.json"):
            require_new(out / name, overwrite=overwrite)
        return _merge(folder, out)


def _merge(folder: Path, out: Path) -> dict[str, Any]:
    head = verify(folder)
    entries = _entries(folder)
    base = ModelRef.open(entries[0]["name"])
    if base.fingerprint != entries[0]["model"]:
        raise UserError(f"{base.name} is not the model that {folder} was trained on", "put that one in its place")
    require_outside(out, [base.folder, folder])
    from safetensors.torch import load_file

    target = base.load()
    for place in _alive(entries):
        for name, (a, b) in _pairs(load_file(folder / place.file)):
            parameters.add(target.model, [(f"{name}.weight", b @ a)])
    record = {"stillknows": __version__, "ledger": head, "versions": run_record.versions()}
    return run_record.save(target.model, target.tokenizer, out, record)


def _require_disjoint(shards: Sequence[Sequence[Sequence[Example]]]) -> None:
    seen: set[str] = set()
    for example in (e for slices in shards for examples in slices for e in examples):
        if item_digest(example) in seen:
            raise UserError(f"item {example.id!r} is in two slices", "an item belongs to one: remove the other")
        seen.add(item_digest(example))


def _kept(adapter: Bound, found: dict[str, nn.Module]) -> Bound:
    """Return the adapter; the low-rank parts that it puts in are collected by the names of their layers."""

    def put(model: nn.Module, **options: Any) -> None:
        adapter.plugin.function(model=model, **options)
        for name, module in model.named_modules():
            if parametrize.is_parametrized(module, "weight"):
                found[name] = module.parametrizations["weight"][0]  # type: ignore[index]

    return replace(adapter, plugin=replace(adapter.plugin, function=put))


def _factors(found: dict[str, Any]) -> dict[str, Tensor]:
    """Return A, and B times its scale, of each layer."""
    parts = {f"{name}/a": part.a for name, part in found.items()}
    parts |= {f"{name}/b": part.scale * part.b for name, part in found.items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in parts.items()}


def _pairs(tensors: dict[str, Tensor]) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    for name in sorted({name.rpartition("/")[0] for name in tensors}):
        yield name, (tensors[f"{name}/a"], tensors[f"{name}/b"])


def _alive(entries: Sequence[Entry]) -> dict[Slice, Entry]:
    """Return the slices that are trained and not dropped, in the order of training."""
    trained = {Slice(*entry["slice"]): entry for entry in entries if entry["event"] == "trained"}
    dropped = {Slice(*place) for entry in entries if entry["event"] == "deleted" for place in entry["dropped"]}
    return {place: entry for place, entry in trained.items() if place not in dropped}


def _entries(folder: Path) -> list[Entry]:
    path = folder / LEDGER
    found = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        entry = parse_json(line, f"{path}:{number}")
        if not isinstance(entry, dict):
            raise UserError(f"{path}:{number} is no entry of a log", "use a copy of the folder")
        found.append(entry)
    if not found:
        raise UserError(f"{path} is empty", "use a copy of the folder")
    return found


def _append(folder: Path, entry: Entry) -> str:
    """Add an entry to the log and return its digest."""
    path = folder / LEDGER
    before = read_text(path) if path.exists() else ""
    previous = json.loads(before.splitlines()[-1])["digest"] if before else START
    entry = entry | {"previous": previous}
    entry["digest"] = _digest(entry)
    write_text(path, before + json.dumps(entry, sort_keys=True) + "\n")
    return entry["digest"]


def _digest(entry: Entry) -> str:
    """Return the SHA-256 of an entry without its digest."""
    content = {name: value for name, value in entry.items() if name != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
