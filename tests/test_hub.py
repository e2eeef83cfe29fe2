"""Benchmarks from the hub, downloaded by the real client from a stand-in that speaks the hub's protocol."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOFU = "/datasets/locuslab/TOFU/resolve/main"
MUSE = "/datasets/muse-bench/MUSE-News/resolve/main"
SCRIPT = """
import sys, time
time.sleep = lambda seconds: None  # the client waits half a minute in all before it gives up
from stillknows.errors import UserError
from stillknows.registry import bind
try:
    benchmark = bind("benchmark", sys.argv[1])()
except UserError as error:
    sys.exit(str(error))
assert not {"torch", "transformers"} & sys.modules.keys()
print(*(f"{s.name}={len(s.examples)}" for s in benchmark.splits), *benchmark.refusals)
"""


class Hub(ThreadingHTTPServer):
    """Answers HEAD and GET of resolve addresses from `files`; `asked` lists the requests.

    `broken` are addresses whose next GET breaks off half-way, `errors` maps others to a status and the code that the
    hub sends with it.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {}
        self.errors: dict[str, tuple[int, str]] = {}
        self.broken: set[str] = set()
        self.asked: list[tuple[str, str]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def names(self, method: str) -> list[str]:
        return [path.partition("/resolve/")[2].partition("/")[2] for asked, path in self.asked if asked == method]


class Answer(BaseHTTPRequestHandler):
    server: Hub  # type: ignore[assignment]

    def do_HEAD(self) -> None:
        self._answer(with_content=False)

    def do_GET(self) -> None:
        self._answer(with_content=True)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, *, with_content: bool) -> None:
        hub, path = self.server, self.path.replace(f"/{COMMIT}/", "/main/")
        hub.asked.append((self.command, path))
        content = hub.files.get(path)
        status, code = hub.errors.get(path, (200, "") if content is not None else (404, "EntryNotFound"))
        content = content if content is not None and status == 200 else b""
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if first else status)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content) - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if with_content and path in hub.broken:
            hub.broken.remove(path)
            self.wfile.write(content[first : len(content) // 2])
            self.close_connection = True
        elif with_content:
            self.wfile.write(content[first:])


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub with a small TOFU: 3 forgotten and 5 retained items, and files in the form of arrays nowhere."""
    hub = Hub()
    for name, count in (("forget01", 3), ("retain99", 5), ("forget01_perturbed", 3), ("retain_perturbed", 2)):
        items = [{"question": f"{name} {i}?", "answer": f"a{i}"} for i in range(count)]
        hub.files[f"{TOFU}/{name}.json"] = "".join(json.dumps(item) + "\n" for item in items).encode()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield hub
    hub.shutdown()
    thread.join()
    hub.server_close()


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def load(hub: Hub, tmp_path: Path) -> Callable[..., Ran]:
    """Return load(spec, **environment): make the benchmark in a process of its own, since the hub's client reads its
    settings when it is imported. All calls share one cache."""

    def run(spec: str = "tofu:forget01:subset=true", **environment: str) -> Ran:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        settings = {
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(tmp_path / "hub"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "*",
        }
        command = [sys.executable, "-c", SCRIPT, spec]
        done = subprocess.run(
            command, env=inherited | settings | environment, capture_output=True, text=True, timeout=60
        )
        return Ran(done.returncode, done.stdout.strip(), done.stderr.strip())

    return run


SIZES = "forget=3 retain=2"


def test_files_are_downloaded_and_what_is_optional_may_be_absent(hub: Hub, load: Callable[..., Ran]) -> None:
    assert load() == (0, SIZES, "")
    assert sorted(hub.names("GET")) == [
        "forget01.json",
        "forget01_perturbed.json",
        "retain99.json",
        "retain_perturbed.json",
    ]
    assert set(hub.names("HEAD")) - set(hub.names("GET")) == {
        "real_authors_perturbed.json",
        "world_facts_perturbed.json",
        "idontknow.jsonl",
    }


def test_a_file_in_the_cache_is_not_downloaded_again(hub: Hub, load: Callable[..., Ran]) -> None:
    """Offline, the hub is not even asked whether the file has changed."""
    load()
    hub.asked.clear()
    assert load() == (0, SIZES, "")
    assert hub.names("GET") == []
    hub.asked.clear()
    assert load(HF_HUB_OFFLINE="1") == (0, SIZES, "")
    assert hub.asked == []


def test_offline_without_a_cache_is_explained(hub: Hub, load: Callable[..., Ran]) -> None:
    ran = load(HF_HUB_OFFLINE="1")
    assert ran.code == 1
    assert ran.err.startswith("locuslab/TOFU cannot be downloaded: ")
    assert "offline mode is enabled" in ran.err
    assert ran.err.endswith("\n  give a folder with its files as `data`")
    assert hub.asked == []


def test_a_hub_that_is_not_there_is_explained(load: Callable[..., Ran]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        ran = load(HF_ENDPOINT=f"http://127.0.0.1:{unused.getsockname()[1]}")
    assert ran.code == 1
    assert "locuslab/TOFU cannot be downloaded: [Errno 111] Connection refused\n  give a folder" in ran.err


def test_every_file_that_the_hub_lacks_is_named(hub: Hub, load: Callable[..., Ran]) -> None:
    for name in ("forget01", "retain99"):
        del hub.files[f"{TOFU}/{name}.json"]
    assert load() == (
        1,
        "",
        "TOFU needs files that are missing in locuslab/TOFU on the hub: forget01.json, retain99.json\n"
        "  give a folder with TOFU's files as `data`",
    )


def test_a_download_that_broke_off_is_completed(hub: Hub, load: Callable[..., Ran]) -> None:
    """The client asks for the missing end of the file, and the file is whole: all of its items are read."""
    hub.files[f"{TOFU}/retain99.json"] *= 2000
    del hub.files[f"{TOFU}/retain_perturbed.json"]
    hub.broken.add(f"{TOFU}/retain99.json")
    ran = load()
    assert (ran.code, ran.out) == (0, "forget=3 retain=10000"), ran.err
    assert hub.names("GET").count("retain99.json") == 2


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "GatedRepo", "locuslab/TOFU is given out only to those who accept its terms\n  accept them at https://"),
        (404, "RepoNotFound", "the hub has no dataset locuslab/TOFU, or none that you may see\n  hf auth login"),
        (500, "", "locuslab/TOFU cannot be downloaded: Server error '500 Internal Server Error'"),
    ],
)
def test_refusals_are_explained(hub: Hub, load: Callable[..., Ran], status: int, code: str, message: str) -> None:
    hub.errors = dict.fromkeys(hub.files, (status, code))
    ran = load()
    assert (ran.code, ran.out) == (1, "")
    assert message in ran.err


def test_the_hubs_parquet_needs_pyarrow(hub: Hub, load: Callable[..., Ran], tmp_path: Path) -> None:
    """MUSE lies there as parquet: found behind the names of the other forms, and refused where nothing can read it."""
    hub.files[f"{MUSE}/raw/forget-00000-of-00001.parquet"] = b"PAR1"
    (tmp_path / "pyarrow.py").write_text("raise ImportError")
    ran = load("muse", PYTHONPATH=str(tmp_path))
    assert ran.code == 1
    assert ran.err.endswith(
        "-00000-of-00001.parquet is a parquet file; reading it needs pyarrow\n  pip install pyarrow"
    )
    assert hub.names("HEAD") == ["raw/forget.txt", "raw/forget.json", "raw/forget-00000-of-00001.parquet"]


def test_muse_from_the_cache(hub: Hub, load: Callable[..., Ran]) -> None:
    """Offline, the name under which a file was cached is found behind those that the hub did not have."""
    for side in ("forget", "retain"):
        for icl in ("", "_icl"):
            hub.files[f"{MUSE}/knowmem/{side}_qa{icl}.json"] = b'[{"question": "q", "answer": "a"}]'
    hub.files[f"{MUSE}/verbmem/forget.json"] = b'[{"prompt": "p", "gt": "g"}]'
    for name in ("raw/forget", "raw/retain1", "privleak/forget", "privleak/retain2", "privleak/holdout"):
        hub.files[f"{MUSE}/{name}.json"] = f'["{name}"]'.encode()
    sizes = "verbmem=1 knowmem_forget=1 knowmem_retain=1 privleak_forget=1 privleak_retain=1 privleak_holdout=1"
    assert load("muse:subset=true") == (0, sizes, "")
    assert load("muse:subset=true", HF_HUB_OFFLINE="1") == (0, sizes, "")


def test_a_hub_that_is_gone_is_asked_once_for_each_file_in_the_cache(hub: Hub, load: Callable[..., Ran]) -> None:
    """And for one of the files that may be absent; the others are then left out without asking."""
    load()
    hub.asked.clear()
    hub.errors = dict.fromkeys([*hub.files, f"{TOFU}/real_authors_perturbed.json"], (500, ""))
    ran = load()
    assert (ran.code, ran.out) == (0, SIZES), ran.err
    assert set(hub.names("HEAD")) == {
        "forget01.json",
        "retain99.json",
        "forget01_perturbed.json",
        "retain_perturbed.json",
        "real_authors_perturbed.json",
    }
