"""What is said about a clip: several sentences, each naming shape, colour and motion, all of them true."""

from __future__ import annotations

from vatt.engine.data.sample_world.scene import FPS, FRAMES
from vatt.engine.data.sample_world.world import COLOURS, SHAPES, Combination
from vatt.kernels.counter import Stream, uniform

# No word of one value is a word of another value of the same attribute, or of a sentence's frame.
SHAPE_WORDS: dict[str, tuple[str, ...]] = {shape: (shape,) for shape in SHAPES} | {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "cross": ("cross", "plus"),
    "ring": ("ring", "hoop"),
    "crescent": ("crescent", "moon"),
}
COLOUR_WORDS: dict[str, tuple[str, ...]] = {colour: (colour,) for colour in COLOURS} | {
    "red": ("red", "scarlet"),
    "yellow": ("yellow", "golden"),
    "cyan": ("cyan", "turquoise"),
    "pink": ("pink", "magenta"),
}
# A straight motion uses the words of one direction, a diagonal one those of two: nothing else tells them apart.
MOTION_WORDS: dict[str, tuple[str, ...]] = {
    "left": ("to the left", "leftwards", "towards the left"),
    "right": ("to the right", "rightwards", "towards the right"),
    "up": ("up", "upwards", "towards the top"),
    "down": ("down", "downwards", "towards the bottom"),
    "up-left": ("up and to the left", "upwards and leftwards", "towards the top left"),
    "up-right": ("up and to the right", "upwards and rightwards", "towards the top right"),
    "down-left": ("down and to the left", "downwards and leftwards", "towards the bottom left"),
    "down-right": ("down and to the right", "downwards and rightwards", "towards the bottom right"),
}
VERBS = (
    ("moves", "moving"),
    ("drifts", "drifting"),
    ("slides", "sliding"),
    ("glides", "gliding"),
    ("floats", "floating"),
    ("travels", "travelling"),
)
TEMPLATES = (
    "a {colour} {shape} {verbs} {motion}",
    "the {colour} {shape} {verbs} {motion}",
    "the {shape} is {colour} and {verbs} {motion}",
    "a {shape} in {colour} is {verbing} {motion}",
    "we see a {colour} {shape} {verbing} {motion}",
    "{verbing} {motion} is a {colour} {shape}",
    "look at this {colour} {shape}, it {verbs} {motion}",
    "now the {shape}, which is {colour}, {verbs} {motion}",
    "here something {colour} {verbs} {motion}: a {shape}",
    "{motion} {verbs} a {colour} {shape}",
)


def draw_captions(combination: Combination, seed: int, split: int, index: int) -> list[dict[str, float | str]]:
    """Five or six captions as catalogue records, back to back over the clip, in different phrasings.

    A function of the arguments alone; start and end are seconds, rounded to milliseconds.
    """
    u = uniform(seed, Stream.WORLD_WORDS, split, index, 1 + len(TEMPLATES) + 6 * 4).tolist()
    count = 5 + int(2 * u[0])
    phrasing = sorted(range(len(TEMPLATES)), key=lambda i: u[1 + i])[:count]
    duration = FRAMES / FPS
    captions: list[dict[str, float | str]] = []
    for i, template in enumerate(phrasing):
        draws = u[1 + len(TEMPLATES) + 4 * i :]
        verbs, verbing = VERBS[int(len(VERBS) * draws[0])]
        chosen = [
            options[int(len(options) * draw)]
            for options, draw in zip(
                (SHAPE_WORDS[combination.shape], COLOUR_WORDS[combination.colour], MOTION_WORDS[combination.motion]),
                draws[1:4],
                strict=True,
            )
        ]
        text = TEMPLATES[template].format(shape=chosen[0], colour=chosen[1], motion=chosen[2], verbs=verbs, verbing=verbing)
        start, end = round(i * duration / count, 3), round((i + 1) * duration / count, 3)
        captions.append({"start": start, "end": end, "text": text.replace("a orange", "an orange")})
    return captions
