"""Files of a published layout: found in a folder or on the hub, then read item by item.

The only place that knows file formats. A benchmark names the files that it needs (`located`), reads them (`read_items`,
`read_lines`) and takes texts out of the items (`text`, `texts`), so that every message names the file and the place.
"""

from __future__ import annotations

import importlib
from codecs import BOM_UTF8
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

from stillknows.errors import UserError
from stillknows.json_text import parse_json

T = TypeVar("T")


class Item(NamedTuple):
    """One object of a file. `place` says where it stands, for messages: "forget.json:3" or "forget.json: item 3".

    `number` counts lines in JSON lines and items elsewhere, from 1.
    """

    place: str
    number: int
    fields: Mapping[str, Any]


def located(
    title: str,
    wanted: Mapping[str, Sequence[str]],
    *,
    repository: str,
    data: str | None,
    optional: Collection[str] = (),
) -> dict[str, Path]:
    """Return where each wanted file lies, by its key; those in `optional` that do not exist are left out, and so are
    those that the hub cannot be asked for.

    Args:
        title: the benchmark's name, for messages.
        wanted: for each key the file's possible names below the folder, the first that exists is taken.
        repository: dataset repository on the hub, asked when there is no folder.
        data: folder that holds the files; None downloads them, or takes them from the hub's cache.

    Raises one UserError that lists every file that is missing, and one for a hub that does not answer.
    """
    if data is not None and not Path(data).is_dir():
        raise UserError(f"{title} needs the folder {data}, which does not exist", _give_folder(title))
    found: dict[str, Path] = {}
    unanswered: NoAnswer | None = None
    for key, names in wanted.items():
        try:
            if data is not None:
                path = _in_folder(Path(data), names)
            else:
                path = _on_hub(repository, names, cached=unanswered is not None)
        except NoAnswer as error:
            unanswered = unanswered or error
            continue
        if path is not None and path.suffix == ".parquet":
            parquet_reader(path)  # that it is missing is said before the next file is downloaded
        if path is not None:
            found[key] = path
    missing = [names[0] for key, names in wanted.items() if key not in found and key not in optional]
    if missing and unanswered is not None:
        raise unanswered
    if missing:
        where = data if data is not None else f"{repository} on the hub"
        raise UserError(f"{title} needs files that are missing in {where}: {', '.join(missing)}", _give_folder(title))
    return found


def _give_folder(title: str) -> str:
    return f"give a folder with {title}'s files as `data`"


def _in_folder(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _on_hub(repository: str, names: Sequence[str], *, cached: bool) -> Path | None:
    """Return the first of the files that the repository or its cached copy has; None when the hub has none of them.

    Looks only into the cache when `cached` is set, and after a request without an answer: waiting for each file would
    take minutes. Raises NoAnswer when the hub does not answer and none of the files is in the cache.
    """
    import httpx
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    unanswered: LocalEntryNotFoundError | None = None
    for name in names:
        try:
            only_cached = cached or unanswered is not None
            return Path(hf_hub_download(repository, name, repo_type="dataset", local_files_only=only_cached))
        except GatedRepoError as error:
            raise UserError(
                f"{repository} is given out only to those who accept its terms",
                f"accept them at https://huggingface.co/datasets/{repository}, then: hf auth login",
            ) from error
        except RepositoryNotFoundError as error:
            raise UserError(
                f"the hub has no dataset {repository}, or none that you may see",
                "hf auth login, or give a folder with its files as `data`",
            ) from error
        except LocalEntryNotFoundError as error:
            unanswered = unanswered or error  # another of the names may be in the cache
        except EntryNotFoundError:
            continue
        except (httpx.HTTPError, OSError, ValueError) as error:
            raise UserError(*_not_downloaded(repository, error)) from error
    if unanswered is not None:
        raise NoAnswer(*_not_downloaded(repository, unanswered)) from unanswered
    return None


class NoAnswer(UserError):
    """The hub did not say whether it has a file, and the file is not in the cache."""


def _not_downloaded(repository: str, error: Exception) -> tuple[str, str]:
    reason = str(error.__cause__ or error).partition("\n")[0]
    return f"{repository} cannot be downloaded: {reason}", "give a folder with its files as `data`"


def read_items(path: Path) -> list[Item]:
    """Read the objects of a file; a text that stands in the place of an object becomes {"text": …}.

    *.parquet is a table (needs pyarrow), *.txt one text as a whole; any other file is JSON: an array if it begins with
    "[" (and is not *.jsonl), else one object per line. Raises UserError that names file and line or item, also for a
    file without items.
    """
    if path.suffix == ".parquet":
        items = _table(path)
    elif path.suffix == ".txt":
        content = read_text(path)
        items = [Item(str(path), 1, {"text": content})] if content.strip() else []
    elif path.suffix != ".jsonl" and _opens_array(path):
        items = _array(str(path), parse_json(read_text(path), str(path), unique=True))
    else:
        items = _lines(path)
    if not items:
        raise UserError(f"{path} holds no items")
    return items


def read_lines(path: Path) -> list[str]:
    """Return the lines of a plain text file that are not empty, without spaces around them."""
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]


def read_refusals(path: Path) -> tuple[str, ...]:
    """Read a file of one refusal a line. Raises UserError for one that holds none, or one of them twice."""
    lines = read_lines(path)
    if not lines:
        raise UserError(f"{path} holds no refusals", "write one on each line")
    for number, line in enumerate(lines):
        if line in lines[:number]:
            raise UserError(f"{path} holds {line!r} twice", "remove one")
    return tuple(lines)


def read_parts(path: Path, names: Sequence[str]) -> dict[str, list[Item]]:
    """Read a file that is one JSON object, or an array that holds only this object, with a list under each name.

    Raises UserError that names the file, the part and the item ("unlearn.json: train item 3").
    """
    value = parse_json(read_text(path), str(path), unique=True)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    parts = {}
    for name in names:
        values = value.get(name) if isinstance(value, dict) else None
        if not isinstance(values, list) or not values:
            raise UserError(f"{path}: {name!r} is missing, empty or not a list")
        parts[name] = _array(f"{path}: {name}", values, separator=" ")
    return parts


def read_text(path: Path) -> str:
    """Return the whole file; a byte order mark is dropped. Raises UserError that names file and line."""
    with _reading(path):
        content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, content[: error.start].count(b"\n") + 1) from None


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into a UserError."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _not_utf8(path: Path, line: int) -> UserError:
    return UserError(f"{path}:{line}: not UTF-8", f"iconv -f latin1 -t utf-8 {path}")


def _opens_array(path: Path) -> bool:
    with _reading(path), path.open("rb") as file:
        lines = (line.removeprefix(BOM_UTF8).strip() for line in file)
        return next(filter(None, lines), b"").startswith(b"[")


def _lines(path: Path) -> list[Item]:
    """Read line by line, for corpora of gigabytes. Only "\\n" ends a line: a text may hold other separators."""
    items = []
    with _reading(path), path.open("rb") as file:
        for number, content in enumerate(file, 1):
            try:
                line = content.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise _not_utf8(path, number) from None
            if line.strip():
                place = f"{path}:{number}"
                items.append(_item(place, number, parse_json(line, place, unique=True)))
    return items


def _array(place: str, values: Sequence[Any], separator: str = ": ") -> list[Item]:
    return [_item(f"{place}{separator}item {number}", number, value) for number, value in enumerate(values, 1)]


def _table(path: Path) -> list[Item]:
    parquet = parquet_reader(path)
    try:
        rows = parquet.read_table(path).to_pylist()
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is no readable parquet file: {error}") from error
    return _array(str(path), rows)


def parquet_reader(path: Path) -> ModuleType:
    """Return pyarrow.parquet; UserError when pyarrow, which is not a dependency, is not installed."""
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UserError(f"{path} is a parquet file; reading it needs pyarrow", "pip install pyarrow") from None


def _item(place: str, number: int, value: Any) -> Item:
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, dict):
        raise UserError(f"{place}: expected an object, got {type(value).__name__}")
    return Item(place, number, value)


def text(item: Item, key: str, fix: str = "") -> str:
    """Return the item's text under this key without spaces around it. Raises UserError when there is none."""
    value = item.fields.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{item.place}: {key!r} is missing, empty or not a text", fix)
    return value.strip()


def texts(item: Item, key: str) -> tuple[str, ...]:
    """Return the item's list of texts under this key. Raises UserError when it is missing, empty or holds others."""
    values = item.fields.get(key)
    if not isinstance(values, list) or not values:
        raise UserError(f"{item.place}: {key!r} is missing, empty or not a list of texts")
    if not all(isinstance(value, str) and value.strip() for value in values):
        raise UserError(f"{item.place}: {key!r} holds something that is empty or not a text")
    return tuple(value.strip() for value in values)


def require_count(path: Path, items: Sequence[Item], published: int) -> None:
    """Raise UserError for a file without as many items as were published; the option `subset` skips this check."""
    if len(items) != published:
        raise UserError(
            f"{path} holds {len(items)} items, {published} were published",
            "get the whole file, or allow a part of it with the benchmark's option subset=true",
        )


def spread(values: Sequence[T], limit: int | None) -> tuple[T, ...]:
    """Return `limit` of the values, spread evenly and in order; all of them for None."""
    if limit is None or limit >= len(values):
        return tuple(values)
    return tuple(values[i * len(values) // limit] for i in range(limit))
