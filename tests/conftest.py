"""What every test shares: the gpu mark, the golden arrays, and modest use of the machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

# Before torch is imported: several processes share few cores in the multi-rank tests.
os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        reason = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(reason)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """`golden("losses")`: the arrays of tests/golden/losses.npz. A missing file fails the test: parity must not go unseen."""
    loaded: dict[str, dict[str, np.ndarray]] = {}

    def load(name: str) -> dict[str, np.ndarray]:
        if name not in loaded:
            path = GOLDEN / f"{name}.npz"
            if not path.is_file():
                pytest.fail(f"golden file missing: {path}")
            with np.load(path, allow_pickle=False) as arrays:
                loaded[name] = dict(arrays)
        return loaded[name]

    return load
