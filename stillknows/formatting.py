"""Numbers, tables and texts of others as people read them, on a terminal and in Markdown."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

# Control, format, surrogates, line and paragraph separators: what steers a terminal, reorders a line or cannot be seen.
UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
SEEN = "\n\t\u200c\u200d"  # line breaks; joiners, without which Persian and Indic words are spelled wrongly
NOTE = r"\[\d+\](?![(\[:])"  # the number of a footnote
MARKUP = re.compile(rf"({NOTE})|[\\`*\[<|~@]|&(?=[#\w])|(?<![^\W_])_|_(?![^\W_])|(?<=\w)://|(?<=www)\.", re.IGNORECASE)
BLOCK = re.compile(r"^(\d{1,9}(?=[.)](?:\s|$))|(?=[#>]|[-+](?:[\s-]|$)))")  # begins a heading, quotation, list, rule


def number(value: float | None, infinite: str = "?", digits: int = 2) -> str:
    """Return a number with so many decimals, a true minus sign and no negative zero; `infinite` for None, as bounds
    without a finite value are kept."""
    return infinite if value is None else f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def significant(value: float | None, infinite: str = "?") -> str:
    """Return a number of any size with three significant digits."""
    return infinite if value is None else f"{value:.3g}".replace("-", "−")


def percent(share: float) -> str:
    """Return a share with at most two decimals, and never 0 for what is not 0."""
    if 0 < abs(share) < 1e-4:
        return "under 0.01 %"
    return f"{100 * share:.2f}".rstrip("0").rstrip(".").replace("-", "−") + " %"


def for_terminal(text: str) -> str:
    """Return text without effects on a terminal: codes that steer it or reorder a line are written as in Python."""
    if text.isascii() and text.isprintable():
        return text
    unseen = (c not in SEEN and unicodedata.category(c) in UNSEEN for c in text)
    return "".join(c.encode("unicode_escape").decode() if hidden else c for c, hidden in zip(text, unseen, strict=True))


def one_line(text: str) -> str:
    """Return text as `for_terminal` does, on one line."""
    return " ".join(for_terminal(text).split())


def for_markdown(text: str) -> str:
    """Return text on one line, so that Markdown shows it as it is: no HTML, link, code or emphasis comes out of it."""
    line = MARKUP.sub(lambda found: found[1] or "\\" + found[0], one_line(text))
    return BLOCK.sub(r"\1\\", line)


def code(text: str) -> str:
    """Return text as code in Markdown, on one line, whatever it holds."""
    line = one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if len(fence) > 1 else f"`{line}`"


def table_of_texts(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of texts that are shown as they are, whatever they hold."""
    names, *lines = [list(map(for_markdown, line)) for line in (header, *rows)]
    return markdown_table(names, lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with padded columns; pipes and line breaks in the data cannot break it.

    Cells are Markdown: of texts of others what `for_markdown` returns.
    """
    lines = [[re.sub(r"(?<!\\)\|", r"\\|", one_line(text)) for text in line] for line in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(t.ljust(w) for t, w in zip(line, widths, strict=True))} |" for line in lines)


def duration(seconds: float) -> str:
    """Return a length of time as people say it: 40 s, 12 min, 3.5 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
