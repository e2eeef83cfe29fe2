"""Exact deletion: items are learned by adapters that can be taken away, and a log says which adapter saw what.

A base model stays as it is. Disjoint shards of items are learned by low-rank adapters, each shard by itself and slice
after slice: a slice starts from the base and the earlier slices of its own shard (SISA, arXiv 1912.03817; with
adapters, arXiv 2406.16257). An item is deleted by dropping the slice that saw it and the later ones of its shard, and
these are trained again without it, from the slice before on: what is then there was computed without it, bit by bit as
if it had never been there. Two things are the user's to see to: the base must not know the items, and the same fact in
other words is another item.

SISA serves one model a shard, which answer by vote or mean; `merge` writes them with `shard`. Without, it writes the
sum of all shards' adapters on one base, which no training has seen together: a model of its own kind, as exactly
deleted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stillknows import __version__
from stillknows.checksums import file_digest
from stillknows.errors import UserError
from stillknows.lazy import Tensor, nn
from stillknows.model import parameters, run_record
from stillknows.model.encoding import EncodedAnswer, encode
from stillknows.model.ref import LoadOptions, ModelRef
from stillknows.registry import bind
from stillknows.store import RECORD, locked, replace_file, require_new, require_outside
from stillknows.training.finetune import finetune
from stillknows.training.low_rank import collecting
from stillknows.training.settings import Settings
from stillknows.types import Example
from stillknows.unlearning.ledger import LEDGER, Slice, alive, append, deleted, dropped, entries, verify
from stillknows.unlearning.sequence import item_digest


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
    require_outside(folder, ref.folders)
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
        head = append(folder, base_entry)
        for i, slices in enumerate(encoded):
            for j, items in enumerate(slices):
                head = _learn(ref, items, folder, Slice(i, j), settings, rank)
        return head


def _learn(
    ref: ModelRef, items: Sequence[EncodedAnswer], folder: Path, place: Slice, settings: Settings, rank: int
) -> str:
    """Train a slice's adapter on the base with the earlier slices of its shard, save and log it; return the digest.

    What it starts from is made of the saved adapters, so that it is the same whenever the slice is trained.
    """
    from safetensors.torch import save_file

    model = ref.load().model
    earlier = (other for other in alive(entries(folder)) if other.shard == place.shard and other.number < place.number)
    _add(model, folder, earlier)
    found: dict[str, nn.Module] = {}
    adapter = collecting(bind("step", f"lora:rank={rank}"), found)
    finetune(model, items, settings, step_plugins=[adapter], label=place.file)
    replace_file(folder / place.file, lambda partial: save_file(_factors(found), partial))
    entry = {"event": "trained", "slice": place, "file": file_digest(folder / place.file)}
    entry |= {"items": sorted(item_digest(item.example) for item in items)}
    return append(folder, entry | {"settings": asdict(settings), "rank": rank})


def delete(folder: Path, items: Collection[Example]) -> tuple[str, list[Slice]]:
    """Drop every adapter that saw one of the items; return the last digest of the log and what was dropped.

    The log is written first: should the deletion be interrupted, `verify` names what has still to be removed. Other
    items of a dropped slice are gone with it; `retrain` teaches them again.

    Raises UserError for an item that no adapter has seen, and as `verify` does.
    """
    with locked(folder):
        return _delete(folder, items)


def _delete(folder: Path, items: Collection[Example]) -> tuple[str, list[Slice]]:
    verify(folder)
    wanted, left = {item_digest(e): e.id for e in items}, alive(entries(folder))
    seen = {digest: place for place, entry in left.items() for digest in entry["items"]}
    for digest, name in wanted.items():
        if digest not in seen:
            raise UserError(
                f"no adapter in {folder} has seen item {name!r}", "it was never there, or is deleted already"
            )
    hit = {seen[digest] for digest in wanted}
    gone = [p for p in left if any(p.shard == h.shard and p.number >= h.number for h in hit)]
    head = append(folder, {"event": "deleted", "items": sorted(wanted), "dropped": gone})
    for place in gone:
        (folder / place.file).unlink()
    return head, gone


def retrain(folder: Path, items: Sequence[Example], *, device: str = "cpu") -> tuple[str, list[Slice]]:
    """Train dropped slices again without what was deleted; return the last digest of the log and what was trained.

    Each goes on from the slice before it, in the order of training; one of which nothing is left stays away. What is
    then there equals, bit by bit, a training that never held the deleted items. After an interruption, call it again.

    Args:
        items: those of the dropped slices, in the order in which they were trained; others, and deleted ones, may be
            among them and are left out.

    Raises UserError as `verify` does, for items that are missing, and for a base that is another model by now.
    """
    with locked(folder):
        head = verify(folder)
        log = entries(folder)
        ref, away = _base(log[0], folder, device), deleted(log)
        parts = {place: _those(items, set(entry["items"]) - away, place) for place, entry in dropped(log).items()}
        trained = [place for place, part in parts.items() if part]
        for place in trained:
            entry = dropped(log)[place]
            encoded = encode(
                parts[place], ref.tokenizer, log[0]["template"], ref.context_length, vocabulary=ref.vocabulary_size
            )
            head = _learn(ref, encoded, folder, place, Settings(**entry["settings"]), entry["rank"])
        return head, trained


def _those(items: Sequence[Example], digests: Collection[str], place: Slice) -> list[Example]:
    """Return the items of a slice, in their order."""
    found = {item_digest(item): item for item in items if item_digest(item) in digests}
    if len(found) < len(digests):
        raise UserError(
            f"{len(digests) - len(found)} of the {len(digests)} items that are left of {place.file} are not given",
            "give the shard's file as it was, with or without the deleted items",
        )
    return list(found.values())


def _base(entry: Mapping[str, Any], folder: Path, device: str = "cpu") -> ModelRef:
    """Return the model that the adapters were trained on."""
    ref = ModelRef.open(entry["name"], LoadOptions(device)).check()
    if ref.fingerprint != entry["model"]:
        raise UserError(f"{ref.name} is not the model that {folder} was trained on", "put that one in its place")
    return ref


def merge(folder: Path, out: Path, *, shard: int | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Write the base plus Σ (α/r)·B·A of the adapters that are left as a checkpoint; return its record.

    Args:
        shard: of this shard's adapters only; None sums up those of all.

    Raises UserError as `verify` does, for a shard that there is none of, when the base is no longer the model that the
    adapters were trained on, and for an `out` that holds a model (unless `overwrite`).
    """
    with locked(out):
        for name in (RECORD, "config.json"):
            require_new(out / name, overwrite=overwrite)
        head, log = verify(folder), entries(folder)
        known = {Slice(*entry["slice"]).shard for entry in log if entry["event"] == "trained"}
        if shard is not None and shard not in known:
            raise UserError(f"{folder} has no shard {shard}", f"one of {', '.join(map(str, sorted(known)))}")
        base = _base(log[0], folder)
        require_outside(out, [*base.folders, folder])
        target = base.load()
        _add(target.model, folder, (place for place in alive(log) if shard in (None, place.shard)))
        record = {"stillknows": __version__, "ledger": head, "shard": shard, "versions": run_record.versions()}
        return run_record.save(target.model, target.tokenizer, out, record)


def _add(model: nn.Module, folder: Path, places: Iterable[Slice]) -> None:
    """Add the products of these slices' adapters to a model's weights, in their order."""
    from safetensors.torch import load_file

    for place in places:
        for name, (a, b) in _pairs(load_file(folder / place.file)):
            parameters.add(model, [(f"{name}.weight", b @ a)])


def _require_disjoint(shards: Sequence[Sequence[Sequence[Example]]]) -> None:
    seen: set[str] = set()
    for example in (e for slices in shards for examples in slices for e in examples):
        if item_digest(example) in seen:
            raise UserError(f"item {example.id!r} is in two slices", "an item belongs to one: remove the other")
        seen.add(item_digest(example))


def _factors(found: dict[str, Any]) -> dict[str, Tensor]:
    """Return A, and B times its scale, of each layer."""
    parts = {f"{name}/a": part.a for name, part in found.items()}
    parts |= {f"{name}/b": part.scale * part.b for name, part in found.items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in parts.items()}


def _pairs(tensors: dict[str, Tensor]) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    for name in sorted({name.rpartition("/")[0] for name in tensors}):
        yield name, (tensors[f"{name}/a"], tensors[f"{name}/b"])
