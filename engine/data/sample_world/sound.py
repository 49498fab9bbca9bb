"""What a clip sounds like: a steady voice whose pitch is the shape, and a chime whose pitch and rhythm are the motion.

The colour is silent. Both parts last the whole clip and a chime strikes at least four times a second, so any second of
sound tells shape and motion; everything lies below 3.4 kHz, so 8 kHz audio still holds it.
"""

from __future__ import annotations

import numpy as np

from vatt.engine.data.sample_world.scene import FPS, FRAMES
from vatt.engine.data.sample_world.world import MOTIONS, SHAPES, Combination
from vatt.kernels.counter import Stream, uniform

RATE = 48000
"""Samples a second."""
SAMPLES = RATE * FRAMES // FPS
# Equal ratios: no voice is near an octave or a fifth of another, so harmonics do not make two shapes alike.
VOICE_HZ = dict(zip(SHAPES, np.geomspace(160.0, 1000.0, len(SHAPES)).tolist(), strict=True))
CHIME_HZ = dict(zip(MOTIONS, np.geomspace(1400.0, 3200.0, len(MOTIONS)).tolist(), strict=True))
STRIKES_PER_S = dict(zip(MOTIONS, (4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0), strict=True))
HARMONICS = (1.0, 0.3, 0.12)
DETUNE = 0.01
"""Largest relative change of a pitch between clips of one combination."""


def draw_sound(combination: Combination, seed: int, split: int, index: int) -> np.ndarray:
    """float32 (C, S) in [-1, 1] at 48 kHz, S = 192000 (4 s); C is 1, or 2 in a quarter of the clips.

    Pitches, phases, loudness, balance of the two parts, stereo position and noise vary; the two channels stay in phase,
    so mixing them down loses nothing. A function of the arguments alone.
    """
    u = uniform(seed, Stream.WORLD_SOUND, split, index, 12).tolist()
    time = np.arange(SAMPLES) / RATE
    voice_hz = VOICE_HZ[combination.shape] * (1 + DETUNE * (2 * u[0] - 1))
    chime_hz = CHIME_HZ[combination.motion] * (1 + DETUNE * (2 * u[1] - 1))
    turn = 2 * np.pi
    voice = sum(
        weight * np.sin(turn * (harmonic * voice_hz * time + phase))
        for harmonic, weight, phase in zip((1, 2, 3), HARMONICS, u[2:5], strict=True)
    )
    since_strike = (STRIKES_PER_S[combination.motion] * time + u[5]) % 1.0
    # Rises within a fiftieth of the period, then dies away to a twentieth before the next strike.
    envelope = np.minimum(since_strike * 50, 1.0) * np.exp(-3.0 * since_strike)
    chime = envelope * np.sin(turn * (chime_hz * time + u[6]))
    noise = uniform(seed, Stream.WORLD_NOISE, split, index, SAMPLES) - 0.5
    mono = voice + (1.2 + 0.6 * u[7]) * chime + 0.1 * noise
    mono *= (0.3 + 0.5 * u[8]) / np.abs(mono).max()
    if u[9] >= 0.25:
        return mono[None].astype(np.float32)
    left = 0.3 + 0.4 * u[10]
    return (np.stack([mono * left, mono * (1 - left)]) / max(left, 1 - left)).astype(np.float32)
