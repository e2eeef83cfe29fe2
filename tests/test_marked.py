"""Of a page written by hand a program replaces its own part alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from perf.marked import fill


def test_what_stands_between_the_marks_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("by hand\n\n<!-- made by perf.a -->\n\nold\n\n<!-- end -->\n\nand here\n")
    for text in ("| new |", "| newer |"):
        fill(page, "perf.a", text)
    assert page.read_text() == "by hand\n\n<!-- made by perf.a -->\n\n| newer |\n\n<!-- end -->\n\nand here\n"


@pytest.mark.parametrize("text", ["", "<!-- made by perf.a -->", "<!-- end --> <!-- made by perf.a -->"])
def test_a_page_without_marks_is_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(ValueError, match=r"has no <!-- made by perf\.a -->"):
        fill(tmp_path / "page.md", "perf.a", "new")
    assert (tmp_path / "page.md").read_text() == text
