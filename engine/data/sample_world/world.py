"""What exists in the sample world: 8 shapes x 8 colours x 8 motions, and which combinations training never sees.

The 512 combinations are laid out so that any run of eight consecutive ones (starting at a multiple of eight) holds every
shape, every colour and every motion once, and any run of 64 (starting at a multiple of 64) holds every pair of values
once. The test split takes its combinations from the front of that order and training cycles over the rest, so both are
balanced at every size, and while at most 448 combinations are held out each pair of values still occurs in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vatt.kernels.counter import Stream, words

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "crescent")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "pink", "white")
# Direction of travel in the picture: (x to the right, y down), normalised by whoever moves something.
MOTIONS = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up-left": (-1, -1),
    "up-right": (1, -1),
    "down-left": (-1, 1),
    "down-right": (1, 1),
}
HELD_OUT = 200
"""Most combinations a test split takes from training; a larger test split repeats them evenly."""


@dataclass(frozen=True)
class Combination:
    """What a clip is about. The names are those of SHAPES, COLOURS and MOTIONS."""

    shape: str
    colour: str
    motion: str

    @property
    def labels(self) -> list[str]:
        """The `labels` of the clip's catalogue row."""
        return [f"shape:{self.shape}", f"colour:{self.colour}", f"motion:{self.motion}"]


def combination(labels: Sequence[str]) -> Combination:
    """The combination a catalogue row's labels name, in any order and among others.

    Two clips of the same combination cannot be told apart by their captions: the best a perfect reader can do in
    text -> video retrieval follows from this alone. Raises ValueError naming the attribute that is absent.
    """
    found = dict(label.split(":", 1) for label in labels if ":" in label)
    for attribute in ("shape", "colour", "motion"):
        if attribute not in found:
            raise ValueError(f"labels {list(labels)} name no {attribute}: not a row of a sample world")
    return Combination(found["shape"], found["colour"], found["motion"])


def _times_x(value: int) -> int:
    """`value` times x in the field of eight elements, GF(2)[x] / (x^3 + x + 1)."""
    return (value << 1) ^ (0b1011 if value & 0b100 else 0)


def _shuffled(seed: int, draw: int, count: int) -> list[int]:
    """0 .. count-1 in the order of as many random words; a tie (one in 2^32) keeps the lower first."""
    return np.argsort(words(seed, Stream.WORLD_COMBINATION, draw, 0, count), kind="stable").tolist()


def combination_order(seed: int) -> list[Combination]:
    """All 512 combinations, balanced in every block of 8 and of 64 as the module says.

    In the field of eight elements, for each layer j and row b, the eight combinations (s, x s + b, s + x s + b + j) run
    through every shape, colour and motion once, because s -> x s and s -> (1 + x) s are one-to-one; over the rows of one
    layer each pair of two of the three occurs once. The seed decides which value is which element, and the order.
    """
    shapes, colours, motions = (_shuffled(seed, draw, 8) for draw in range(3))
    motion_names = tuple(MOTIONS)
    order = []
    for layer in _shuffled(seed, 3, 8):
        for row in _shuffled(seed, 4 + layer, 8):
            for s in _shuffled(seed, 12 + 8 * layer + row, 8):
                c = _times_x(s) ^ row
                m = s ^ c ^ layer
                order.append(Combination(SHAPES[shapes[s]], COLOURS[colours[c]], motion_names[motions[m]]))
    return order


def plan(seed: int, train: int, test: int) -> dict[str, list[Combination]]:
    """The combination of every clip of both splits.

    `test` clips cycle over the first min(test, HELD_OUT) combinations of the order, `train` clips over all the others.
    """
    order = combination_order(seed)
    held_out = min(test, HELD_OUT)
    seen = order[held_out:]
    return {
        "train": [seen[i % len(seen)] for i in range(train)],
        "test": [order[i % held_out] for i in range(test)],
    }
