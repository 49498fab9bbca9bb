"""Nominal peak of a device, the denominator of MFU."""

from __future__ import annotations

import re

# (words that must all be in the device's name, dense bf16 TFLOP/s); the first row that fits wins.
# Source: the vendor's data sheet, dense (half of the figure printed "with sparsity"), boost clock, fp32 accumulation.
PEAKS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("gb200",), 2500.0),
    (("b200",), 2250.0),
    (("h200", "nvl"), 835.5),
    (("h200",), 989.5),
    (("gh200",), 989.5),
    (("h100", "pcie"), 756.5),
    (("h100", "nvl"), 835.5),
    (("h100",), 989.5),
    (("h800", "pcie"), 756.5),
    (("h800",), 989.5),
    (("h20",), 148.0),
    (("a100",), 312.0),
    (("a800",), 312.0),
    (("a30",), 165.0),
    (("a40",), 149.7),
    (("a10",), 125.0),
    (("a10g",), 70.0),
    (("l40s",), 362.05),
    (("l40",), 181.05),
    (("l4",), 121.0),
    (("rtx", "4090"), 165.2),
    (("rtx", "3090"), 71.0),
    # No bf16 tensor cores: the fp16 figure, which is what its mixed-precision runs are measured against.
    (("v100", "pcie"), 112.0),
    (("v100",), 125.0),
)
# A part of a device, or one with lower clocks, under the name of the whole.
_NOT_THE_WHOLE = {"mig", "laptop", "max"}


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 TFLOP/s of one device from the name CUDA gives it; None if unknown (a CPU, a slice of a GPU).

    >>> peak_tflops("NVIDIA H100 80GB HBM3"), peak_tflops("cpu")
    (989.5, None)
    """
    words = set(re.split(r"[\s_-]+", device_name.lower()))
    if words & _NOT_THE_WHOLE:
        return None
    return next((peak for needed, peak in PEAKS if words.issuperset(needed)), None)
