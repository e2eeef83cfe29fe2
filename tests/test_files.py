"""Files of a published layout: every format, told apart, with messages that say where."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stillknows.benchmarks.files import Item, located, read_items, read_lines, require_count, spread, text, texts
from stillknows.errors import UserError


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def read(path: Path) -> list[tuple[str, int, Mapping[str, Any]]]:
    """Items with their places relative to the file."""
    return [(item.place.removeprefix(str(path)), item.number, item.fields) for item in read_items(path)]


def test_json_lines_are_numbered_by_line(file: Callable[..., Path]) -> None:
    for name in ("a.json", "a.jsonl"):
        assert read(file(name, '{"a": 1}\r\n\n{"b": "\u2028"}')) == [(":1", 1, {"a": 1}), (":3", 3, {"b": "\u2028"})]


def test_an_array_is_numbered_by_item(file: Callable[..., Path]) -> None:
    path = file("a.json", '\ufeff\n[{"a": 1},\n\n {"b": 2}]\n')
    assert read(path) == [(": item 1", 1, {"a": 1}), (": item 2", 2, {"b": 2})]


def test_texts_stand_for_objects(file: Callable[..., Path]) -> None:
    assert read(file("a.json", '["one", "two"]')) == [
        (": item 1", 1, {"text": "one"}),
        (": item 2", 2, {"text": "two"}),
    ]


def test_plain_text_is_one_item(file: Callable[..., Path]) -> None:
    path = file("a.txt", "one\n\n[two]\n")
    assert read(path) == [("", 1, {"text": "one\n\n[two]\n"})]
    assert read_lines(path) == ["one", "[two]"]


def test_json_lines_never_begin_an_array(file: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl:1: expected an object, got list"):
        read_items(file("a.jsonl", '["one", "two"]\n'))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "", " holds no items"),
        ("a.json", "[]", " holds no items"),
        ("a.txt", " \n", " holds no items"),
        ("a.json", '[{"a": 1}, 5]', ": item 2: expected an object, got int"),
        ("a.json", '[{"a": 1},\n{"b"]', " is not JSON: Expecting ':' delimiter: line 2 column 5"),
        ("a.json", "[" * 100_000, " is nested more than 100 levels deep"),
        ("a.json", '{"a": 1}\n{"b"\n', ":2 is not JSON: "),
        ("a.json", '{"a": 1}\n"Zürich"\n'.encode("latin-1"), ":2: not UTF-8\n  iconv -f latin1 -t utf-8 "),
        ("a.txt", "one\n\nZürich\n".encode("latin-1"), ":3: not UTF-8"),
    ],
    ids=range(9),
)
def test_bad_content(file: Callable[..., Path], name: str, content: str | bytes, message: str) -> None:
    path = file(name, content)
    with pytest.raises(UserError, match=re.escape(f"{path}{message}")):
        read_items(path)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"no file {tmp_path / 'a.json'}")):
        read_items(tmp_path / "a.json")
    with pytest.raises(UserError, match="is a folder"):
        read_items(tmp_path)
    with pytest.raises(UserError, match="cannot be read: File name too long"):
        read_items(tmp_path / ("a" * 300))


def item(**fields: Any) -> Item:
    return Item("f.json:3", 3, fields)


def test_texts_are_stripped() -> None:
    assert text(item(a=" b \n"), "a") == "b"
    assert texts(item(a=["b ", " c"]), "a") == ("b", "c")


@pytest.mark.parametrize("value", [None, "", " \n", 3, ["a"]])
def test_what_is_no_text(value: Any) -> None:
    with pytest.raises(UserError, match=r"^f\.json:3: 'a' is missing, empty or not a text\n  do this$"):
        text(item(a=value), "a", "do this")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "missing, empty or not a list"),
        ([], "missing, empty or not a list"),
        ("ab", "missing, empty or not a list"),
        (["a", ""], "something that is empty or not a text"),
        (["a", 3], "something that is empty or not a text"),
    ],
)
def test_what_is_no_list_of_texts(value: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"^f\.json:3: 'a' .*{message}"):
        texts(item(a=value), "a")


def test_counts(tmp_path: Path) -> None:
    require_count(tmp_path, [item(), item()], 2)
    with pytest.raises(UserError, match=f"{tmp_path} holds 2 items, 3 were published"):
        require_count(tmp_path, [item(), item()], 3)


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 10, 99])
def test_a_limit_keeps_items_spread_evenly(limit: int) -> None:
    found = spread(range(10), limit)
    assert len(found) == min(limit, 10)
    assert found[0] == 0
    gaps = {b - a for a, b in pairwise(found)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_no_limit_keeps_all() -> None:
    assert spread("abc", None) == ("a", "b", "c")


# Parquet


def test_parquet_needs_pyarrow(file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said where the file is found, before anything is read."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    path = file("a.parquet", b"PAR1")
    message = re.escape(f"{path} is a parquet file; reading it needs pyarrow\n  pip install pyarrow")
    with pytest.raises(UserError, match=message):
        read_items(path)
    with pytest.raises(UserError, match=message):
        located("X", {"a": ("a.json", "a.parquet")}, repository="o/r", data=str(path.parent))


def test_parquet_rows_are_items(file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for pyarrow; the test below uses the real one where it is installed."""
    table = SimpleNamespace(to_pylist=lambda: [{"text": "one"}, {"text": "two"}])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", SimpleNamespace(read_table=lambda path: table))
    assert read(file("a.parquet", b"")) == [(": item 1", 1, {"text": "one"}), (": item 2", 2, {"text": "two"})]


def test_real_parquet(file: Callable[..., Path]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = file("broken.parquet", b"PAR1")
    with pytest.raises(UserError, match=r"broken\.parquet is no readable parquet file"):
        read_items(path)
    parquet.write_table(pyarrow.table({"text": ["one", "two"], "choices": [["a"], ["b", "c"]]}), path)
    assert [item.fields for item in read_items(path)] == [
        {"text": "one", "choices": ["a"]},
        {"text": "two", "choices": ["b", "c"]},
    ]


# Where files lie


def test_the_first_name_that_exists_is_taken(file: Callable[..., Path], tmp_path: Path) -> None:
    file("b.json", "")
    file("c.json", "")
    wanted = {"x": ("a.json", "b.json", "c.json"), "y": ("d.json",)}
    assert located("X", wanted, repository="o/r", data=str(tmp_path), optional=("y",)) == {"x": tmp_path / "b.json"}


def test_all_missing_files_are_named(tmp_path: Path) -> None:
    wanted = {"x": ("a.json", "a.txt"), "y": ("b.json",), "z": ("c.json",)}
    with pytest.raises(UserError) as error:
        located("X", wanted, repository="o/r", data=str(tmp_path), optional=("z",))
    assert str(error.value) == (
        f"X needs files that are missing in {tmp_path}: a.json, b.json\n  give a folder with X's files as `data`"
    )
