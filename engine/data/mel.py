"""The log-mel spectrogram of the released code, for its spectrogram Transformer. S samples, N frames, K bins, M mel bands.

Windows of 2048 samples every 1024, the last ones padded with zeros; magnitudes; 80 triangles evenly spaced on the mel scale
from 80 to 7600 Hz; log(1 + 10000 x).
"""

from __future__ import annotations

import numpy as np


def log_mel(
    audio_S: np.ndarray,
    rate: int = 48000,
    window: int = 2048,
    hop: int = 1024,
    bands: int = 80,
    low_hz: float = 80.0,
    high_hz: float = 7600.0,
) -> np.ndarray:
    """float32 (N, bands), N = ceil(S / hop)."""
    count = -(-len(audio_S) // hop)
    padded = np.zeros((count - 1) * hop + window, np.float64)
    padded[: len(audio_S)] = audio_S
    frames_NW = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop]
    hann_W = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(window) / window)
    magnitude_NK = np.abs(np.fft.rfft(frames_NW * hann_W))
    weights_KM = mel_weights(bands, magnitude_NK.shape[1], rate, low_hz, high_hz)
    return np.log1p(1e4 * (magnitude_NK @ weights_KM)).astype(np.float32)


def normalise(log_mel_NM: np.ndarray) -> np.ndarray:
    """Shift and scale a clip's spectrogram to [0, 1]; a constant one becomes 0."""
    low, high = log_mel_NM.min(), log_mel_NM.max()
    return (log_mel_NM - low) / (high - low) if high > low else np.zeros_like(log_mel_NM)


def mel_weights(bands: int, bins: int, rate: int, low_hz: float, high_hz: float) -> np.ndarray:
    """float64 (bins, bands): triangles whose sides are straight on the mel scale (HTK's); the bin at 0 Hz has no weight."""
    mel_K = _mel(np.linspace(0.0, rate / 2.0, bins))[:, None]
    low, high = _mel(np.array([low_hz, high_hz]))
    edges = np.linspace(low, high, bands + 2)
    rising_KM = (mel_K - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling_KM = (edges[2:] - mel_K) / (edges[2:] - edges[1:-1])
    weights_KM = np.maximum(0.0, np.minimum(rising_KM, falling_KM))
    weights_KM[0] = 0.0
    return weights_KM


def _mel(hertz: np.ndarray) -> np.ndarray:
    return 1127.0 * np.log1p(hertz / 700.0)
