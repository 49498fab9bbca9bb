"""The one hash behind every random draw: published answers, stored values, and what must not depend on what."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from vatt.kernels import native
from vatt.kernels.counter import Stream, normal, philox, seed_key, uniform, words, words_tensor

ONES = 0xFFFFFFFF
PI = ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))

# Known answers of Philox 4x32, published with Random123 (kat_vectors).
KNOWN = [
    (10, (0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, (ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (10, *PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    (7, (0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, (ONES,) * 4, (ONES,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (7, *PI, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
]


def arrays(values: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    return tuple(np.array([v], dtype=np.int64) for v in values)


@pytest.mark.parametrize(("rounds", "counter", "key", "expected"), KNOWN)
def test_known_answers(rounds: int, counter: tuple, key: tuple, expected: tuple) -> None:
    assert tuple(int(w[0]) for w in philox(arrays(counter), arrays(key), rounds)) == expected
    tensors = [tuple(torch.tensor(v) for v in values) for values in (counter, key)]
    assert tuple(int(w) for w in philox(*tensors, rounds)) == expected


def test_seven_rounds_unless_told_otherwise() -> None:
    assert tuple(int(w[0]) for w in philox(arrays(PI[0]), arrays(PI[1]))) == KNOWN[5][3]


def test_stored_values() -> None:
    """Runs already made must be reproducible for ever: another constant, round count or counter layout turns this red."""
    assert words(12345678901234, 9, 7, 42, 6).tolist() == [
        2042869417,
        1452326497,
        2554426203,
        4181624999,
        2645825936,
        3199244042,
    ]
    assert uniform(3, 6, 2, 1, 3).tolist() == pytest.approx(
        [0.5054907870944589, 0.009493927471339703, 0.5338755317497998], abs=1e-15
    )
    assert normal(3, 6, 2, 1, 3).tolist() == pytest.approx(
        [-0.9812272436080542, -0.09289168161834409, 0.9843968731233308], abs=1e-12
    )


def test_stream_numbers_never_change() -> None:
    stored = {
        "ORDER": 0,
        "SUBSTITUTE": 1,
        "WINDOW": 2,
        "CROP": 3,
        "FLIP": 4,
        "COLOUR": 5,
        "AUDIO_NOISE": 6,
        "KEEP_VIDEO": 7,
        "KEEP_AUDIO": 8,
        "INITIALISATION": 9,
        "DROPOUT": 1024,
    }
    assert {name: int(Stream[name]) for name in stored} == stored
    assert len({int(s) for s in Stream}) == len(Stream.__members__), "two streams share a number"
    assert max(Stream) == Stream.DROPOUT, "numbers above DROPOUT belong to dropout sites"


def test_words_are_the_philox_of_position_sample_step_stream() -> None:
    seed, stream, step, sample, count = (5 << 32) + 9, 3, 11, 2**32 + 17, 10
    counter = tuple(torch.tensor(v) for v in (0, sample & ONES, step, stream))
    expected = []
    for position in range(3):
        expected += [int(w) for w in philox((torch.tensor(position), *counter[1:]), seed_key(torch.tensor(seed)))]
    assert words(seed, stream, step, sample, count).tolist() == expected[:count]
    assert seed_key((5 << 32) + 9) == (9, 5)


def test_numpy_and_torch_agree_on_random_counters() -> None:
    generator = np.random.default_rng(0)
    c, k = generator.integers(0, 2**32, (4, 1000)), generator.integers(0, 2**32, (2, 1000))
    ours = philox(tuple(c), tuple(k))
    theirs = philox(tuple(torch.from_numpy(c)), tuple(torch.from_numpy(k)))
    for a, b in zip(ours, theirs, strict=True):
        assert np.array_equal(a, b.numpy())
        assert a.min() >= 0 and a.max() <= ONES


def test_a_shorter_draw_is_the_beginning_of_a_longer_one() -> None:
    long = words(1, 2, 3, 4, 21)
    for count in (1, 3, 4, 5, 20):
        assert np.array_equal(words(1, 2, 3, 4, count), long[:count])


def test_moments() -> None:
    count = 200_000
    u, z = uniform(7, Stream.CROP, 0, 0, count), normal(7, Stream.CROP, 0, 0, count)
    sigma = count**-0.5
    assert 0.0 <= u.min() < 1e-4 and 1 - 1e-4 < u.max() < 1.0
    assert abs(u.mean() - 0.5) < 5 * sigma * 12**-0.5
    assert abs(u.var() - 1 / 12) < 5 * sigma * 180**-0.5
    assert np.isfinite(z).all()
    for power, expected, spread in ((1, 0.0, 1.0), (2, 1.0, 2**0.5), (3, 0.0, 15**0.5), (4, 3.0, 96**0.5)):
        assert abs((z**power).mean() - expected) < 5 * sigma * spread, f"moment {power}"
    assert abs(np.corrcoef(z[:-1], z[1:])[0, 1]) < 5 * sigma


@pytest.mark.parametrize("change", range(4))
def test_seed_stream_step_and_sample_each_give_an_independent_draw(change: int) -> None:
    count, base = 50_000, [1, 2, 3, 4]
    first = uniform(*base, count)
    for delta in (1, 2, 256, 2**31 - 8):
        other = list(base)
        other[change] += delta
        second = uniform(*other, count)
        assert abs(np.corrcoef(first, second)[0, 1]) < 5 * count**-0.5, delta
        assert np.mean(first == second) < 1e-3


def test_arguments_are_not_interchangeable() -> None:
    draws = {tuple(words(*order, 4)) for order in ((1, 2, 3, 4), (2, 1, 3, 4), (1, 3, 2, 4), (1, 2, 4, 3), (4, 3, 2, 1))}
    assert len(draws) == 5


def test_both_words_of_the_seed_count() -> None:
    low, high = words(1, 0, 0, 0, 4), words(1 + (1 << 32), 0, 0, 0, 4)
    assert not np.array_equal(low, high)
    assert not np.array_equal(high, words(1 + (1 << 33), 0, 0, 0, 4))


def test_importing_it_does_not_load_torch() -> None:
    """Decoding workers import it, and torch would cost each of them a second and 200 MB."""
    code = "import sys, vatt.kernels.counter; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("cpp", [True, False], ids=["cpp", "torch"])
@pytest.mark.parametrize("count", [1, 3, 4, 1023, 1024, 1025, 5000])
def test_a_batch_draws_the_words_of_each_of_its_samples(count: int, cpp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.loaded(required=True)
    if not cpp:
        monkeypatch.setattr(native, "loaded", lambda: False)
    seed, step, ids = 2**62 + 2**33 + 5, 2**32 - 1, (0, 7, 2**32 - 1)
    drawn = words_tensor(torch.tensor(seed), torch.tensor(step), torch.tensor(ids), Stream.DROPOUT, count)
    assert drawn.shape == (3, count) and drawn.dtype == torch.int64
    for row, sample_id in zip(drawn, ids, strict=True):
        assert row.tolist() == words(seed, Stream.DROPOUT, step, sample_id, count).tolist()
