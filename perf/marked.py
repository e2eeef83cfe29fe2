"""Pages of which a program makes a part: what stands between its marks; the rest is written by hand."""

from __future__ import annotations

from pathlib import Path

from stillknows.store import read_text, write_text

END = "<!-- end -->"


def fill(page: Path, program: str, text: str) -> None:
    """Put a text between a program's marks, in the place of what it made before. Raises ValueError without marks."""
    begin = f"<!-- made by {program} -->"
    before, found, rest = read_text(page).partition(begin)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise ValueError(f"{page} has no {begin} … {END}")
    write_text(page, f"{before}{begin}\n\n{text}\n\n{END}{after}")
