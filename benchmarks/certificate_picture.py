"""The certificate as a picture: the roofline of four GPUs with every kernel under it, and the least time of each.

Many of the kernels have no matrix product, so their FLOPs a byte are zero and the usual roofline (TFLOP/s over FLOPs a byte)
has no place for them. Here the same two ceilings are drawn as the rate at which a kernel can move its bytes: flat at the
memory's bandwidth, falling as peak / intensity once products bind. Kernels without products stand on a strip at the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vatt.engine.profile.roofline import CEILINGS

Row = dict[str, Any]

GPUS = ("a100", "h100", "h200", "b200")
SHADES = {"a100": "#9aa5b1", "h100": "#5b8db8", "h200": "#1f4e79", "b200": "#111111"}
# Distinguishable without colour vision, and one marker each for print.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#6b6b6b", "#a6761d")
MARKERS = "osD^vPX<>"
LEFT = 1.0  # FLOPs a byte at which the axis of the roofline starts
TALL = 8.5  # inches; the roofline grows no further


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the picture (PNG) of the rows of a certificate."""
    from matplotlib.figure import Figure

    passes = _passes(rows)
    kernels = list(dict.fromkeys(found["kernel"] for found in passes))
    look = {name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(kernels)}
    height = max(TALL, 1.6 + 0.235 * len(passes))
    figure = Figure(figsize=(16, height), layout="constrained", facecolor="white")
    grid = figure.add_gridspec(2, 3, width_ratios=(1.5, 4.5, 6.5), height_ratios=(TALL, max(height - TALL, 0.01)))
    strip = figure.add_subplot(grid[0, 0])
    _strip(strip, passes, look)
    _roofline(figure.add_subplot(grid[0, 1], sharey=strip), passes, look)
    _times(figure.add_subplot(grid[:, 2]), passes, look)
    figure.savefig(path, dpi=110)


def _passes(rows: Sequence[Row]) -> list[Row]:
    """One row a kernel, shape and pass: bytes, FLOPs and times do not depend on launch, tuning or target."""
    found = {(row["kernel"], row["shape"], row["pass"]): row for row in rows}
    return list(found.values())


def _rate(gpu: str, intensity: float) -> float:
    """TB/s that the roofline allows at so many FLOPs a byte."""
    ceiling = CEILINGS[gpu]
    return min(ceiling.tb_s, ceiling.tflops / intensity) if intensity else ceiling.tb_s


def _intensities(passes: Sequence[Row], kernel: str) -> set[tuple[str, float]]:
    """(pass, FLOPs a byte) of a kernel's passes."""
    return {(found["pass"], found["flops"] / found["bytes"]) for found in passes if found["kernel"] == kernel}


def _mark(axes: Any, x: float, y: float, look: tuple[str, str], way: str) -> None:
    colour, marker = look
    axes.plot(x, y, marker, ms=7, mfc="white" if way == "backward" else colour, mec=colour, mew=1.4, zorder=3)


def _strip(axes: Any, passes: Sequence[Row], look: dict[str, tuple[str, str]]) -> None:
    """Kernels without products, side by side: they have the same place on the roofline."""
    names = [name for name in look if any(not intensity for _, intensity in _intensities(passes, name))]
    for gpu in GPUS:
        axes.axhline(CEILINGS[gpu].tb_s, color=SHADES[gpu], lw=1.8, zorder=1)
        for place, name in enumerate(names):
            for way, intensity in sorted(_intensities(passes, name)):
                if not intensity:
                    _mark(axes, place + (0.16 if way == "backward" else -0.16), CEILINGS[gpu].tb_s, look[name], way)
    axes.set_xlim(-0.6, max(len(names), 1) - 0.4)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8.5)
    axes.set_facecolor("#f6f6f6")
    axes.set_ylabel("the most bytes a kernel can move, TB/s")
    axes.set_title("no products", fontsize=11)


def _roofline(axes: Any, passes: Sequence[Row], look: dict[str, tuple[str, str]]) -> None:
    right = 1.6 * max([1000.0, *(found["flops"] / found["bytes"] for found in passes)])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(LEFT, right)
    for gpu in GPUS:
        ceiling = CEILINGS[gpu]
        axes.plot([LEFT, ceiling.knee, right], [ceiling.tb_s, ceiling.tb_s, ceiling.tflops / right], color=SHADES[gpu], lw=1.8)
        text = f"{ceiling.name}  {ceiling.tb_s:g} TB/s, {ceiling.tflops:g} TFLOP/s"
        axes.text(1.15, ceiling.tb_s * 1.03, text, fontsize=8.5, color=SHADES[gpu], va="bottom")
    for name in look:
        for way, intensity in sorted(_intensities(passes, name)):
            for gpu in GPUS if intensity else ():
                _mark(axes, max(intensity, LEFT), _rate(gpu, intensity), look[name], way)
    handles = [
        axes.plot([], [], marker, ms=7, mfc=colour, mec=colour, ls="", label=name)[0] for name, (colour, marker) in look.items()
    ]
    for way, face in (("forward", "#555555"), ("backward", "white")):
        handles += axes.plot([], [], "o", ms=7, mfc=face, mec="#555555", ls="", label=way)
    axes.legend(handles=handles, loc="lower left", fontsize=8.5)
    low = min(_rate(gpu, right) for gpu in GPUS)
    axes.set_ylim(low / 1.2, 14)
    ticks = [tick for tick in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if tick >= low / 1.2]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.tick_params(axis="y", labelleft=False)
    axes.grid(color="#e6e6e6", lw=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("FLOPs a byte (bf16 products, multiply-adds as 2)")
    axes.set_title("roofline, nominal", fontsize=11)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _times(axes: Any, passes: Sequence[Row], look: dict[str, tuple[str, str]]) -> None:
    labels = []
    for place, found in enumerate(passes):
        colour, _ = look[found["kernel"]]
        times = [found[f"{name}_us"] for name in GPUS]
        axes.plot([min(times), max(times)], [place, place], color="#dddddd", lw=1, zorder=1)
        for name, time in zip(GPUS, times, strict=True):
            axes.plot(
                time, place, "|" if name != "h200" else "o", ms=9 if name != "h200" else 6, mew=2, color=SHADES[name], zorder=3
            )
        axes.annotate(
            _short(found["h200_us"]), (max(times), place), (7, 0), textcoords="offset points", fontsize=7.5, va="center"
        )
        labels.append((f"{found['kernel']} {found['pass']}, {found['shape']}", colour))
    axes.set_xscale("log")
    axes.set_yticks(range(len(labels)), [text for text, _ in labels], fontsize=8)
    for tick, (_, colour) in zip(axes.get_yticklabels(), labels, strict=True):
        tick.set_color(colour)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * 2)
    axes.grid(axis="x", which="both", color="#eeeeee", lw=0.6, zorder=0)
    handles = [
        axes.plot(
            [],
            [],
            "|" if name != "h200" else "o",
            ms=9 if name != "h200" else 6,
            mew=2,
            ls="",
            color=SHADES[name],
            label=name.upper(),
        )[0]
        for name in GPUS
    ]
    axes.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.045 - 0.3 / len(labels)),
        ncols=4,
        fontsize=8.5,
        frameon=False,
    )
    axes.set_xlabel("least time, us (the figure at the right: H200)")
    axes.set_title("max(bytes / bandwidth, FLOPs / peak) at VATT's shapes", fontsize=11)
