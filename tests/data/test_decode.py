"""Decoding by timestamp: the right frame, the right instant of sound, and an error for everything else."""

import av
import numpy as np
import pytest

from vatt.engine.data.catalogue import Clip
from vatt.engine.data.decode import DecodeError, WindowShape, decode_window, open_clip, probe

CONSTANT = [i / 10 for i in range(40)]
FAST = [i / 30 for i in range(120)]
VARIABLE = [0, 0.1, 0.15, 0.5, 0.52, 0.9, 1.3, 1.31, 1.7, 2.2, 2.21, 2.9, 3.0, 3.1, 3.6, 3.8]
SHAPE = {"frames": 8, "fps": 4.0, "audio_rate": 16000, "audio_samples": 32000, "short_side": 1000}
STARTS = (0.0, 0.33, 0.7, 1.25)


def clip(video, audio=None, start=None, end=None):
    return Clip("x", str(video), audio and str(audio), start, end, (), (), "", 1)


def shown(times, wanted):
    """Numbers of the frames a player shows: the last that has come; before the first, the first."""
    return [max((i for i, time in enumerate(times) if time <= t + 1e-3), default=0) for t in wanted]


def numbers(studio, frames):
    return [studio.number_of(frame) for frame in frames]


def offset_seconds(studio, audio, rate, start):
    """How much later than it should the sound comes, by the best correlation over +-40 ms."""
    margin, length = round(0.04 * rate), 1 << (2 * len(audio) - 1).bit_length()
    expected = studio.chirp(start + np.arange(len(audio)) / rate)[margin:-margin]
    spectrum = np.fft.rfft(audio, length) * np.fft.rfft(expected, length).conj()
    scores = np.fft.irfft(spectrum, length)[: 2 * margin + 1]
    assert scores.max() > 0.8 * np.dot(expected, expected)
    return (int(np.argmax(scores)) - margin) / rate


@pytest.mark.parametrize(
    ("name", "times", "options"),
    [
        ("constant.mp4", CONSTANT, {}),
        ("b-frames.mp4", FAST, {"b_frames": 3}),
        ("variable.mp4", VARIABLE, {"b_frames": 2}),
        ("one-key-frame.mp4", FAST, {"key_every": 1000, "b_frames": 2}),
        ("constant.webm", FAST, {}),
        ("variable.webm", VARIABLE, {}),
        ("variable.mkv", VARIABLE, {"b_frames": 2}),
        ("late.mkv", [t + 0.6 for t in CONSTANT], {}),
        ("odd-size-10-bit.mp4", CONSTANT, {"size": (50, 66), "pixels": "yuv420p10le"}),
        ("monochrome.mp4", CONSTANT, {"pixels": "gray"}),
    ],
)
def test_frames_and_sound_by_timestamp(studio, tmp_path, name, times, options):
    path = studio.write_media(tmp_path / name, times, seconds=4.0, **options)
    for start in STARTS:
        window = decode_window(clip(path), start, **SHAPE)
        assert numbers(studio, window.frames) == shown(times, start + np.arange(8) / 4)
        assert abs(offset_seconds(studio, window.audio, 16000, start)) <= 1e-3  # the house's limit is 20 ms
        assert window.audio.dtype == np.float32 and len(window.audio) == 32000
        assert (window.has_audio, window.looped, window.short_audio) == (True, False, False)


def test_a_timeline_that_does_not_begin_at_zero(studio, tmp_path):
    """A transport stream begins at 1.4 s or so by its own clock; seconds count from there."""
    path = studio.write_media(tmp_path / "a.mp4", CONSTANT)
    late = {"output_ts_offset": "1.5"}
    with av.open(str(path)) as source, av.open(str(tmp_path / "a.ts"), "w", options=late) as target:
        streams = {s.index: target.add_stream_from_template(s) for s in source.streams}
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                target.mux(packet)
    with av.open(str(tmp_path / "a.ts")) as container:
        assert container.start_time > 1_000_000
    window = decode_window(clip(tmp_path / "a.ts"), 1.25, **SHAPE)
    # The sound's run-up (23 ms) is the first thing in the file, and moves all of it.
    assert abs(offset_seconds(studio, window.audio, 16000, 1.25)) <= 0.024
    assert numbers(studio, window.frames) == shown([t + 1024 / 48000 for t in CONSTANT], 1.25 + np.arange(8) / 4)


@pytest.mark.parametrize("turn", [90, 180, -90])
def test_rotation_is_applied(studio, tmp_path, turn):
    path = studio.write_media(tmp_path / "a.mp4", CONSTANT, rotation=turn)
    frames = decode_window(clip(path), 1.0, **SHAPE).frames
    assert frames.shape[1:3] == ((48, 64) if turn == 180 else (64, 48))
    upright = np.rot90(frames, -turn // 90, axes=(1, 2))  # the file asks for `turn` degrees counter-clockwise
    assert numbers(studio, upright) == shown(CONSTANT, 1.0 + np.arange(8) / 4)


def test_short_side_is_bounded_and_never_enlarged(studio, tmp_path):
    path = studio.write_media(tmp_path / "a.mp4", CONSTANT, size=(48, 96))
    assert decode_window(clip(path), 0.0, **{**SHAPE, "short_side": 24}).frames.shape == (8, 24, 48, 3)
    assert decode_window(clip(path), 0.0, **SHAPE).frames.shape == (8, 48, 96, 3)
    frames = decode_window(clip(path), 0.0, **SHAPE).frames
    assert frames.min() <= 2 and frames.max() >= 253  # limited-range video becomes full-range RGB


@pytest.mark.parametrize("name", ["s.wav", "s.flac", "s.m4a", "s.mp3"])
@pytest.mark.parametrize("rate", [48000, 44100])
def test_a_separate_sound_file(studio, tmp_path, name, rate):
    video = studio.write_media(tmp_path / "a.mp4", CONSTANT, sound=None)
    sound = studio.write_sound(tmp_path / name, rate=rate)
    window = decode_window(clip(video, sound), 0.7, **SHAPE)
    assert window.has_audio and abs(offset_seconds(studio, window.audio, 16000, 0.7)) <= 1e-3
    # LAME turns everything down by 5 %.
    assert np.sqrt(np.mean(window.audio**2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.06)


def test_sound_at_its_own_rate_is_untouched(studio, tmp_path):
    video = studio.write_media(tmp_path / "a.mp4", CONSTANT, sound=None)
    sound = studio.write_sound(tmp_path / "s.wav")
    window = decode_window(clip(video, sound), 1.0, **{**SHAPE, "audio_rate": 48000, "audio_samples": 48000})
    assert np.abs(window.audio - studio.chirp(1.0 + np.arange(48000) / 48000)).max() < 1e-4


def test_no_sound_is_silence(studio, tmp_path):
    window = decode_window(clip(studio.write_media(tmp_path / "a.mp4", CONSTANT, sound=None)), 0.5, **SHAPE)
    assert not window.has_audio and not window.short_audio and window.audio.shape == (32000,) and not window.audio.any()


def test_sound_shorter_than_the_video(studio, tmp_path):
    path = studio.write_media(tmp_path / "a.mkv", CONSTANT, seconds=1.5)
    window = decode_window(clip(path), 0.5, **SHAPE)
    assert window.has_audio and window.short_audio
    assert np.abs(window.audio[:16000]).max() > 0.4 and not window.audio[16020:].any()
    beyond = decode_window(clip(path), 2.0, **SHAPE)
    assert not beyond.has_audio and not beyond.audio.any()


def test_sound_that_begins_late(studio, tmp_path):
    path = studio.write_media(tmp_path / "a.mkv", CONSTANT, seconds=2.0, sound_from=1.0)
    window = decode_window(clip(path), 0.0, **SHAPE)
    assert window.short_audio and not window.audio[:15980].any()
    assert np.abs(window.audio[16000:] - studio.chirp(1 + np.arange(16000) / 16000)).mean() < 0.01


def test_a_short_clip_loops_in_step(studio, tmp_path):
    """1.2 s of a longer file under a window of 2 s: picture and sound begin again at the same instant."""
    path = studio.write_media(tmp_path / "a.mkv", CONSTANT)
    window = decode_window(clip(path, start=1.0, end=2.2), 1.0, **SHAPE)
    assert window.looped and not window.short_audio
    assert numbers(studio, window.frames) == shown(CONSTANT, 1.0 + (np.arange(8) / 4) % 1.2)
    period = round(1.2 * 16000)
    assert np.abs(window.audio[:period] - studio.chirp(1 + np.arange(period) / 16000)).max() < 0.02
    assert np.array_equal(window.audio[period:], window.audio[: 32000 - period])


def test_a_clip_that_just_fits_does_not_loop(studio, tmp_path):
    path = studio.write_media(tmp_path / "a.mp4", CONSTANT)
    window = decode_window(clip(path, start=1.0, end=3.0), 1.0, **SHAPE)
    assert not window.looped and numbers(studio, window.frames) == shown(CONSTANT, 1.0 + np.arange(8) / 4)
    assert decode_window(clip(path, start=1.0, end=2.7), 1.0, **SHAPE).looped


@pytest.mark.parametrize("name", ["a.mp4", "a.webm"])
def test_a_window_of_a_whole_clip_has_the_same_bytes(studio, tmp_path, name):
    path = studio.write_media(tmp_path / name, VARIABLE, seconds=4.0)
    shape = WindowShape(**{**SHAPE, "short_side": 30})
    for span in ({}, {"start": 0.4}, {"start": 0.45, "end": 3.1}, {"start": 1.0, "end": 1.9}):
        with open_clip(clip(path, **span)) as opened:
            whole = opened.whole(shape)
            begin = opened.span.start
        for start in (begin, begin + 0.13, begin + 0.5):
            cut, alone = whole.window(start, shape), decode_window(clip(path, **span), start, **{**SHAPE, "short_side": 30})
            assert np.array_equal(cut.frames, alone.frames) and np.array_equal(cut.audio, alone.audio)
            assert (cut.has_audio, cut.looped, cut.short_audio) == (alone.has_audio, alone.looped, alone.short_audio)


def test_long_clips_are_decoded_by_window(studio, tmp_path):
    path = studio.write_media(
        tmp_path / "a.mp4", [i / 2 for i in range(80)], rate=16000, key_every=10, sound=lambda t: studio.chirp(t - 31)
    )
    with open_clip(clip(path)) as opened:
        assert opened.whole(WindowShape(**SHAPE)) is None
    window = decode_window(clip(path), 31.0, **SHAPE)
    assert numbers(studio, window.frames) == shown([i / 2 for i in range(80)], 31 + np.arange(8) / 4)
    assert abs(offset_seconds(studio, window.audio, 16000, 0.0)) <= 1e-3


def test_probe(studio, tmp_path):
    info = probe(str(studio.write_media(tmp_path / "a.mp4", CONSTANT)))
    assert info.has_video and info.has_audio and (info.width, info.height, info.audio_rate) == (64, 48, 48000)
    assert info.video_end == pytest.approx(4.0, abs=0.05) and info.audio_end == pytest.approx(4.0, abs=0.05)
    sound = probe(str(studio.write_sound(tmp_path / "s.wav")))
    assert not sound.has_video and sound.audio_end == pytest.approx(4.0)


def fails(subject, start=0.0, **changes):
    with pytest.raises(DecodeError) as caught:
        decode_window(subject, start, **{**SHAPE, **changes})
    message = str(caught.value)
    assert "\n" not in message and str(subject.video) in message or str(subject.audio) in message
    return message


def test_what_is_no_clip(studio, tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a film\n" * 500)
    assert "zero bytes" in fails(clip(tmp_path / "empty.mp4"))
    assert "not readable as audio or video" in fails(clip(tmp_path / "text.mp4"))
    assert "no such file" in fails(clip(tmp_path / "absent.mp4"))
    assert "is not a file" in fails(clip(tmp_path))
    assert "fetch it first" in fails(clip("https://example.org/a.mp4"))
    sound = studio.write_sound(tmp_path / "s.wav")
    video = studio.write_media(tmp_path / "silent.mp4", CONSTANT, sound=None)
    assert "no video stream" in fails(clip(sound))
    assert "sound only" in fails(Clip("x", None, str(sound), None, None, (), (), "", 1))
    assert "no audio stream" in fails(clip(video, video))
    assert "starts at 9 s, but the video ends at 4.0" in fails(clip(video, start=9.0, end=12.0))


@pytest.mark.parametrize("name", ["end.mp4", "front.mp4", "a.webm"])
@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.9])
def test_truncated(studio, tmp_path, name, fraction):
    """Whichever window is asked for, also one that is still there."""
    options = {"movflags": "faststart"} if name == "front.mp4" else {}
    path = studio.write_media(tmp_path / name, CONSTANT, options=options)
    whole = path.read_bytes()
    path.write_bytes(whole[: round(len(whole) * fraction)])
    assert "truncated" in fails(clip(path), frames=2, audio_samples=4000)


def test_damage_in_the_middle_is_not_a_shorter_clip(studio, tmp_path):
    path = studio.write_media(tmp_path / "a.mp4", CONSTANT, sound=None, key_every=1, options={"movflags": "faststart"})
    with av.open(str(path)) as container:
        entries = [container.streams.video[0].index_entries[i] for i in range(40)]
    data = bytearray(path.read_bytes())
    for entry in entries[12:16]:
        data[entry.pos : entry.pos + entry.size] = bytes(entry.size)
    path.write_bytes(data)
    assert "damaged" in fails(clip(path), 0.5)
    assert numbers(studio, decode_window(clip(path), 1.9, **SHAPE).frames) == shown(CONSTANT, 1.9 + np.arange(8) / 4)
