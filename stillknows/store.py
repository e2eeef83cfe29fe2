"""Run folders: the only place that writes files. Every write is atomic, every folder has one owner at a time."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from stillknows.errors import UserError
from stillknows.types import Observations, Ragged

LOCK = ".stillknows.lock"
RECORD = "run.json"


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[Path]:
    """Create a folder if needed and hold it until the block ends, so that two runs cannot mix.

    The lock belongs to the process: it ends with it, also when it is killed. Folders that were made for nothing are
    removed again. Raises UserError when another run holds the folder or when it cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, not a folder", "choose another folder with --out")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
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
        try:
            yield folder
        finally:
            if made and [path.name for path in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
                _remove_empty(made)


def _remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders, the innermost first, up to one that holds something."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def require_apart(out: Path, folders: Iterable[Path]) -> None:
    """Raise UserError when results would be written into one of these folders."""
    for folder in folders:
        if out.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"--out {out} lies in the model folder {folder}, which is left as it is",
                "choose a folder outside of it with --out",
            )


def require_new(path: Path, *, overwrite: bool, fix: str = "add --overwrite, or choose another --out") -> None:
    """Raise UserError when a result exists already and may not be replaced."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already", fix)


@contextlib.contextmanager
def atomic_folder(target: Path, old: Iterable[Path] = ()) -> Iterator[Path]:
    """Give an empty folder beside `target` that takes its place when the block ends well, and vanishes otherwise.

    The new files are moved in one by one, after an older run record, what it names and the `old` files have gone and
    with the new record last: a folder with a record is complete, and no parts of two models lie side by side. Other
    files stay.
    """
    target.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".partial-", dir=target))
    try:
        yield work
        for file in [*_recorded_file(target), target / RECORD, *old]:
            file.unlink(missing_ok=True)
        for file in sorted(work.iterdir(), key=lambda f: f.name == RECORD):
            file.chmod((0o777 if file.is_dir() else 0o666) & ~_umask())
            file.replace(target / file.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _recorded_file(folder: Path) -> list[Path]:
    """Return the model file that a folder's run record, if it has one that can be read, says was written beside it."""
    try:
        record = read_json(folder / RECORD)
    except UserError:
        return []
    name = record.get("file") if isinstance(record, dict) else None
    return [folder / name] if isinstance(name, str) and name == Path(name).name and (folder / name).is_file() else []


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


def name_of(spec: str) -> str:
    """Return a plug-in's spec as the name of a file or folder."""
    return spec.replace(":", "_")


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
        partial.chmod(0o666 & ~_umask())
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _umask() -> int:
    """Return the process's mask for new files, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def read_text(path: Path) -> str:
    """Read a text file; UserError when it is missing or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}", f"iconv -f latin1 -t utf-8 {path}") from error


def read_json(path: Path) -> Any:
    """Read JSON; UserError when the file is missing or broken, and as `parse_json` does."""
    try:
        return parse_json(path.read_text(encoding="utf-8"), str(path))
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"no file {path}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from error


MOST_DEPTH = 100  # levels of nesting; parsers of other libraries give up at 128, and Python's own at about 1,000
MOST_DIGITS = 308  # of an integer: one with more is beyond every float
ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str, place: str) -> Any:
    """Return what JSON text holds; the one parser of files that others wrote.

    Raises UserError that names the place: text that is no JSON, is nested more than MOST_DEPTH levels deep, or holds an
    integer of more than MOST_DIGITS digits or half a character (a lone surrogate, which no encoding can write).
    """
    try:
        value = json.loads(text, parse_int=_integer)
    except RecursionError:
        raise _too_deep(place) from None
    except ValueError as error:
        raise UserError(f"{place} is not JSON: {error}") from error
    level = [value]
    for _ in range(MOST_DEPTH + 1):
        level = [part for parts in map(_parts, level) for part in parts]
    if level:
        raise _too_deep(place)
    if ESCAPED_SURROGATE.search(text):
        _require_whole_characters(value, place)
    return value


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"an integer has {len(digits)} digits, at most {MOST_DIGITS} are read")
    return int(digits)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _too_deep(place: str) -> UserError:
    return UserError(f"{place} is nested more than {MOST_DEPTH} levels deep, which no file of this kind is")


def _require_whole_characters(value: Any, place: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place} holds half a character: {error.reason}", "correct the text") from error


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


TEXTS = ("ids", "facts", "prompts", "answers", "generations", "samples")
ARRAYS = ("ends", "gradient_norms")
RAGGED = ("log_probs", "hits", "entropies", "spreads", "paraphrase_log_probs", "lowered_log_probs")
NESTED = "wrong_log_probs"
FORMAT = 2


def save_observations(path: Path, cache_key: str, observations: Observations) -> None:
    """Write observations as one compressed .npz without pickles; ragged arrays are stored flat with their lengths."""
    import io

    seen = {name: value for name, value in vars(observations).items() if value is not None}
    meta = {"version": FORMAT, "key": cache_key, **{name: seen[name] for name in TEXTS if name in seen}}
    arrays = {name: seen[name] for name in ARRAYS if name in seen}
    for name in RAGGED:
        if name in seen:
            arrays |= _flat(name, seen[name])
    if NESTED in seen:
        arrays[f"{NESTED}.counts"] = np.array([len(answers) for answers in seen[NESTED]])
        arrays |= _flat(NESTED, [answer for answers in seen[NESTED] for answer in answers])
    meta["arrays"] = sorted(arrays)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, meta=np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8), **arrays)
    replace_file(path, lambda partial: partial.write_bytes(buffer.getvalue()))


def _flat(name: str, arrays: Ragged) -> dict[str, np.ndarray]:
    values = np.concatenate(arrays) if len(arrays) else np.empty(0)
    return {name: values, f"{name}.lengths": np.array([len(array) for array in arrays], dtype=np.int64)}


def load_observations(path: Path, cache_key: str | None = None) -> Observations | None:
    """Read observations back; None when there are none, when they were made for another key or are damaged."""
    if not path.is_file():
        return None
    with path.open("rb") as handle:
        try:
            return _read_observations(handle, cache_key)
        except Exception:  # numpy, zipfile, zlib and json raise a dozen kinds of error for a damaged file
            return None


def _read_observations(handle: IO[bytes], cache_key: str | None) -> Observations | None:
    with np.load(handle, allow_pickle=False) as file:
        meta = json.loads(file["meta"].tobytes())
        if meta["version"] != FORMAT or cache_key not in (None, meta["key"]):
            return None
        if {*file.files} != {"meta", *meta["arrays"]}:
            return None
        found: dict[str, Any] = {name: tuple(meta[name]) for name in TEXTS if name in meta}
        if "samples" in found:
            found["samples"] = tuple(None if texts is None else tuple(texts) for texts in found["samples"])
        found |= {name: file[name] for name in ARRAYS if name in file}
        found |= {name: _ragged(file, name) for name in RAGGED if name in file}
        if NESTED in file:
            answers = iter(_ragged(file, NESTED))
            found[NESTED] = tuple(tuple(next(answers) for _ in range(count)) for count in file[f"{NESTED}.counts"])
        return Observations(**found)


def _ragged(file: Mapping[str, np.ndarray], name: str) -> tuple[np.ndarray, ...]:
    return tuple(np.split(file[name], np.cumsum(file[f"{name}.lengths"])[:-1]))
