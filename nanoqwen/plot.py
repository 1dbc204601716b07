"""Curves as SVG text: a function of the numbers, with no date, no font and no library in it.

Colours are CSS classes, so that one picture serves light and dark; the page that holds it says what they look like.
Long curves are thinned to the lowest and the highest value of each column of pixels: a spike of one step stays visible.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

TICK_X, TICK_Y = 80, 34  # pixels between ticks, about
CHAR = 6.3  # pixels of a digit of the labels, of 11 pixels height
FONT = "ui-sans-serif, system-ui, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
SIZES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
# What joins letters of a script or an emoji, and two spaces, are no danger; else what nobody sees is spelled out.
HARMLESS = {"\n", "\t", "\u200c", "\u200d", "\u00a0", "\u3000"}


class Line(NamedTuple):
    name: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray  # NaN: a gap
    look: str = "c0"  # CSS classes: a colour, and faint, bold or dashed
    dots: bool = False  # few points, each a dot that tells its value
    low: np.ndarray | None = None  # of a band around the line
    high: np.ndarray | None = None


class Chart(NamedTuple):
    title: str
    unit: str
    lines: list[Line]
    log: bool = False
    marks: tuple[tuple[float, str], ...] = ()  # moments, drawn as upright lines
    above: Line | None = None  # a second scale on top: x -> y, such as steps -> tokens


# --- text -------------------------------------------------------------------------------------------------------------


def safe(value: object) -> str:
    """Any text, for HTML and SVG, between tags and in attributes: inert, and without what cannot be seen."""
    text = str(value)
    if not text.isprintable():
        text = "".join(c if c.isprintable() or c in HARMLESS else _spelled(c) for c in text)
    return html.escape(text, quote=True)


def _spelled(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def short(value: float, digits: int = 4) -> str:
    """A number for a person, with as many digits: 1,234, 12.35k, 0.001235, 1.235e-5."""
    if not math.isfinite(value):
        return "n/a"
    size, name = next(((s, n) for s, n in SIZES if abs(value) >= 10 * s or (abs(value) >= s > 1e3)), (1.0, ""))
    value /= size
    if value and abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        return f"{_trimmed(mantissa)}e{int(exponent)}"
    before = math.floor(math.log10(abs(value))) + 1 if value else 1  # digits in front of the point; 0.01: -1
    return _trimmed(f"{value:,.{max(0, digits - before)}f}") + name


def _trimmed(number: str) -> str:
    return number.rstrip("0").rstrip(".") if "." in number else number


# --- numbers ----------------------------------------------------------------------------------------------------------


def thinned(x: ArrayLike, y: ArrayLike, columns: int) -> np.ndarray:
    """Which points to draw: the first, the last, and the lowest and highest of each column. NaNs are left out."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    kept = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    if len(kept) <= 2 * columns:
        return kept
    span = x[kept[-1]] - x[kept[0]] or 1.0
    column = np.minimum((x[kept] - x[kept[0]]) / span * columns, columns - 1).astype(int)
    order = np.lexsort((y[kept], column))  # by column, and in it by value
    edges = np.flatnonzero(np.diff(column[order])) + 1
    lowest, highest = order[np.r_[0, edges]], order[np.r_[edges - 1, len(order) - 1]]
    return kept[np.unique(np.r_[0, lowest, highest, len(kept) - 1])]


def ticks(low: float, high: float, wanted: int, log: bool = False) -> list[float]:
    """Round numbers between two values, about as many as wanted."""
    if log and low > 0 and high / low >= 20:
        for steps in ((1, 2, 5), (1, 3), (1,)):
            decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            found = [step * 10.0**decade for decade in decades for step in steps]
            found = [value for value in found if low <= value * (1 + 1e-9) and value <= high * (1 + 1e-9)]
            if len(found) <= wanted + 2:
                break
        return found[:: math.ceil(len(found) / (wanted + 2))]
    if not high > low:
        return [low]
    rough = (high - low) / max(1, wanted)
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-6)
    return [
        round(n * step, 12 - math.floor(math.log10(step))) for n in range(first, math.floor(high / step + 1e-6) + 1)
    ]


class Scale(NamedTuple):
    """Numbers to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: ArrayLike) -> np.ndarray:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = np.log(value) if self.log else np.asarray(value, float)
        return self.start + (value - low) / ((high - low) or 1.0) * (self.end - self.start)


def reach(chart: Chart) -> tuple[tuple[float, float], tuple[float, float], bool]:
    """(from, to) of x and of y, with some air, and whether y can be logarithmic."""
    xs = [np.asarray(line.x, float) for line in chart.lines]
    ys = [np.asarray(part, float) for line in chart.lines for part in (line.y, line.high) if part is not None]
    lows = [np.asarray(line.low, float) for line in chart.lines if line.low is not None]
    x, y, below = (np.concatenate([v[np.isfinite(v)] for v in group] or [np.zeros(0)]) for group in (xs, ys, lows))
    if not len(y):
        return (0.0, float(x.max(initial=1.0))), (0.0, 1.0), False
    log = chart.log and bool(y.min() > 0)
    y = np.r_[y, below[below > 0] if log else below]  # a band that goes below zero is cut there
    low, high = float(y.min()), float(y.max())
    air = (math.log(high / low) if log else high - low) * 0.05
    if not air > 1e-12 * max(1.0, abs(high)):
        air = 0.05 if log else (abs(high) * 0.1 or 1.0)
    span = (low * math.exp(-air), high * math.exp(air)) if log else (low - air, high + air)
    if not log and 0 <= low < 4 * air:  # what begins near zero begins at zero
        span = (0.0, high + air)
    return (min(0.0, float(x.min())), max(float(x.max()), 1e-9)), span, log


# --- SVG --------------------------------------------------------------------------------------------------------------


def _places(values: Sequence[float]) -> int:
    """As many digits as the ticks need."""
    return next(
        (f for f in range(2, 7) if len({short(v, f) for v in values}) == len(set(values)) and all(
            abs(float(f"{v:.{f}g}") - v) <= 1e-9 * max(1e-12, abs(v)) for v in values)), 6)  # fmt: skip


def _labelled(values: Sequence[float]) -> list[tuple[float, str]]:
    digits = _places(values)
    return [(value, short(value, digits)) for value in values]


def _path(line: Line, sx: Scale, sy: Scale, columns: int) -> str:
    """Broken where values are missing; a point between two gaps is a dot by its round ends."""
    y = np.asarray(line.y, float)
    kept = thinned(line.x, y, columns)
    gaps = np.cumsum(~np.isfinite(y))[kept]
    px, py = sx(np.asarray(line.x, float)[kept]), sy(y[kept])
    fresh = np.r_[True, np.diff(gaps) > 0][: len(kept)]
    parts = []
    for n, (a, b) in enumerate(zip(px, py, strict=True)):
        alone = fresh[n] and (n + 1 == len(kept) or fresh[n + 1])
        parts.append(f"{'M' if fresh[n] else 'L'}{a:.1f} {b:.1f}{'h0' if alone else ''}")
    return "".join(parts)


def _band(line: Line, sx: Scale, sy: Scale, columns: int) -> str:
    x, low, high = (np.asarray(part, float) for part in (line.x, line.low, line.high))
    whole = np.flatnonzero(np.isfinite(low) & np.isfinite(high))
    whole = whole[:: max(1, len(whole) // columns)]
    if sy.log:
        low = np.maximum(low, sy.low)
    there = [f"{a:.1f} {b:.1f}" for a, b in zip(sx(x[whole]), sy(high[whole]), strict=True)]
    back = [f"{a:.1f} {b:.1f}" for a, b in zip(sx(x[whole]), sy(low[whole]), strict=True)]
    return "M" + "L".join([*there, *reversed(back)]) + "Z" if there else ""


def _drawn(line: Line, sx: Scale, sy: Scale, columns: int, unit: str) -> Iterator[str]:
    name = safe(line.name)
    if line.low is not None and (band := _band(line, sx, sy, columns)):
        yield f'<path class="band {line.look}" d="{band}"/>'
    if path := _path(line, sx, sy, columns):
        yield f'<path class="line {line.look}" d="{path}"><title>{name}</title></path>'
    if line.dots:
        for x, y in zip(line.x, line.y, strict=True):
            if math.isfinite(y):
                told = f"{name}, step {x:.0f}: {short(y, 5)} {safe(unit)}".rstrip()
                at = f'cx="{sx(x):.1f}" cy="{sy(y):.1f}" r="2.6"'
                yield f'<circle class="{line.look}" {at}><title>{told}</title></circle>'


def _axes(chart: Chart, sx: Scale, sy: Scale) -> Iterator[str]:
    for value, text in _labelled(ticks(sy.low, sy.high, max(3, int((sy.start - sy.end) / TICK_Y)), sy.log)):
        y = float(sy(value))
        yield f'<line class="grid" x1="{sx.start:.0f}" x2="{sx.end:.0f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="tick" x="{sx.start - 6:.0f}" y="{y + 3.8:.1f}" text-anchor="end">{text}</text>'
    yield f'<line class="axis" x1="{sx.start:.0f}" x2="{sx.end:.0f}" y1="{sy.start:.0f}" y2="{sy.start:.0f}"/>'
    wanted = max(3, int((sx.end - sx.start) / TICK_X))
    for value, text in _labelled(ticks(sx.low, sx.high, wanted)):
        x = float(sx(value))
        yield f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{sy.start:.0f}" y2="{sy.start + 4:.0f}"/>'
        yield f'<text class="tick" x="{x:.1f}" y="{sy.start + 16:.1f}" text-anchor="middle">{text}</text>'
    yield f'<text class="tick" x="{sx.end:.0f}" y="{sy.start + 29:.1f}" text-anchor="end">step</text>'
    if chart.above is None:
        return
    known, steps = np.asarray(chart.above.y, float), np.asarray(chart.above.x, float)
    for value, text in _labelled(ticks(0.0, float(known[-1]), wanted)):
        x = float(sx(np.interp(value, np.r_[0.0, known], np.r_[0.0, steps])))
        yield f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{sy.end - 4:.0f}" y2="{sy.end:.0f}"/>'
        yield f'<text class="tick" x="{x:.1f}" y="{sy.end - 8:.1f}" text-anchor="middle">{text}</text>'
    yield f'<text class="tick" x="{sx.end:.0f}" y="{sy.end - 21:.1f}" text-anchor="end">{safe(chart.above.name)}</text>'


def draw(chart: Chart, width: int, height: int, look: str = "plot", head: int = 0) -> str:
    """One chart as an <svg> of its own coordinates; `head` leaves pixels free above it."""
    (x0, x1), (y0, y1), log = reach(chart)
    widest = max(len(text) for _, text in _labelled(ticks(y0, y1, max(3, int(height / TICK_Y)), log)) or [(0, "0")])
    sx = Scale(x0, x1, round(12 + CHAR * widest), width - 20)
    sy = Scale(y0, y1, height - 36, head + (36 if chart.above else 8), log)
    columns = max(20, int(sx.end - sx.start))
    parts = [*_axes(chart, sx, sy)]
    for x, text in chart.marks:
        at = f'x1="{sx(x):.1f}" x2="{sx(x):.1f}" y1="{sy.end:.0f}" y2="{sy.start:.0f}"'
        parts.append(f'<line class="mark" {at}><title>{safe(text)}</title></line>')
    budget = max(40, columns // max(1, len([line for line in chart.lines if not line.dots])) * 2)
    for line in chart.lines:
        parts += _drawn(line, sx, sy, min(columns, budget), chart.unit)
    parts.append(f'<line class="cursor" x1="0" x2="0" y1="{sy.end:.0f}" y2="{sy.start:.0f}"/>')
    return (
        f'<svg class="{look}" viewBox="0 0 {width} {height}" role="img" aria-label="{safe(chart.title)}" '
        f'data-x="{sx.start:.0f} {sx.end:.0f} {x0!r} {x1!r}">{"".join(parts)}</svg>'
    )
