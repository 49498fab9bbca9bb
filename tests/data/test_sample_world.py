"""The sample world: what its files hold, measured from the decoded files and not from the numbers that made them."""

import json
from collections import Counter
from itertools import combinations, islice
from pathlib import Path

import av
import numpy as np
import pytest

from vatt.engine.config import ConfigError
from vatt.engine.data.sample_world import captions as words_of_the_world
from vatt.engine.data.sample_world import combination, make_sample_world
from vatt.engine.data.sample_world.controls import make_control
from vatt.engine.data.sample_world.encode import write_clip
from vatt.engine.data.sample_world.scene import FRAMES, RGB, SIZE, draw_scene, positions, render
from vatt.engine.data.sample_world.sound import draw_sound
from vatt.engine.data.sample_world.world import COLOURS, MOTIONS, SHAPES, Combination, combination_order, plan

ATTRIBUTES = {"shape": set(SHAPES), "colour": set(COLOURS), "motion": set(MOTIONS)}


def read_rows(catalogue: Path) -> list[dict]:
    return [json.loads(line) for line in catalogue.read_text().splitlines()]


def decode_video(path: Path, count: int | None = None) -> np.ndarray:
    """uint8 (T, H, W, 3): all frames, or the first `count`."""
    with av.open(str(path)) as media:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in islice(media.decode(video=0), count)])


def decode_audio(path: Path) -> np.ndarray:
    """float32 (S,) at 48 kHz, channels averaged."""
    with av.open(str(path)) as media:
        resampler = av.AudioResampler(format="fltp", rate=48000)
        pieces = [piece.to_ndarray() for frame in media.decode(audio=0) for piece in resampler.resample(frame)]
    return np.concatenate(pieces, axis=1).mean(axis=0)


def foreground(frames: np.ndarray) -> np.ndarray:
    """bool (T, H, W): the shape is brighter or more colourful than anything behind it."""
    return frames.max(axis=-1) > 125


def centre_on_torus(masks: np.ndarray) -> np.ndarray:
    """(T, 2): x and y of each mask's circular mean, in picture widths; independent of where the edges cut it."""
    turns = np.exp(2j * np.pi * (np.arange(masks.shape[1]) + 0.5) / masks.shape[1])
    x = np.angle((masks.sum(axis=1) * turns).sum(axis=1))
    y = np.angle((masks.sum(axis=2) * turns).sum(axis=1))
    return np.stack([x, y], axis=1) / (2 * np.pi) % 1.0


def hear(audio: np.ndarray, rate: int = 48000) -> tuple[float, float, float]:
    """Loudest pitch below 1.1 kHz, loudest above 1.35 kHz, and how often a second the latter is struck."""
    spectrum = np.fft.rfft(audio * np.hanning(len(audio)), n=4 * rate)
    hertz = np.fft.rfftfreq(4 * rate, 1 / rate)
    low, high = (hertz > 100) & (hertz < 1100), (hertz > 1350) & (hertz < 3400)
    voice = hertz[low][np.abs(spectrum[low]).argmax()]
    chime = hertz[high][np.abs(spectrum[high]).argmax()]
    time = np.arange(len(audio)) / rate
    envelope = np.abs(np.convolve(audio * np.exp(-2j * np.pi * chime * time), np.hanning(rate // 100), "same"))
    rhythm = np.abs(np.fft.rfft((envelope - envelope.mean()) * np.hanning(len(audio)), n=8 * rate))
    beats = np.fft.rfftfreq(8 * rate, 1 / rate)
    audible = (beats > 3) & (beats < 13)
    return float(voice), float(chime), float(beats[audible][rhythm[audible].argmax()])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 training clips and 8 test clips: every pair of values occurs in training."""
    out = tmp_path_factory.mktemp("sample") / "world"
    make_sample_world(out, 64, 8, seed=3, workers=1, progress=None)
    return out


@pytest.mark.parametrize(("container", "video", "audio"), [("mp4", "h264", "aac"), ("webm", "vp9", "opus")])
def test_files_hold_what_the_container_promises(tmp_path: Path, container: str, video: str, audio: str) -> None:
    make_sample_world(tmp_path, 2, 2, container=container, workers=1, progress=None)
    for split in ("train", "test"):
        rows = read_rows(tmp_path / f"{split}.jsonl")
        assert len(rows) == 2 and len({row["id"] for row in rows}) == 2
        for row in rows:
            assert row["video"].endswith(f".{container}") and not Path(row["video"]).is_absolute()
            with av.open(str(tmp_path / row["video"])) as media:
                assert media.streams.video[0].codec_context.name.removeprefix("lib") in (video, f"vpx-{video}")
                assert media.streams.audio[0].codec_context.name.removeprefix("lib") == audio
                assert media.streams.audio[0].rate == 48000
                times = [float(frame.pts * frame.time_base) for frame in media.decode(video=0)]
            np.testing.assert_allclose(times, np.arange(FRAMES) / 10, atol=1e-6)
            assert decode_video(tmp_path / row["video"]).shape == (40, SIZE, SIZE, 3)
            sound = decode_audio(tmp_path / row["video"])
            assert 4.0 * 48000 <= len(sound) <= 4.05 * 48000
            assert np.sqrt(np.mean(sound**2)) > 0.02 and np.abs(sound).max() <= 1.0


def test_decoded_clips_are_the_rendered_ones(tmp_path: Path) -> None:
    """Right frames in the right order, and sound in step with the picture: neither codec adds a delay."""
    what = Combination("star", "red", "left")
    frames, audio = render(draw_scene(what, 5, 0, 9)), draw_sound(what, 5, 0, 9)
    for container in ("mp4", "webm"):
        path = tmp_path / f"clip.{container}"
        write_clip(path, container, frames, 10, audio, 48000)
        assert np.abs(decode_video(path).astype(int) - frames).mean() < 6
        heard, meant = decode_audio(path)[: audio.shape[1]], audio.mean(axis=0)
        lag = np.fft.irfft(np.fft.rfft(meant) * np.conj(np.fft.rfft(heard))).argmax()
        assert min(lag, audio.shape[1] - lag) <= 48, "more than a millisecond"
        assert np.corrcoef(heard, meant)[0, 1] > 0.97
    assert not list(tmp_path.glob(".*partial"))


def test_motion_seen_is_the_motion_labelled(world: Path) -> None:
    speeds = []
    for row in read_rows(world / "train.jsonl")[:24]:
        centres = centre_on_torus(foreground(decode_video(world / row["video"])))
        steps = (np.diff(centres, axis=0) + 0.5) % 1.0 - 0.5
        mean = steps.mean(axis=0)
        speeds.append(np.hypot(*mean))
        meant = np.array(MOTIONS[combination(row["labels"]).motion])
        assert mean @ meant / (np.hypot(*mean) * np.hypot(*meant)) > 0.99, row["labels"]
    assert max(speeds) / min(speeds) < 1.03, "one speed for all motions"


def test_colour_and_shape_seen_are_those_labelled(world: Path) -> None:
    """Colour: nearest of the named hues. Shape: nearest, after centring and scaling, of the seven other clips' masks."""
    names, table = list(RGB), np.array(list(RGB.values()), dtype=float)
    masks, shapes = [], []
    for row in read_rows(world / "train.jsonl"):
        frames = decode_video(world / row["video"], 1)
        mask = foreground(frames)
        what = combination(row["labels"])
        seen = np.median(frames[mask], axis=0)
        assert names[np.square(table - seen).sum(axis=1).argmin()] == what.colour, (row["labels"], seen)
        x, y = np.round(centre_on_torus(mask[:1])[0] * SIZE).astype(int)
        masks.append(np.roll(mask[0], (48 - y, 48 - x), axis=(0, 1)).astype(float).ravel())
        shapes.append(what.shape)
    similarity = np.corrcoef(np.array(masks)) - 2 * np.eye(len(masks))
    right = [shapes[i] == shapes[j] for i, j in enumerate(similarity.argmax(axis=1))]
    assert np.mean(right) >= 0.9


def test_position_is_uniform_for_every_motion() -> None:
    """Chi-squared over a 4 x 4 grid of positions, at the first and at a late frame, for each motion (15 degrees of freedom)."""
    for motion in MOTIONS:
        scenes = [draw_scene(Combination("star", "red", motion), 0, 0, i) for i in range(400)]
        for frame in (0, 29):
            cells = Counter(tuple((positions(scene)[frame] * 4).astype(int)) for scene in scenes)
            counts = np.array([cells[x, y] for x in range(4) for y in range(4)])
            assert np.square(counts - 25).sum() / 25 < 44, (motion, frame, "beyond the 0.01 % point")


def test_one_decoded_frame_does_not_tell_the_motion(tmp_path: Path) -> None:
    """Nearest neighbours over single decoded frames, centred on the shape: a codec's trail must not give the motion away.

    The shape is the same throughout, so that only what depends on the motion is left to find.
    """
    crops, motions = [], []
    for index in range(128):
        what = Combination("circle", "white", tuple(MOTIONS)[index % 8])
        path = tmp_path / "clip.mp4"
        write_clip(path, "mp4", render(draw_scene(what, 1, 0, index))[:8], 10, None, 48000)
        frame = decode_video(path)[7:8]
        x, y = np.round(centre_on_torus(foreground(frame))[0] * SIZE).astype(int)
        crops.append(np.roll(frame[0], (48 - y, 48 - x), axis=(0, 1)).astype(float).ravel())
        motions.append(index % 8)
    similarity = np.corrcoef(np.array(crops)) - 2 * np.eye(len(crops))
    right = sum(motions[i] == motions[j] for i, j in enumerate(similarity.argmax(axis=1)))
    assert right <= 31, "128 draws at 1 in 8 give 16 +- 3.7; this is four sigma"


def test_sound_tells_shape_and_motion_and_not_colour(world: Path) -> None:
    """One second from the middle of each decoded clip is enough."""
    voices: dict[str, list[float]] = {}
    chimes: dict[str, list[float]] = {}
    rhythms: dict[str, list[float]] = {}
    for row in read_rows(world / "train.jsonl") + read_rows(world / "test.jsonl"):
        what = combination(row["labels"])
        voice, chime, rhythm = hear(decode_audio(world / row["video"])[72000:120000])
        voices.setdefault(what.shape, []).append(voice)
        chimes.setdefault(what.motion, []).append(chime)
        rhythms.setdefault(what.motion, []).append(rhythm)
    for heard in (voices, chimes, rhythms):
        assert len(heard) == 8
        ranges = sorted((min(values), max(values)) for values in heard.values())
        for (_, highest), (lowest, _) in zip(ranges, ranges[1:], strict=False):
            assert lowest > highest, "two values sound alike"


def test_sound_does_not_depend_on_the_colour() -> None:
    red, blue = (draw_sound(Combination("heart", colour, "up"), 7, 0, 4) for colour in ("red", "blue"))
    np.testing.assert_array_equal(red, blue)


def test_clips_of_one_combination_differ() -> None:
    what = Combination("heart", "blue", "up")
    first, second = (draw_scene(what, 0, 0, i) for i in (0, 1))
    other_split = draw_scene(what, 0, 1, 0)
    assert np.abs(render(first).astype(int) - render(second)).mean() > 5
    assert np.abs(render(first).astype(int) - render(other_split)).mean() > 5
    assert not np.array_equal(draw_sound(what, 0, 0, 0)[0], draw_sound(what, 0, 0, 1)[0])


def test_stereo_is_there_and_mixes_down_without_loss() -> None:
    what = Combination("ring", "red", "down")
    sounds = [draw_sound(what, 0, 0, i) for i in range(40)]
    assert 3 <= sum(len(sound) == 2 for sound in sounds) <= 20
    for sound in sounds:
        assert np.abs(sound).max() <= 1.0
        assert np.abs(sound.mean(axis=0)).max() > 0.2


@pytest.mark.parametrize(("train", "test"), [(312, 200), (1000, 200), (64, 8), (448, 64), (40, 13), (500, 1000)])
def test_held_out_combinations(train: int, test: int) -> None:
    splits = plan(11, train, test)
    assert not set(splits["train"]) & set(splits["test"])
    for name, count in (("train", train), ("test", test)):
        assert len(splits[name]) == count
        for attribute, values in ATTRIBUTES.items():
            assert {getattr(what, attribute) for what in splits[name]} == values
    uses = Counter(splits["test"]).values()
    assert len(uses) == min(test, 200) and max(uses) - min(uses) <= 1
    uses = Counter(splits["train"]).values()
    assert max(uses) - min(uses) <= 1 and len(uses) == min(train, 512 - min(test, 200))


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 5])
def test_order_is_balanced(seed: int) -> None:
    order = combination_order(seed)
    assert len(set(order)) == 512
    for start in range(0, 512, 8):
        for attribute, values in ATTRIBUTES.items():
            assert {getattr(what, attribute) for what in order[start : start + 8]} == values
    for start in range(0, 512, 64):
        for a, b in combinations(ATTRIBUTES, 2):
            assert len({(getattr(what, a), getattr(what, b)) for what in order[start : start + 64]}) == 64
    seen = order[200:]
    for a, b in combinations(ATTRIBUTES, 2):
        pairs = Counter((getattr(what, a), getattr(what, b)) for what in seen)
        assert len(pairs) == 64 and set(pairs.values()) <= {4, 5}
    assert order != combination_order(seed + 1)


def read_caption(text: str) -> Combination:
    """A reader of its own: which words occur, whatever their order."""
    found = set(text.replace(",", " ").replace(":", " ").split())
    synonyms = {"disc": "circle", "box": "square", "plus": "cross", "hoop": "ring", "moon": "crescent"}
    synonyms |= {"scarlet": "red", "golden": "yellow", "turquoise": "cyan", "magenta": "pink"}
    for attribute in ("left", "right", "up", "down"):
        synonyms[attribute + "wards"] = attribute
    synonyms |= {"top": "up", "bottom": "down"}
    found = {synonyms.get(word, word) for word in found}
    (shape,) = found & set(SHAPES)
    (colour,) = found & set(COLOURS)
    way = sorted(found & {"up", "down"}) + sorted(found & {"left", "right"})
    return Combination(shape, colour, "-".join(way))


def test_captions_name_everything_and_span_the_clip(world: Path) -> None:
    vocabulary = set()
    for row in read_rows(world / "train.jsonl") + read_rows(world / "test.jsonl"):
        captions = row["captions"]
        assert len(captions) in (5, 6) and len({c["text"] for c in captions}) == len(captions)
        assert captions[0]["start"] == row["start"] == 0 and captions[-1]["end"] == row["end"] == 4
        for before, after in zip(captions, captions[1:], strict=False):
            assert before["start"] < before["end"] == after["start"]
        for caption in captions:
            assert read_caption(caption["text"]) == combination(row["labels"]), caption["text"]
            vocabulary |= set(caption["text"].replace(",", "").replace(":", "").split())
    assert 40 < len(vocabulary) < 150
    assert len(words_of_the_world.TEMPLATES) >= 8


def test_every_word_of_every_value_is_understood() -> None:
    for shape in SHAPES:
        for colour in COLOURS:
            for motion in MOTIONS:
                what = Combination(shape, colour, motion)
                for index in range(3):
                    for caption in words_of_the_world.draw_captions(what, 0, 0, index):
                        assert read_caption(str(caption["text"])) == what
                        assert " a o" not in f" {caption['text']}"


def test_combination_of_labels() -> None:
    assert combination(["motion:up", "x", "colour:red", "shape:star"]) == Combination("star", "red", "up")
    with pytest.raises(ValueError, match=r"name no colour"):
        combination(["motion:up", "shape:star"])


def test_control_still(world: Path, tmp_path: Path) -> None:
    make_control(world / "test.jsonl", "still", tmp_path / "still.jsonl")
    for before, after in zip(read_rows(world / "test.jsonl"), read_rows(tmp_path / "still.jsonl"), strict=True):
        assert {k: v for k, v in before.items() if k != "video"} == {k: v for k, v in after.items() if k != "video"}
        moving, still = decode_video(world / before["video"]), decode_video(tmp_path / after["video"])
        assert len(still) == len(moving)
        centres = centre_on_torus(foreground(still))
        assert np.abs((centres - centres[0] + 0.5) % 1.0 - 0.5).max() < 0.005
        assert np.abs(still.astype(int) - moving[20]).mean() < 5
        np.testing.assert_allclose(
            hear(decode_audio(tmp_path / after["video"])[:48000]), hear(decode_audio(world / before["video"])[:48000]), atol=0.6
        )


@pytest.mark.parametrize("kind", ["shuffled_audio", "permuted_captions"])
def test_control_permutations(world: Path, tmp_path: Path, kind: str) -> None:
    make_control(world / "train.jsonl", kind, tmp_path / "deep" / "control.jsonl")
    rows, changed = read_rows(world / "train.jsonl"), read_rows(tmp_path / "deep" / "control.jsonl")
    files = [(world / row["video"]).resolve() for row in rows]
    assert [(tmp_path / "deep" / row["video"]).resolve() for row in changed] == files
    assert [row["labels"] for row in changed] == [row["labels"] for row in rows]
    if kind == "shuffled_audio":
        given = [(tmp_path / "deep" / row["audio"]).resolve() for row in changed]
        assert [row["captions"] for row in changed] == [row["captions"] for row in rows]
        originals = files
    else:
        given, originals = [json.dumps(row["captions"]) for row in changed], [json.dumps(row["captions"]) for row in rows]
        assert not any("audio" in row for row in changed)
    assert sorted(given) == sorted(originals), "each is used once"
    assert not any(a == b for a, b in zip(given, originals, strict=True)), "no clip keeps its own"


def test_control_errors(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kind: 'mute' is unknown; choose one of still, shuffled_audio, permuted_captions"):
        make_control(world / "test.jsonl", "mute", tmp_path / "x.jsonl")
    with pytest.raises(ConfigError, match=r"is the catalogue itself"):
        make_control(world / "test.jsonl", "still", world / "test.jsonl")
    (tmp_path / "one.jsonl").write_text((world / "test.jsonl").read_text().splitlines()[0] + "\n")
    with pytest.raises(ConfigError, match=r"one.jsonl: 1 clips cannot be permuted"):
        make_control(tmp_path / "one.jsonl", "shuffled_audio", tmp_path / "x.jsonl")
