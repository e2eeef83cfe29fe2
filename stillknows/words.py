"""Numbers and tables as people read them, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


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


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with padded columns; pipes and line breaks in the data cannot break it."""
    lines = [[" ".join(text.split()).replace("|", "\\|") for text in line] for line in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(t.ljust(w) for t, w in zip(line, widths, strict=True))} |" for line in lines)
