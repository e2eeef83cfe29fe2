"""Small charts as SVG that need no library, no network and no script, and that say in words what they show."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from stillknows.formatting import for_terminal

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 36, 60  # margins, for labels
# told apart by everybody, dark enough on white for text (4.5 : 1), and each with a shape of its own
COLOURS = ("#1f5aa6", "#b3400e", "#3d6b1c", "#7a3d9e")
SIZE = 5


class Mark(NamedTuple):
    """One point with its bounds, None where there are none, and what is written beside it."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    label: str = ""


class Series(NamedTuple):
    """Marks of one kind; `joined` by a line where one follows on another."""

    name: str
    marks: tuple[Mark, ...]
    joined: bool = False


class ChartAxis(NamedTuple):
    """What an axis says, from where to where it goes, and where numbers or names stand on it."""

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]

    def share(self, value: float) -> float:
        """Return where a value lies: 0 at the low end, 1 at the high end, and never beyond."""
        return min(max((value - self.low) / ((self.high - self.low) or 1), 0.0), 1.0)


def unit_axis(label: str, values: Sequence[float]) -> ChartAxis:
    """Return an axis that holds 0, 1 and all values, with a tick at every half or quarter."""
    low, high = min([0.0, *values]), max([1.0, *values])
    step = 0.25 if high - low <= 1.5 else 0.5 if high - low <= 3 else float(round(high - low) or 1)
    first = int(low // step)
    ticks = [first * step + i * step for i in range(int((high - first * step) / step) + 1)]
    return ChartAxis(
        label, low, high, tuple((tick, f"{tick:g}".replace("-", "−")) for tick in ticks if tick >= low - 1e-9)
    )


def chart(
    title: str, description: str, x: ChartAxis, y: ChartAxis, series: Sequence[Series], limit: float | None = None
) -> str:
    """Return an SVG document. All texts are escaped.

    Args:
        description: what the chart shows, for those who do not see it.
        limit: where on the y axis a dashed line lies.
    """
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-family="sans-serif" '
        f'font-size="13" aria-label="{_text(title)}">',
        f"<title>{_text(title)}</title><desc>{_text(description)}</desc>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        *_axes(x, y),
        *_limit(y, limit),
        *(part for i, one in enumerate(series) for part in _series(one, i, x, y)),
        *_legend(series),
    ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(words: str) -> str:
    return html.escape(for_terminal(words), quote=True)


def _at(x: ChartAxis, y: ChartAxis, mark_x: float, mark_y: float) -> tuple[float, float]:
    across = LEFT + x.share(mark_x) * (WIDTH - LEFT - RIGHT)
    return round(across, 1), round(HEIGHT - BOTTOM - y.share(mark_y) * (HEIGHT - TOP - BOTTOM), 1)


def _axes(x: ChartAxis, y: ChartAxis) -> Iterator[str]:
    left, bottom = _at(x, y, x.low, y.low)
    right, top = _at(x, y, x.high, y.high)
    yield f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="#444"/>'
    for value, name in x.ticks:
        place = _at(x, y, value, y.low)[0]
        yield f'<text x="{place}" y="{bottom + 18}" text-anchor="middle" fill="#333">{_text(name)}</text>'
    for value, name in y.ticks:
        place = _at(x, y, x.low, value)[1]
        yield f'<path d="M{left} {place}H{right}" stroke="#ddd"/>'
        yield f'<text x="{left - 8}" y="{place + 4}" text-anchor="end" fill="#333">{_text(name)}</text>'
    yield f'<text x="{(left + right) / 2}" y="{HEIGHT - 14}" text-anchor="middle" fill="#222">{_text(x.label)}</text>'
    middle = (top + bottom) / 2
    turned = f'transform="translate(16 {middle}) rotate(-90)" text-anchor="middle"'
    yield f'<text {turned} fill="#222">{_text(y.label)}</text>'


def _limit(y: ChartAxis, limit: float | None) -> Iterator[str]:
    if limit is not None:
        place = round(HEIGHT - BOTTOM - y.share(limit) * (HEIGHT - TOP - BOTTOM), 1)
        yield f'<path d="M{LEFT} {place}H{WIDTH - RIGHT}" stroke="#a00" stroke-dasharray="5 4"/>'


def _series(one: Series, number: int, x: ChartAxis, y: ChartAxis) -> Iterator[str]:
    colour = COLOURS[number % len(COLOURS)]
    points = [_at(x, y, mark.x, mark.y) for mark in one.marks]
    if one.joined and len(points) > 1:
        line = " ".join(f"{across},{down}" for across, down in points)
        yield f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>'
    for mark, (across, down) in zip(one.marks, points, strict=True):
        ends = [y.low if mark.low is None else mark.low, y.high if mark.high is None else mark.high]
        if mark.low is not None or mark.high is not None:
            low, high = (_at(x, y, mark.x, end)[1] for end in ends)
            yield f'<path d="M{across} {low}V{high}" stroke="{colour}"/>'
        yield _shape(number, across, down, colour)
        if mark.label:
            anchor = "end" if across > WIDTH * 0.7 else "start"
            beside = across + (-9 if anchor == "end" else 9)
            place = f'x="{beside}" y="{down - 6}" text-anchor="{anchor}"'
            yield f'<text {place} fill="{colour}">{_text(mark.label)}</text>'


def _shape(number: int, across: float, down: float, colour: str) -> str:
    if number % 3 == 1:
        return f'<rect x="{across - SIZE}" y="{down - SIZE}" width="{2 * SIZE}" height="{2 * SIZE}" fill="{colour}"/>'
    if number % 3 == 2:
        path = f"M{across} {down - SIZE - 1}L{across + SIZE} {down + SIZE}H{across - SIZE}Z"
        return f'<path d="{path}" fill="{colour}"/>'
    return f'<circle cx="{across}" cy="{down}" r="{SIZE}" fill="{colour}"/>'


def _legend(series: Sequence[Series]) -> Iterator[str]:
    place = float(LEFT)
    for number, one in enumerate(series):
        if not one.name:
            continue
        colour = COLOURS[number % len(COLOURS)]
        yield _shape(number, place + SIZE, TOP - 18, colour)
        yield f'<text x="{place + 18}" y="{TOP - 13}" fill="{colour}">{_text(one.name)}</text>'
        place += 36 + 7.5 * len(one.name)
