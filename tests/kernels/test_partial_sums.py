"""The second half of every sum over all rows: few partial sums, added up in order."""

from __future__ import annotations

import pytest
import torch

from vatt.kernels.gpu.partial_sums import LEAST_ROWS, TUNING, add_up, programs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sums", [1, 2, 3])
@pytest.mark.parametrize("partial", [1, TUNING.blocks["BLOCK_P"], 2 * TUNING.blocks["BLOCK_P"] + 3])
def test_sums(partial: int, sums: int, dtype: torch.dtype) -> None:
    buffer = torch.randn(sums, partial, 45, generator=torch.Generator().manual_seed(partial)).to(DEVICE)
    found = add_up(buffer, dtype)
    assert len(found) == sums and all(each.dtype == dtype for each in found)
    # The bound of a sum in fp32, whatever its order (Higham, "Accuracy and stability of numerical algorithms", section 4.2),
    # and one rounding to the dtype of the result.
    summed = partial * torch.finfo(torch.float32).eps / 2 * buffer.double().abs().sum(1)
    truth = buffer.double().sum(1)
    for ours, true, bound in zip(found, truth, summed, strict=True):
        assert ((ours.double() - true).abs() <= bound + torch.finfo(dtype).eps * true.abs()).all()


def test_programs_have_their_least_rows() -> None:
    assert [programs(100, rows) for rows in (1, LEAST_ROWS, 5 * LEAST_ROWS + 1, 10**6)] == [1, 1, 5, 100]
    assert programs(0, 10**6) == 1
