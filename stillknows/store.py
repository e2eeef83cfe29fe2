"""Run folders: the only place that writes files. Every write is atomic, every folder has one owner at a time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from filelock import FileLock, Timeout

from stillknows.errors import UserError
from stillknows.json_text import parse_json, to_text

LOCK = ".stillknows.lock"
PARTIAL = ".stillknows-partial-"  # the beginning of the name of every file and folder that is still being written
RECORD = "run.json"
REPORT = "report.json"  # of an audit
DIGEST = "digest"
AGAIN = "repeat the command that wrote it, with `overwrite`"
_held: list[Path] = []  # folders that this process holds, the innermost last


@contextlib.contextmanager
def locked(folder: Path) -> Generator[Path]:
    """Create a folder if needed and hold it until the block ends, so that two runs cannot mix.

    Whatever writes into a folder locks it; a thread that holds it may lock it again, for what it calls. The lock
    belongs to the process: it ends with it, also when it is killed. What a killed run has left half-written is
    removed. Folders that were made for nothing are removed again. Raises UserError when another run holds the folder,
    when it cannot be written, and when a link stands where the lock would be.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, not a folder", "choose another folder with `out`")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    _owner(folder)
    # it opens without following a link and without emptying the file; a single one for each path counts
    lock = FileLock(folder.absolute() / LOCK, timeout=0, is_singleton=True)
    if lock.is_locked:  # by this thread
        yield folder
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _require_no_link(folder / LOCK)
        lock.acquire()
    except Timeout:
        raise UserError(f"another run is working in {folder}", "wait for it, or choose another `out`") from None
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}", "choose another folder with `out`") from error
    _held.append(folder)
    try:
        for left in folder.glob(f"{PARTIAL}*"):
            remove(left)
        yield folder
    finally:
        _held.remove(folder)
        if made and [path.name for path in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()
            _remove_empty(made)
        lock.release()


def _owner(folder: Path) -> Path | None:
    """Return the innermost folder held by this process that holds this one, None without.

    Raises UserError when a link in that folder leads here: it may point anywhere, and only the way to the folder
    itself is the user's own choice.
    """
    owner = next((held for held in reversed(_held) if folder.is_relative_to(held)), None)
    if owner is not None:
        for part in [folder, *folder.parents][: len(folder.parts) - len(owner.parts)]:
            _require_no_link(part)
    return owner


def _require_no_link(path: Path) -> None:
    if path.is_symlink():
        raise UserError(f"{path} is a link, and nothing is written through links", "remove it, or choose another `out`")


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that it holds; of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders, the innermost first, up to one that holds something."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def require_outside(out: Path, folders: Iterable[Path]) -> None:
    """Raise UserError when results would be written into one of these folders."""
    for folder in folders:
        if out.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"`out` {out} lies in the model folder {folder}, which is left as it is",
                "choose a folder outside of it with `out`",
            )


def require_new(path: Path, *, overwrite: bool, fix: str = "add `overwrite`, or choose another `out`") -> None:
    """Raise UserError when a result exists already and may not be replaced."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already", fix)


@contextlib.contextmanager
def atomic_folder(target: Path, old: Iterable[Path] = ()) -> Generator[Path]:
    """Give an empty folder beside `target` that takes its place when the block ends well, and vanishes otherwise.

    The new files are moved in one by one, after an older run record, what it names and the `old` files have gone and
    with the new record last: a folder with a record is complete, and no parts of two models lie side by side. Other
    files stay.
    """
    owner = _owner(target)
    target.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=owner or target))
    try:
        yield work
        for file in [*_recorded_file(target), target / RECORD, *old]:
            _owner(file.parent)
            file.unlink(missing_ok=True)
        for new in sorted(work.iterdir(), key=lambda path: path.name == RECORD):
            _take_place(new, target / new.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _take_place(new: Path, old: Path) -> None:
    """Move a file or a folder to where an older one may be."""
    if not new.is_dir():
        new.chmod(0o666 & ~_umask())
    elif old.exists() or old.is_symlink():
        remove(old)
    new.replace(old)


def _recorded_file(folder: Path) -> list[Path]:
    """Return the model file that a folder's run record, if it has one that can be read, says was written beside it."""
    try:
        name = read_sealed(folder / RECORD).get("file")
    except UserError:
        return []
    return [folder / name] if isinstance(name, str) and name == Path(name).name and (folder / name).is_file() else []


@contextlib.contextmanager
def build_once(folder: Path, plan: Any) -> Generator[Path | None]:
    """Give the folder if its content has still to be made by this plan, None if it has been; marks it when made."""
    mark = folder / "plan.json"
    with contextlib.suppress(UserError):
        if read_json(mark) == digest(plan):
            yield None
            return
    _owner(folder)
    mark.unlink(missing_ok=True)
    yield folder
    write_json(mark, digest(plan))


def slug(spec: str) -> str:
    """Return a plug-in's spec as the name of a file or folder."""
    return spec.replace(":", "_")


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step: a reader sees the old file or the new one."""
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one step; NaN and infinity are refused, since JSON has none."""
    write_text(path, to_text(value) + "\n")


def write_sealed(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Write JSON that carries a digest of itself and return it as it will be read."""
    result = sealed(content)
    write_json(path, result)
    return result


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return content as JSON gives it back, with a digest of it."""
    result = json.loads(to_text({name: value for name, value in content.items() if name != DIGEST}))
    return result | {DIGEST: _seal(result)}


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what `write_sealed` wrote; UserError when it was changed since, in content or digest, or carries none."""
    read = read_json(path)
    content = cast(dict[str, Any], read) if isinstance(read, dict) else {}
    if DIGEST not in content:
        raise UserError(f"{path} carries no digest: an earlier version or another program wrote it", AGAIN)
    if content[DIGEST] != _seal({name: value for name, value in content.items() if name != DIGEST}):
        raise UserError(f"{path} was changed after it was written: its digest does not fit", AGAIN)
    return content


def recall(path: Path, cache_key: str) -> dict[str, Any] | None:
    """Return what was saved by `write_sealed` with this "key"; None without, or when the file was changed."""
    with contextlib.suppress(UserError):
        content = read_sealed(path)
        if content.get("key") == cache_key:
            return content
    return None


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a new file, then put it in the place of `path` in one step; on failure nothing changes."""
    owner = _owner(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=PARTIAL, dir=owner or path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        _take_place(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_new(path: Path, content: bytes, mode: int) -> None:
    """Write a file that did not exist, with these permissions from its first byte on. Raises UserError where one does,
    or a link."""
    _owner(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        raise UserError(f"{path} exists already, and is never overwritten", "choose another name") from None
    with os.fdopen(handle, "wb") as file:
        file.write(content)


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


class Serialized(NamedTuple):
    """A part of keys that is written out once, since writing it takes long and many keys have it."""

    text: str

    @classmethod
    def of(cls, part: Any) -> Serialized:
        return cls(json.dumps(part, sort_keys=True, ensure_ascii=False, default=str))


def digest(*parts: Any) -> str:
    """Return a short hash of JSON-able parts: equal inputs, equal key, serialized before or not."""
    written = (part if isinstance(part, Serialized) else Serialized.of(part) for part in parts)
    return hashlib.sha256(f"[{', '.join(part.text for part in written)}]".encode()).hexdigest()[:24]
