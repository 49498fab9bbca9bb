"""Pictures for a page that has to stand alone: inline SVG that follows the page's colours, and PNG as data URIs.

Colours are CSS variables (--series-1 .. --series-3, --grid, --muted) of the page, so light, dark and print need no second set.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT = 420, 210
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 8, 26
# More points than this fall on the same pixels; runs of them are drawn as their mean.
MOST_POINTS = 400

Point = tuple[float, float | None]


def line_chart(title: str, series: Sequence[tuple[str, Sequence[Point]]], *, unit: str = "", zero: bool = False) -> str:
    """A figure of named lines over steps. A None breaks the line. `zero`: the axis starts at 0."""
    drawn = [(name, thin(points)) for name, points in series if any(y is not None for _, y in points)]
    if not drawn:
        return figure(title, f'<p class="missing">{escape(title)}: nothing was logged.</p>')
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points if y is not None]
    axes = Axes((min(xs), max(xs)), (0.0 if zero else min(ys), max(ys)))
    body, legend = [axes.svg()], []
    for number, (name, points) in enumerate(drawn, start=1):
        runs = _runs([(axes.x(x), None if y is None else axes.y(y)) for x, y in points])
        for run in runs:
            if len(run) == 1:
                body.append(f'<circle class="dot s{number}" cx="{run[0][0]:.1f}" cy="{run[0][1]:.1f}" r="2.5"/>')
            else:
                path = " ".join(f"{x:.1f},{y:.1f}" for x, y in run)
                body.append(f'<polyline class="line s{number}" points="{path}"/>')
        last = next(y for _, y in reversed(points) if y is not None)
        legend.append(f'<span><i class="key k{number}"></i>{escape(name)} <b>{short(last)}{escape(unit)}</b></span>')
    return figure(title, svg(title, "".join(body)), f'<p class="legend">{"".join(legend)}</p>')


def histogram(title: str, groups: Sequence[tuple[str, np.ndarray]]) -> str:
    """A figure of the groups' distributions, each as shares of itself."""
    groups = [(name, values[np.isfinite(values)]) for name, values in groups]
    everything = np.concatenate([values for _, values in groups])
    if not len(everything):
        return figure(title, '<p class="missing">Nothing to show.</p>')
    low, high = float(everything.min()), float(everything.max())
    # As fine as the smallest group bears.
    bins = int(np.clip(3 * min(len(values) for _, values in groups) ** 0.5, 10, 40))
    edges = np.linspace(low, high if high > low else low + 1e-6, bins + 1)
    shares = [np.histogram(values, edges)[0] / max(1, len(values)) for _, values in groups]
    axes = Axes((edges[0], edges[-1]), (0.0, float(max(share.max() for share in shares))), y_format=lambda v: f"{v:.0%}")
    body, legend = [axes.svg()], []
    for number, ((name, values), share) in enumerate(zip(groups, shares, strict=True), start=1):
        outline = [(axes.x(edges[0]), axes.y(0.0))]
        for i, height in enumerate(share):
            outline += [(axes.x(edges[i]), axes.y(height)), (axes.x(edges[i + 1]), axes.y(height))]
        outline.append((axes.x(edges[-1]), axes.y(0.0)))
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in outline)
        body.append(f'<polygon class="area s{number}" points="{points}"/>')
        legend.append(f'<span><i class="key k{number}"></i>{escape(name)} <b>mean {short(float(values.mean()))}</b></span>')
    return figure(title, svg(title, "".join(body)), f'<p class="legend">{"".join(legend)}</p>')


def heatmap(title: str, matrix_QN: np.ndarray, note: str) -> str:
    """A figure of a matrix, light for its lowest value and dark for its highest."""
    if not matrix_QN.size:
        return figure(title, '<p class="missing">Nothing to show.</p>')
    low, high = float(np.nanmin(matrix_QN)), float(np.nanmax(matrix_QN))
    share = np.nan_to_num((matrix_QN - low) / (high - low if high > low else 1.0))
    light, dark = np.array([239.0, 246, 255]), np.array([10.0, 45, 105])
    pixels = (light + share[..., None] * (dark - light)).round().astype(np.uint8)
    image = f'<img class="matrix" alt="{escape(title)}" src="{png_uri(pixels)}">'
    note = f"{note} From {short(low)} (light) to {short(high)} (dark)."
    return figure(title, image, f'<p class="legend"><span>{escape(note)}</span></p>')


def figure(title: str, *parts: str) -> str:
    """A titled box."""
    return f"<figure><figcaption>{escape(title)}</figcaption>{''.join(parts)}</figure>"


def svg(title: str, body: str) -> str:
    """An SVG of the charts' size, scaled to its box."""
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{body}</svg>'


def png_uri(pixels_HWC: np.ndarray) -> str:
    """A data URI of a PNG of uint8 RGB pixels."""
    height, width, _ = pixels_HWC.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels_HWC.reshape(height, -1)], axis=1)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(png).decode()


class Axes:
    """From values to places in the picture, with round ticks."""

    def __init__(self, x_range: tuple[float, float], y_range: tuple[float, float], y_format=None) -> None:  # type: ignore[no-untyped-def]
        self.x_ticks, self.y_ticks = ticks(*x_range, 5), ticks(*y_range, 4)
        self.x_low, self.x_high = x_range if x_range[1] > x_range[0] else (x_range[0] - 0.5, x_range[0] + 0.5)
        self.y_low, self.y_high = min(y_range[0], self.y_ticks[0]), max(y_range[1], self.y_ticks[-1])
        self.y_format = y_format or short

    def x(self, value: float) -> float:
        """Pixels from the left."""
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)

    def svg(self) -> str:
        """Grid lines and numbers."""
        parts = []
        for value in self.y_ticks:
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{self.y_format(value)}</text>')
        for value in self.x_ticks:
            if self.x_low <= value <= self.x_high:
                x = self.x(value)
                anchor = "end" if x > WIDTH - RIGHT - 16 else "middle"
                parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{short(value)}</text>')
        return "".join(parts)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` multiples of 1, 2 or 5 times a power of ten that enclose [low, high]."""
    if not high > low:
        low, high = low - (abs(low) * 0.5 or 0.5), high + (abs(high) * 0.5 or 0.5)
    rough = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(rough))
    spacing = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= rough * (1 - 1e-9))
    first, last = math.floor(low / spacing + 1e-9), math.ceil(high / spacing - 1e-9)
    return [i * spacing for i in range(first, last + 1)]


def thin(points: Sequence[Point]) -> list[Point]:
    """At most MOST_POINTS points: means of neighbours. A group with nothing finite stays a gap."""
    group = -(-len(points) // MOST_POINTS)
    if group <= 1:
        return list(points)
    thinned: list[Point] = []
    for start in range(0, len(points), group):
        part = points[start : start + group]
        known = [y for _, y in part if y is not None]
        thinned.append((part[-1][0], sum(known) / len(known) if known else None))
    return thinned


def short(value: float) -> str:
    """A number in few characters: 1.2M, 340, 0.071, 5e-05."""
    size = abs(value)
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.3g}{letter}"
    if size and size < 1e-3:
        return f"{value:.2g}"
    return f"{0.0 if size < 1e-12 else value:.4g}"


def _runs(points: Sequence[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            runs.append([])
        else:
            runs[-1].append((x, y))
    return [run for run in runs if run]
