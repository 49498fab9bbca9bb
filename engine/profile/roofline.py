"""The least time a GPU needs for so many bytes and FLOPs: whichever of its two ceilings, bandwidth or products, binds.

Nominal figures are the vendor's data sheets: dense bf16 products with fp32 accumulation, boost clock, and the bandwidth of
the SXM board's memory. Nothing reaches them. The measured H200 is what plain programs reached there: an 8192^3 bf16 product
of random matrices and a copy of large tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from vatt.engine.profile.peak import peak_tflops


@dataclass(frozen=True)
class Ceiling:
    """A GPU's limits: products in TFLOP/s (multiply-adds count 2), memory in TB/s (1e12 bytes)."""

    name: str
    tflops: float
    tb_s: float
    measured: bool = False

    @property
    def label(self) -> str:
        return f"{self.name} {'measured' if self.measured else 'nominal'}"

    @property
    def knee(self) -> float:
        """FLOPs a byte from which products bind."""
        return self.tflops / self.tb_s

    def seconds(self, bytes_moved: float, flops: float) -> float:
        """The roofline time. Assumes that loads and products overlap perfectly."""
        return max(bytes_moved / self.tb_s, flops / self.tflops) / 1e12


def _nominal(name: str, tb_s: float) -> Ceiling:
    tflops = peak_tflops(name)
    assert tflops is not None, name
    return Ceiling(name, tflops, tb_s)


CEILINGS = {
    "a100": _nominal("A100", 2.04),  # the 80 GB board
    "h100": _nominal("H100", 3.35),
    "h200": _nominal("H200", 4.8),
    "h200_measured": Ceiling("H200", 790.0, 4.3, measured=True),
    "b200": _nominal("B200", 8.0),
}
# The same chips with slower memory, or under other names; a part of a device has no ceiling of its own either.
_OTHER_BOARDS = ("pcie", "nvl", "40gb", "gb200", "gh200", "mig")


def ceilings_of(device_name: str) -> list[str]:
    """Keys of CEILINGS that hold for a device, from the name CUDA gives it; none for a CPU or an unlisted board.

    >>> ceilings_of("NVIDIA H200"), ceilings_of("NVIDIA H100 PCIe")
    (['h200', 'h200_measured'], [])
    """
    name = device_name.lower()
    if any(board in name for board in _OTHER_BOARDS):
        return []
    return [key for key, ceiling in CEILINGS.items() if ceiling.name.lower() in name]


def times_us(bytes_moved: float, flops: float) -> dict[str, float]:
    """The roofline time under every ceiling, in microseconds: {"a100_us": ...}."""
    return {f"{key}_us": float(f"{ceiling.seconds(bytes_moved, flops) * 1e6:.6g}") for key, ceiling in CEILINGS.items()}
