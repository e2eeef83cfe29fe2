"""The log of what was learned and deleted: a chain in which each entry holds the digest of the one before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stillknows.checksums import file_digest
from stillknows.errors import UserError
from stillknows.json_text import parse_json
from stillknows.store import read_text, write_text

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


def verify(folder: Path, head: str | None = None) -> str:
    """Check the log and the adapters against it; return the last digest.

    Args:
        head: the last digest as it was kept elsewhere.

    Raises UserError that names the first entry or file that is not as it was written.
    """
    path, found = folder / LEDGER, entries(folder)
    previous = START
    for number, entry in enumerate(found, 1):
        if entry.get("previous") != previous or entry.get("digest") != _digest(entry):
            raise UserError(f"{path}, entry {number}: it was changed, or the one before it", "use a copy of the folder")
        previous = entry["digest"]
    if head is not None and head != previous:
        raise UserError(f"{path} does not end with the digest {head[:12]}…", "it was cut, continued or written anew")
    left = alive(found)
    for file in sorted(folder.glob("*.safetensors")):
        if file.name not in {place.file for place in left}:
            raise UserError(f"{file} is not among the adapters that the log has left", "remove it")
    for place, entry in left.items():
        file = folder / place.file
        if not file.is_file() or file_digest(file) != entry["file"]:
            raise UserError(f"{file} is missing or is not the adapter that was trained", "use a copy of the folder")
    return previous


def alive(entries: Sequence[Entry]) -> dict[Slice, Entry]:
    """Return the slices that are trained and not dropped, with what the log says of each, shard by shard."""
    left: dict[Slice, Entry] = {}
    for entry in entries:
        if entry["event"] == "trained":
            left[Slice(*entry["slice"])] = entry
        for place in entry["dropped"] if entry["event"] == "deleted" else ():
            left.pop(Slice(*place), None)
    return dict(sorted(left.items()))


def dropped(entries: Sequence[Entry]) -> dict[Slice, Entry]:
    """Return the slices that were dropped and not trained again, with what the log says of each, shard by shard."""
    trained = {Slice(*entry["slice"]): entry for entry in entries if entry["event"] == "trained"}
    left = alive(entries)
    return dict(sorted((place, entry) for place, entry in trained.items() if place not in left))


def deleted(entries: Sequence[Entry]) -> frozenset[str]:
    """Return the hashes of all items that were asked to be deleted."""
    return frozenset(item for entry in entries if entry["event"] == "deleted" for item in entry["items"])


def entries(folder: Path) -> list[Entry]:
    """Return all entries, the first one first. Raises UserError for a file that is no log."""
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


def append(folder: Path, entry: Entry) -> str:
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
