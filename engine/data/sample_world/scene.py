"""What a clip shows: one coloured shape gliding over a dim, still, textured background.

The picture is a torus: what leaves at one edge enters at the opposite one. The start is uniform over the picture, all
motions have one speed and nothing is blurred, so a single frame has the same distribution whatever the motion is.

Shapes: T frames, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vatt.engine.data.sample_world.world import MOTIONS, Combination
from vatt.kernels.counter import Stream, uniform

SIZE = 64
"""Height and width of the picture, pixels."""
FPS = 10
FRAMES = 40
SPEED = 0.035
"""Picture widths per frame."""

RGB = {
    "red": (222, 38, 38),
    "orange": (246, 138, 22),
    "yellow": (240, 226, 52),
    "green": (44, 172, 58),
    "cyan": (58, 214, 222),
    "blue": (48, 84, 236),
    "pink": (242, 96, 200),
    "white": (236, 236, 236),
}


@dataclass(frozen=True)
class Scene:
    """Everything that fixes the pixels of a clip. Lengths are in picture widths."""

    combination: Combination
    x: float
    y: float
    radius: float
    tilt: float
    """Radians, clockwise."""
    rgb: tuple[float, float, float]
    texture: tuple[int, int, int]
    """What the background is drawn from: seed, split, index."""


def draw_scene(combination: Combination, seed: int, split: int, index: int) -> Scene:
    """The scene of clip `index` of a split: a function of these arguments alone."""
    u = uniform(seed, Stream.WORLD_SCENE, split, index, 8).tolist()
    brightness = 0.88 + 0.12 * u[4]
    # One shade of the named colour: a common brightness, and a little of each channel on its own.
    rgb = [min(255.0, value * brightness + 16.0 * (v - 0.5)) for value, v in zip(RGB[combination.colour], u[5:8], strict=True)]
    return Scene(
        combination=combination,
        x=u[0],
        y=u[1],
        radius=0.19 + 0.05 * u[2],
        tilt=0.3 * (u[3] - 0.5),
        rgb=(rgb[0], rgb[1], rgb[2]),
        texture=(seed, split, index),
    )


def _texture(seed: int, split: int, index: int) -> np.ndarray:
    """A dim picture, float32 (H, W, 3) in 0 .. 255: a tint, slow unevenness (6 x 6 noise, interpolated) and grain."""
    u = uniform(seed, Stream.WORLD_TEXTURE, split, index, 3 + 36 * 3 + SIZE * SIZE).astype(np.float32)
    tint, grid, grain = u[:3], u[3:111].reshape(6, 6, 3), u[111:].reshape(SIZE, SIZE, 1)
    at = np.linspace(0, 5, SIZE, dtype=np.float32)
    low = np.minimum(at.astype(int), 4)
    part = at - low
    rows = grid[low] * (1 - part)[:, None, None] + grid[low + 1] * part[:, None, None]
    slow = rows[:, low] * (1 - part)[None, :, None] + rows[:, low + 1] * part[None, :, None]
    return 20 + 30 * tint + 36 * slow + 14 * grain


def positions(scene: Scene) -> np.ndarray:
    """The centre of the shape in every frame: float64 (T, 2), x and y in [0, 1)."""
    direction = np.array(MOTIONS[scene.combination.motion], dtype=np.float64)
    step = SPEED * direction / np.hypot(*direction)
    return (np.array([scene.x, scene.y]) + np.arange(FRAMES)[:, None] * step) % 1.0


def render(scene: Scene) -> np.ndarray:
    """uint8 RGB frames (T, H, W, 3)."""
    centre = positions(scene).astype(np.float32)
    pixel = (np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE
    # Offset to the nearest copy on the torus; shapes are less than half a picture wide, so one copy is enough.
    dx = ((pixel[None, :] - centre[:, :1] + 0.5) % 1.0 - 0.5) / scene.radius
    dy = ((pixel[None, :] - centre[:, 1:] + 0.5) % 1.0 - 0.5) / scene.radius
    cos, sin = np.float32(np.cos(scene.tilt)), np.float32(np.sin(scene.tilt))
    x = dx[:, None, :] * cos + dy[:, :, None] * sin
    y = dy[:, :, None] * cos - dx[:, None, :] * sin
    distance = OUTLINES[scene.combination.shape](x, y) * np.float32(scene.radius * SIZE)
    cover = np.clip(0.5 - distance, 0.0, 1.0)[..., None]
    colour = np.array(scene.rgb, dtype=np.float32)
    background = _texture(*scene.texture)
    return (background + cover * (colour - background) + 0.5).astype(np.uint8)


# Outlines: signed distances (negative inside) in units of the radius, x to the right, y down. Where two edges meet they
# may be bounds of the distance rather than the distance, which only sharpens a corner.


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 0.9


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.78


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # Point up, lowered so that the middle of its height is the centre.
    y = y - 0.25
    return np.maximum(y, 0.8660254 * np.abs(x) - 0.5 * y) - 0.5


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # Fold the five points onto one half point between angle 0 (its tip) and 36 degrees (the notch beside it).
    radius, sector = np.hypot(x, y), 2 * np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + sector / 2) % sector - sector / 2)
    tip, notch = np.array([1.08, 0.0]), 0.45 * np.array([np.cos(sector / 2), np.sin(sector / 2)])
    edge = (notch - tip) / np.hypot(*(notch - tip))
    outward = np.array([edge[1], -edge[0]], dtype=np.float32)
    along = radius * np.cos(angle) - np.float32(tip[0])
    return along * outward[0] + radius * np.sin(angle) * outward[1]


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(x - 0.95, y - 0.3), np.maximum(x - 0.3, y - 0.95))


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(x, y) - 0.72) - 0.22


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # A square on its corner, with a disc on each of its two upper sides.
    x, y = np.abs(x), y - 0.12
    body = (x + np.abs(y)) * np.float32(0.70710678) - 0.55
    return np.minimum(body, np.hypot(x - 0.389, y + 0.389) - 0.55)


def _crescent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x = x + 0.15
    return np.maximum(np.hypot(x, y) - 1.0, 0.82 - np.hypot(x - 0.5, y))


OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "heart": _heart,
    "crescent": _crescent,
}
