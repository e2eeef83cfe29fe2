"""How commands end and what they print, whatever the terminal, the signal, the disk and the names of others are."""

from __future__ import annotations

import copy
import functools
import json
import os
import random
import signal
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from test_formatting import PIECES
from test_report import make_audit, make_report

from stillknows import cli as command_line
from stillknows import progress, store
from stillknows.errors import is_disk_full
from stillknows.reporting import report
from stillknows.reporting.overview import summary
from stillknows.reporting.schema import Json, parsed
from stillknows.types import Finding

Case = Callable[..., Any]
PROGRAM = "import sys; from stillknows.cli import main; sys.argv = ['stillknows', *sys.argv[1:]]; main()"
UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


@functools.cache
def by_hand() -> Json:
    """A report; no fixture, since hypothesis would write it out for every example."""
    return make_report(make_audit()).to_json()


@pytest.fixture
def built() -> Json:
    return by_hand()


def with_names(built: Json, name: str) -> Json:
    """Return a report in which all that a user or a model can name or say is this text."""
    result = copy.deepcopy(built)
    result |= {"benchmark": name, "left_out": [{"variant": name, "because": name}]}
    result["repeat"] = {"command": name, "versions": {name: name}}
    variants = {variant: name if variant == "int4" else variant for variant in result["variants"]}
    result["variants"] = list(variants.values())
    for subject in result["subjects"]:
        subject |= {"path": name, "fingerprint": name, "quantized": name, "defence": name}
        for finding in subject["findings"]:
            finding |= {"variant": variants[finding["variant"]], "split": name, "metric": name, "detail": name}
        subject["findings"].append(asdict(Finding("served_differently", "note", detail=name)))
        subject |= {"run": {name: name}, "variants": {variants[v]: w for v, w in subject["variants"].items()}}
        if subject["name"] == "brittle":
            subject["name"] = name
        for cell in subject["cells"]:
            cell["variant"] = variants[cell["variant"]]
            if "not_measured" in cell:
                cell["not_measured"] = name
        for leak in subject["leaks"]:
            leak |= dict.fromkeys(("id", "question", "truth", "generated", "generated_full"), name)
    return result


def prose(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("|")]


@settings(max_examples=10, deadline=None)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join))
def test_names_of_others_have_no_effect_in_any_medium(name: str) -> None:
    result, plain = (parsed(with_names(by_hand(), text), "by hand") for text in (f"a{name}b", "ab"))
    for shown in (report.html(result), report.markdown(result)):
        assert {c for c in shown if unicodedata.category(c) in UNSEEN} <= {"\n", "\t", "\u200d"}
    parser = MarkdownIt("commonmark").enable("table")
    kinds = [{t.type for t in parser.parse(report.markdown(r))} for r in (result, plain)]
    assert kinds[0] == kinds[1]  # tables of long names are cut in two, so that their number is free
    inline = [c.type for t in parser.parse(report.markdown(result)) for c in t.children or ()]
    assert set(inline) <= {"text", "code_inline", "softbreak"}
    assert report.html(result).count("<script") == report.html(plain).count("<script") == 0
    assert len(prose(summary(result))) == len(prose(summary(plain)))


def test_what_is_printed_steers_no_terminal(cli: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder's name in a message, a hint and progress; a model's name in a report."""
    folder = tmp_path / "\x1b[2J\u202erun"
    ran = cli("report", folder)
    assert ran.code == 2
    assert r"\x1b[2J\u202erun" in ran.err
    report.write(parsed(with_names(by_hand(), "\x1b[2J\u202e"), "built"), tmp_path)
    for options in ([], ["--json"]):
        ran = cli("report", tmp_path, *options)
        assert ran.code == 0, ran.err
        assert {c for c in ran.out + ran.err if unicodedata.category(c) in UNSEEN} == {"\n"}
    assert json.loads(ran.out) == report.read(tmp_path).to_json()
    with progress.shown():
        progress.log("\x1b[2J")
    assert capsys.readouterr().err == "\\x1b[2J\n"


def test_a_bar_shows_names_as_they_are(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Square brackets are markup to the library that draws it, which ends in an error where they do not match."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.shown(), progress.progress("[/red]\x1b[2J", 1) as advance:
        advance(1, "[/]\x1b[2J")
    assert "\x1b[2J" not in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_exit_codes_do_not_depend_on_what_a_terminal_can_show(encoding: str, tmp_path: Path) -> None:
    """Where a letter is missing, another is written: a minus sign stays one."""
    report.write(parsed(with_names(by_hand(), "Zürich 语"), "built"), tmp_path)
    text = report.markdown(report.read(tmp_path))
    assert "−" in text + "−∞ to ∞"
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    for options in ([], ["--json"]):
        ran = subprocess.run(
            [sys.executable, "-c", PROGRAM, "report", str(tmp_path), *options], env=environment, capture_output=True
        )
        assert (ran.returncode, b"Traceback" in ran.stderr) == (0, False), ran.stderr
        shown = ran.stdout.decode(encoding)
        assert "?" not in shown.replace(" ?", "")  # a letter that was lost; questions end in " ?"
    assert json.loads(shown) == report.read(tmp_path).to_json()
    missing = [sys.executable, "-c", PROGRAM, "report", str(tmp_path / "语")]
    ran = subprocess.run(missing, env=environment, capture_output=True)
    assert (ran.returncode, b"Traceback" in ran.stderr) == (2, False), ran.stderr


# Reports of others


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the way to every part of a JSON value."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [*([path] if path else []), *(place for key, part in parts for place in places(part, (*path, key)))]


def test_a_report_that_was_made_up_gives_one_message_or_is_shown(built: Json, cli: Case, tmp_path: Path) -> None:
    """Its digest may be right: parts are missing, or are something else."""
    report.write(parsed(built, "built"), tmp_path)
    draw, everywhere, refused = random.Random(0), places(built), 0
    few = [path for path in everywhere if len(path) < 4 and path[0] != "subjects"]
    for path in [*few, *draw.sample(everywhere, 25)]:
        other = copy.deepcopy(built)
        parent = other
        for key in path[:-1]:
            parent = parent[key]
        value = draw.choice([None, 1, -1.5, True, "x", [], {}, [None], {"a": None}, "missing"])
        if value == "missing":
            del parent[path[-1]]
        else:
            parent[path[-1]] = value
        store.write_sealed(tmp_path / "report.json", other)
        ran = cli("report", tmp_path)
        assert ran.code in (0, 2), (path, value)
        if ran.code == 2:
            refused += 1
            assert ran.err.startswith(f"stillknows: {tmp_path / 'report.json'} is not a report")
            assert len(ran.err.splitlines()) == 2
    assert refused > 25


@pytest.mark.parametrize(
    "change",
    [
        {"verdict": "FORGOTTEN"},
        {"splits": [{"name": "retain", "role": "retain", "examples": 1, "facts": 1}]},
        {"subjects": []},
        {"policy": {}},
    ],
)
def test_a_report_that_contradicts_itself_is_refused(change: Json, built: Json, cli: Case, tmp_path: Path) -> None:
    report.write(parsed(built, "built"), tmp_path)
    store.write_sealed(tmp_path / "report.json", built | change)
    ran = cli("report", tmp_path)
    assert (ran.code, ran.out) == (2, "")
    assert "report.json is not a report" in ran.err


# Signals

SLOW = """
import signal, sys, time
from pathlib import Path
from stillknows import cli, store
from stillknows.cli.terminal import app

# what a shell runs in the background ignores Ctrl-C, and so does what that starts
signal.signal(signal.SIGINT, signal.default_int_handler)

@app.command()
def slow(out: Path):
    with store.locked(out):
        store.write_text(out / "finished", "kept")
        with store.atomic_folder(out / "model") as work:
            (work / "half").write_text("half")
            print("working", flush=True)
            time.sleep(60)

sys.argv = ["stillknows", "slow", sys.argv[1]]
cli.main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_with_a_message_and_leaves_what_is_finished(number: int, code: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", SLOW, str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        process.send_signal(number)
        _, words = process.communicate(timeout=30)
    assert process.returncode == code
    assert words == f"stillknows: {command_line.STOPPED}\n"
    assert {p.name for p in out.rglob("*")} == {store.LOCK, "finished", "model"}


def test_the_handler_of_before_is_back_after_a_command(cli: Case) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert cli("--version").code == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_commands_run_in_other_threads_too(cli: Case) -> None:
    """Where signals cannot be handled."""
    import threading

    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(cli("--version")))
    thread.start()
    thread.join()
    assert found[0].code == 0


# Full disks


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_short_write_of_numpy_is_a_full_disk() -> None:
    with Path("/dev/full").open("wb") as file, pytest.raises(OSError, match=r"requested and|No space") as caught:
        np.zeros(10**6).tofile(file)
    assert is_disk_full(caught.value)
    assert is_disk_full(OSError("10880 requested and 5472 written"))
    assert not is_disk_full(OSError("10880 requested"))
