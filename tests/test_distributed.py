"""Who a process is, by its launcher's variables; and the gather at one rank (more ranks: tests/backend)."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from vatt.engine.config import BackendConfig, ConfigError
from vatt.engine.distributed import all_gather_rows, find_process, joined

CPU = BackendConfig(device="cpu")


def test_alone():
    process = find_process(CPU, {})
    assert (process.rank, process.world_size, process.local_rank, process.local_world_size) == (0, 1, 0, 1)
    assert process.is_main and process.device == torch.device("cpu")


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_under_either_launcher(name):
    process = find_process(CPU, {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", name: "4"})
    assert (process.rank, process.world_size, process.local_rank, process.local_world_size) == (5, 8, 1, 4)
    assert not process.is_main


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK: 2 is not below WORLD_SIZE = 2"),
        ({"RANK": "one"}, "RANK: 'one' is not a whole number"),
        ({"RANK": "1"}, "RANK: 1 is not below WORLD_SIZE = 1"),
    ],
)
def test_a_half_set_environment_is_an_error(environment, message):
    with pytest.raises(ConfigError, match=message):
        find_process(CPU, environment)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the error is for machines without a GPU")
def test_cuda_without_a_gpu_is_an_error():
    with pytest.raises(ConfigError, match="backend.device: 'cuda' is asked for and torch sees no GPU"):
        find_process(BackendConfig(device="cuda"), {})


def test_one_rank_joins_and_leaves_a_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    rows = torch.randn(3, 2)
    with joined(BackendConfig(device="cpu", threads=1)) as process:
        assert dist.is_initialized() and process.world_size == 1 and torch.get_num_threads() == 1
        assert all_gather_rows(rows) is rows
    assert not dist.is_initialized()
    with pytest.raises(ZeroDivisionError), joined(BackendConfig(device="cpu")):
        raise ZeroDivisionError
    assert not dist.is_initialized()
    torch.set_num_threads(threads)
