"""What a backend refuses, and how it says so."""

from __future__ import annotations

import math

import pytest
import torch

from vatt.engine.backend.interface import check_state, make_backend
from vatt.engine.backend.plain import buckets
from vatt.engine.config import BackendConfig, ConfigError, RunConfig

CPU = torch.device("cpu")


def backend_of(model, **settings):
    config = RunConfig(batch_size=4, backend=BackendConfig(**settings))
    return make_backend(model, config, rank=0, world_size=1, device=CPU)


def test_a_batch_that_the_ranks_cannot_share():
    with pytest.raises(ConfigError, match="batch_size: 4 clips do not divide over 3 ranks; use a multiple of 3"):
        make_backend(torch.nn.Linear(2, 2), RunConfig(batch_size=4), rank=0, world_size=3, device=CPU)


def test_bf16_without_zero_is_refused_under_deepspeed():
    with pytest.raises(ConfigError, match="backend.zero_stage: 0 with bf16 .* use zero_stage 1"):
        backend_of(torch.nn.Linear(2, 2), name="deepspeed", zero_stage=0, precision="bf16")


def test_a_state_of_another_model_is_refused_by_name():
    backend = backend_of(torch.nn.Linear(2, 3), name="torch", precision="fp32")
    state = backend.gather_state()
    missing = {k: v for k, v in state.items() if k != "adam/v/bias"}
    for wrong, message in [
        (missing, "adam/v/bias: missing from the saved state"),
        (state | {"model/extra": torch.zeros(1)}, "model/extra: in the saved state, unknown to this model"),
        (state | {"model/weight": torch.zeros(3, 4)}, r"model/weight: saved with shape \(3, 4\), needed \(3, 2\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            backend.load_state(wrong)
    check_state(state, {name: tensor.shape for name, tensor in state.items()})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_skips_although_its_gradient_is(precision, bad):
    """An added constant has no gradient: only the loss itself can tell."""
    model = torch.nn.Linear(2, 1)
    backend = backend_of(model, name="torch", precision=precision)
    before = backend.gather_state()
    x = torch.ones(4, 2, dtype=model.weight.dtype)
    backend.backward(backend.module(x).float().mean() + bad)
    assert bool(backend.step(1e-2).skipped)
    after = backend.gather_state()
    assert all(torch.equal(before[name], after[name]) for name in before)
    backend.backward(backend.module(x).float().mean())
    assert not bool(backend.step(1e-2).skipped)
    assert not torch.equal(backend.gather_state()["model/weight"], before["model/weight"])


def test_masters_keep_what_bf16_would_lose():
    """A hundred steps, each too small for a bf16 weight to show."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    backend = backend_of(model, name="torch", precision="bf16")
    for _ in range(100):
        backend.backward(backend.module(torch.ones(4, 1, dtype=torch.bfloat16)).float().mean())
        backend.step(1e-4)
    assert model.weight.dtype == torch.bfloat16
    assert float(backend.gather_state()["model/weight"]) == pytest.approx(0.99, abs=1e-4)
    assert model.weight.item() == pytest.approx(0.99, abs=4e-3) and model.weight.item() < 1.0


def test_buckets_cover_everything_once_and_keep_to_the_limit():
    tensors = [torch.empty(n) for n in (3, 4, 12, 1, 1, 5, 6)]
    slices = list(buckets(tensors, limit=10))
    assert [i for s in slices for i in range(s.start, s.stop)] == list(range(7))
    assert [sum(t.numel() for t in tensors[s]) for s in slices] == [7, 12, 7, 6]
