"""Targets of a classifier: label smoothing and mixup. B clips, K classes, S audio samples."""

from __future__ import annotations

import numpy as np


def smooth(labels_BK: np.ndarray, amount: float) -> np.ndarray:
    """(1 - amount) labels + amount / K; float32. Used with one-hot rows, which keep the sum 1."""
    classes = labels_BK.shape[-1]
    return (labels_BK * np.float32(1.0 - amount) + np.float32(amount / classes)).astype(np.float32)


def mixup(
    audio_BS: np.ndarray, labels_BK: np.ndarray, fraction_B1: np.ndarray, partner_B: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mix every clip with its partner, waveform and labels alike: fraction x own + (1 - fraction) x partner's.

    fraction_B1 float32 (B, 1), released: one draw a clip from Beta(5, 5); partner_B int (B,), a permutation of the batch.
    """
    rest_B1 = np.float32(1.0) - fraction_B1
    return (
        fraction_B1 * audio_BS + rest_B1 * audio_BS[partner_B],
        fraction_B1 * labels_BK + rest_B1 * labels_BK[partner_B],
    )
