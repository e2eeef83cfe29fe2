"""Run folders: the only place that writes files. Every write is atomic, every folder has one owner at a time."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from stillknows.errors import UserError
from stillknows.types import Observations

LOCK = ".stillknows.lock"


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[Path]:
    """Create a folder if needed and hold it until the block ends, so that two runs cannot mix.

    The lock belongs to the process: it ends with it, also when it is killed. Raises UserError when another run holds
    the folder or when it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / LOCK).open("w")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}", "choose another folder with --out") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is working in {folder}", "wait for it, or choose another --out") from None
        yield folder


def require_new(path: Path, *, overwrite: bool, fix: str = "add --overwrite, or choose another --out") -> None:
    """Raise UserError when a result exists already and may not be replaced."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already", fix)


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder beside `target` that takes its place when the block ends well, and vanishes otherwise.

    Files that were in `target` and are not written anew stay: the new files are moved in one by one, the run record
    last, so that a folder with a record is complete.
    """
    target.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".partial-", dir=target))
    try:
        yield work
        for file in sorted(work.iterdir(), key=lambda f: f.name == "run.json"):
            file.replace(target / file.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def once(folder: Path, plan: Any) -> Iterator[Path | None]:
    """Give the folder if its content has still to be made by this plan, None if it has been; marks it when made."""
    mark = folder / "plan.json"
    if mark.is_file() and read_json(mark) == key(plan):
        yield None
        return
    mark.unlink(missing_ok=True)
    yield folder
    write_json(mark, key(plan))


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step: a reader sees the old file or the new one."""
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one step; NaN and infinity are refused, since JSON has none."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a new file, then put it in the place of `path` in one step; on failure nothing changes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:
    """Read JSON; UserError when the file is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def file_digest(*files: Path) -> str:
    """Return the SHA-256 of the files' names and contents, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0")
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def key(*parts: Any) -> str:
    """Return a short hash of JSON-able parts: equal inputs, equal key."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def save_observations(path: Path, cache_key: str, observations: Observations) -> None:
    """Write observations as one compressed .npz without pickles; ragged arrays are stored flat with their lengths."""
    import io

    texts = {
        "ids": observations.ids,
        "facts": observations.facts,
        "prompts": observations.prompts,
        "answers": observations.answers,
        "generations": observations.generations,
    }
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        meta=np.frombuffer(json.dumps({"version": 1, "key": cache_key, **texts}).encode(), dtype=np.uint8),
        lengths=np.array([len(x) for x in observations.log_probs]),
        log_probs=np.concatenate(observations.log_probs),
        hits=np.concatenate(observations.hits),
        ends=observations.ends,
    )
    replace_file(path, lambda partial: partial.write_bytes(buffer.getvalue()))


def load_observations(path: Path, cache_key: str | None = None) -> Observations | None:
    """Read observations back; None when there are none, or when they were made for another key."""
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as file:
        meta = json.loads(file["meta"].tobytes())
        if cache_key is not None and meta["key"] != cache_key:
            return None
        cuts = np.cumsum(file["lengths"])[:-1]
        return Observations(
            ids=tuple(meta["ids"]),
            facts=tuple(meta["facts"]),
            prompts=tuple(meta["prompts"]),
            answers=tuple(meta["answers"]),
            log_probs=tuple(np.split(file["log_probs"], cuts)),
            hits=tuple(np.split(file["hits"], cuts)),
            ends=file["ends"],
            generations=tuple(meta["generations"]),
        )
