"""Files: a reader never sees half of one, a folder has one owner."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from stillknows import json_text, store
from stillknows.checksums import file_digest
from stillknows.errors import UserError


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failing_writer_leaves_the_old_file_and_no_rest(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "result.json"
    store.write_text(path, "old")

    def fail(partial: Path) -> None:
        partial.write_text("half of the n")
        raise error

    with pytest.raises(error):
        store.replace_file(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_json_round_trip_and_refusal_of_nan(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    store.write_json(path, {"ü": [1.5, None]})
    assert store.read_json(path) == {"ü": [1.5, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.write_json(path, {"a": float("nan")})
    assert store.read_json(path) == {"ü": [1.5, None]}


def test_broken_json_is_the_users_to_mend(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(UserError, match=r"no file .*a\.json"):
        store.read_json(path)
    for content in (b'{"a": 1', b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.json is not JSON"):
            store.read_json(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 100_000, "nested more than 100 levels deep"),
        ("[" * 102 + "]" * 102, "nested more than 100 levels deep"),
        ('{"a":' * 102 + "1" + "}" * 102, "nested more than 100 levels deep"),
        ("1" * 5000, "an integer has 5000 digits"),
        ('{"a": ' + "1" * 309 + "}", "an integer has 309 digits"),
        (r'["a", {"b": "\ud800"}]', "holds half a character"),
        (r'{"\uDFFF": 1}', "holds half a character"),
    ],
    ids=range(7),
)
def test_json_that_no_parser_agrees_on_is_refused(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(UserError, match=rf"^\S*a\.json .*{words}"):
        store.read_json(path)


def test_json_at_the_limits_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[" * 100 + r'"\ud83e\udd89", 1' + "0" * 307 + "]" * 100)
    value = store.read_json(path)
    for _ in range(99):
        (value,) = value
    assert value == ["🦉", 10**307]


def test_what_others_wrote_is_parsed_in_one_place() -> None:
    """Modules that call json themselves read only what this package, or a library in memory, has just written."""
    own = {"store.py", "json_text.py", "analysis/recovery_curve.py", "model/packed/gguf_writer.py", "training/loop.py"}
    own |= {"unlearning/ledger.py", "auditing/comparable.py", "model/chat.py", "model/chat_worker.py"}
    own |= {"specs.py"}  # a text in quotes, which is no object
    root = Path(store.__file__).parent
    found = {str(f.relative_to(root)) for f in root.rglob("*.py") if re.search(r"json\.loads?\(", f.read_text())}
    assert found <= own


def test_a_folder_is_filled_at_once_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "kept.txt").write_text("kept")
    (out / "run.json").write_text("old")

    def fill(fail: bool) -> None:
        with store.atomic_folder(out) as work:
            (work / "run.json").write_text("new")
            (work / "weights").write_text("new")
            if fail:
                raise RuntimeError

    with pytest.raises(RuntimeError):
        fill(fail=True)
    assert sorted(p.name for p in out.iterdir()) == ["kept.txt", "run.json"]
    assert (out / "run.json").read_text() == "old"
    fill(fail=False)
    assert {p.name: p.read_text() for p in out.iterdir()} == {"kept.txt": "kept", "run.json": "new", "weights": "new"}


def test_the_record_is_moved_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a folder with a record is complete."""
    moved: list[str] = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: (moved.append(self.name), replace(self, target))[1])
    with store.atomic_folder(tmp_path / "out") as work:
        for name in ("run.json", "a.json", "tokenizer.json", "weights"):
            (work / name).write_text(name)
    assert moved[-1] == "run.json"
    assert len(moved) == 4


LOCKED = """
import sys
import threading
from pathlib import Path
from stillknows.store import locked
with locked(Path(sys.argv[1])):
    print("mine", flush=True)
    sys.stdin.read()
"""


def test_a_lock_keeps_a_second_process_out_until_the_first_ends(tmp_path: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", LOCKED, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdin is not None
    assert other.stdout is not None
    with other:
        try:
            assert other.stdout.readline() == "mine\n"
            with pytest.raises(UserError, match="another run is working in"), store.locked(tmp_path):
                pass
        finally:
            other.kill()  # a killed run leaves no lock behind
    with store.locked(tmp_path) as folder:
        assert folder == tmp_path


def test_a_lock_needs_a_folder_that_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"), store.locked(tmp_path / "file" / "out"):
        pass


def test_results_are_not_replaced_unasked(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    store.require_new(path, overwrite=False)
    path.write_text("")
    store.require_new(path, overwrite=True)
    with pytest.raises(UserError, match="exists already"):
        store.require_new(path, overwrite=False)


def test_work_is_done_once_per_plan(tmp_path: Path) -> None:
    def work(plan: object, fail: bool = False) -> bool:
        with store.build_once(tmp_path, plan) as folder:
            if fail:
                raise RuntimeError
            return folder is not None

    assert work("a")
    assert not work("a")
    assert work("b")
    assert work("a")
    with pytest.raises(RuntimeError):
        work("c", fail=True)
    assert work("c")
    assert not work("c")


def test_keys_depend_on_content_and_not_on_order_of_names() -> None:
    assert store.digest({"a": 1, "b": [2]}) == store.digest({"b": [2], "a": 1})
    assert store.digest("ab", "c") != store.digest("a", "bc")
    assert store.digest(1) != store.digest("1")


def test_digests_depend_on_names_and_contents(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("1")
    b.write_text("2")
    first = file_digest(a, b)
    assert len(first) == 64
    assert file_digest(a, b) == first
    assert file_digest(b, a) != first
    b.write_text("3")
    assert file_digest(a, b) != first
    assert json.dumps(first)


def test_who_holds_a_folder_may_lock_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it is writing stays; another thread may not."""
    monkeypatch.chdir(tmp_path)
    refused: list[str] = []

    def other() -> None:
        try:
            with store.locked(Path("out")):
                pass
        except UserError as error:
            refused.append(str(error))

    with store.locked(Path("out")), store.atomic_folder(Path("out")) as work:
        with store.locked(tmp_path / "out"):
            assert work.is_dir()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        (work / "a").write_text("")
    other()
    assert [text.partition("\n")[0] for text in refused] == ["another run is working in out"]
    assert (tmp_path / "out" / "a").is_file()


def test_a_key_that_is_given_twice_is_refused_where_one_is_asked_for() -> None:
    text = '{"question": "who", "answer": {"a": 1, "a": 2}}'
    assert json_text.parse_json(text, "items.jsonl:3")["answer"] == {"a": 2}
    with pytest.raises(UserError, match=r"^items\.jsonl:3 gives 'a' twice in one object\n  keep one of them$"):
        json_text.parse_json(text, "items.jsonl:3", unique=True)
    assert json_text.parse_json('[{"a": 1}, {"a": 2}]', "", unique=True) == [{"a": 1}, {"a": 2}]
