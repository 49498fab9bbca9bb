"""The plain backend with Adam divided: what is gathered together, and that nothing waits for it too early or too late."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from vatt.engine.backend.interface import make_backend
from vatt.engine.backend.sharded import ShardedBackend, units
from vatt.engine.config import BackendConfig, ConfigError, RunConfig
from vatt.engine.config_file import load_run
from vatt.engine.model import VATT


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.norm = nn.LayerNorm(3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x * self.scale)
        return self.norm(x)


class Two(nn.Module):
    """`head` is used by its part only, as a tower's heads are."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Stack(), Stack()
        self.head = nn.Module()
        self.head.part = nn.Linear(3, 5)

    def forward(self, x):
        return self.head.part(self.second(self.first(x)))


@pytest.mark.parametrize("recipe", ["pretrain/tiny", "pretrain/ma", None])
def test_every_parameter_is_in_one_unit(recipe):
    model = VATT(load_run(recipe, ["--model.shared.layers", "2", "--model.text.vocabulary", "64"])) if recipe else Two()
    counted = [parameter for _, parameters in units(model) for parameter in parameters]
    assert len(counted) == len({id(p) for p in counted}) == len(list(model.parameters()))


def test_a_layer_waits_for_itself_alone(alone):
    backend = ShardedBackend(Two(), RunConfig(), rank=0, world_size=1, device=torch.device("cpu"))
    assert sum(len(bucket.parameters) for bucket in backend.buckets) == len(list(backend.module.parameters()))
    x = torch.randn(4, 3).bfloat16()
    backend.backward(backend.module(x).float().square().sum())
    backend.step(1e-2)
    waiting: list[set[str]] = []

    def look(module, inputs):
        waiting.append({name for bucket in backend.buckets if bucket.arriving is not None for name in bucket.parameters})

    # Registered after the backend's own hooks, so it sees what they leave.
    for module in (backend.module.first.layers[0], backend.module.first.layers[1], backend.module.head.part):
        module.register_forward_pre_hook(look)
    assert all(bucket.arriving is not None for bucket in backend.buckets), "the step waited for its gathers"
    backend.module(x)
    first, second, last = waiting
    assert "first.layers.0.weight" not in first and "first.layers.1.weight" in first and "second.norm.weight" in first
    assert "first.layers.1.weight" not in second and "second.layers.0.weight" in second
    assert not last


def test_weights_are_the_rounded_masters_after_a_step(alone):
    backend = ShardedBackend(Two(), RunConfig(), rank=0, world_size=1, device=torch.device("cpu"))
    before = backend.module.head.part.weight.detach().clone()
    backend.backward(backend.module(torch.randn(4, 3).bfloat16()).float().square().sum())
    backend.step(1e-1)
    state = backend.gather_state()
    for name, weight in backend.module.named_parameters():
        assert torch.equal(weight, state[f"model/{name}"].bfloat16()), name
    assert not torch.equal(before, backend.module.head.part.weight)


@pytest.mark.parametrize("stage", [2, 3])
def test_stages_of_deepspeed_are_refused(stage):
    config = RunConfig(backend=BackendConfig(name="torch", zero_stage=stage))
    with pytest.raises(ConfigError, match=f"backend.zero_stage: {stage} needs backend.name = 'deepspeed'"):
        make_backend(Two(), config, rank=0, world_size=1, device=torch.device("cpu"))
