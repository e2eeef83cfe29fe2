"""Digests of files: what identifies them in records, fingerprints and certificates."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path


def content_digest(file: Path) -> str:
    """Return the SHA-256 of a file's content, as 64 hexadecimal digits: what `sha256sum` prints."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def file_digest(*files: Path) -> str:
    """Return the SHA-256 of the files' names and contents, as 64 hexadecimal digits."""
    return named_digest((file.name, content_digest(file)) for file in files)


def named_digest(contents: Iterable[tuple[str, str]]) -> str:
    """Return `file_digest` of files whose names and `content_digest` are known."""
    found = hashlib.sha256()
    for name, content in contents:
        found.update(name.encode() + b"\0" + bytes.fromhex(content))
    return found.hexdigest()
