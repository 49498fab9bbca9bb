"""Schedules against the released code's numbers; Adam against PyTorch's and against its formula; the guard."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from vatt.engine.config import OptimizerConfig
from vatt.engine.optimizer import Adam, learning_rate, trainable

GOLDEN = np.load(Path(__file__).parent / "golden" / "lr_schedules.npz")
SHAPES = [(5,), (3, 4), (1,), (2, 3, 7), (33,)]


@pytest.mark.parametrize(
    ("steps", "rates", "config", "length"),
    [
        ("pretrain/steps", "pretrain/lr", OptimizerConfig(warmup=5000, schedule="half_cosine"), 500_000),
        ("pretrain/steps", "pretrain_warmup10k/lr_at_pretrain_steps", OptimizerConfig(schedule="half_cosine"), 500_000),
        (
            "finetune/steps",
            "finetune/lr",
            OptimizerConfig(learning_rate=5e-3, final_learning_rate=0.0, warmup=2500, schedule="half_cosine"),
            100_000,
        ),
    ],
)
def test_half_cosine_is_the_released_schedule(steps, rates, config, length):
    ours = [learning_rate(int(step), config, length) for step in GOLDEN[steps]]
    # 1e-6 of the peak where the decay ends at 0: there the released fp32 cosine has no relative precision left.
    floor = 1e-6 * config.learning_rate if config.final_learning_rate == 0.0 else 0.0
    np.testing.assert_allclose(ours, GOLDEN[rates], rtol=1e-6, atol=floor)


def test_quarter_cosine_is_the_papers():
    config = OptimizerConfig()
    assert learning_rate(0, config, 500_000) == 0.0
    assert learning_rate(5_000, config, 500_000) == pytest.approx(5e-5, rel=1e-12)
    assert learning_rate(10_000, config, 500_000) == pytest.approx(1e-4, rel=1e-12)
    middle = learning_rate(255_000, config, 500_000)
    assert middle == pytest.approx(5e-5 + 5e-5 * math.sqrt(0.5), rel=1e-12)
    assert learning_rate(499_999, config, 500_000) == pytest.approx(5e-5, rel=1e-5)


@pytest.mark.parametrize(("schedule", "end"), [("quarter_cosine", 5e-5), ("half_cosine", 5e-5), ("constant", 1e-4)])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 10), (10, 10), (3, 10), (20, 10)])
def test_the_end_of_the_schedule_is_a_number(schedule, end, warmup, steps):
    config = OptimizerConfig(schedule=schedule, warmup=warmup)
    assert learning_rate(steps, config, steps) == pytest.approx(end, rel=1e-12)
    assert learning_rate(steps + 5, config, steps) == pytest.approx(end, rel=1e-12)
    rates = [learning_rate(step, config, steps) for step in range(steps)]
    assert all(0.0 <= rate <= 1e-4 for rate in rates)
    assert rates[0] == (0.0 if warmup else 1e-4)


def parameters_and_gradients(steps: int, seed: int = 0) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    start = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return start, [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(steps)]


def take(
    adam: Adam | torch.optim.Optimizer, parameters: list[torch.Tensor], gradients: list[torch.Tensor], rate: float
) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    adam.param_groups[0]["lr"] = rate
    adam.step()


def test_pytorch_form_is_torch_adam():
    start, gradients = parameters_and_gradients(steps=20)
    ours, theirs = ([p.clone().requires_grad_() for p in start] for _ in range(2))
    config = OptimizerConfig(epsilon=1e-3, beta1=0.8, beta2=0.95)
    adam = Adam(ours, config)
    reference = torch.optim.Adam(theirs, betas=(0.8, 0.95), eps=1e-3, foreach=False)
    for step, gradient in enumerate(gradients):
        take(adam, ours, gradient, 1e-2 / (1 + step))
        take(reference, theirs, gradient, 1e-2 / (1 + step))
        total = math.sqrt(sum(float(g.double().square().sum()) for g in gradient))
        assert float(adam.gradient_norm) == pytest.approx(total, rel=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("epsilon_form", ["pytorch", "tensorflow"])
def test_each_form_is_its_formula(epsilon_form):
    """Literal formulas in fp64, with an epsilon large enough to tell the two forms apart."""
    start, gradients = parameters_and_gradients(steps=5, seed=1)
    ours = [p.clone().requires_grad_() for p in start]
    config = OptimizerConfig(epsilon=0.1, epsilon_form=epsilon_form)
    adam = Adam(ours, config)
    truth = [p.double() for p in start]
    m, v = [torch.zeros_like(p) for p in truth], [torch.zeros_like(p) for p in truth]
    other = [p.double() for p in start]
    for t, gradient in enumerate(gradients, start=1):
        take(adam, ours, gradient, 0.05)
        for i, g in enumerate(g.double() for g in gradient):
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.999 * v[i] + 0.001 * g * g
            correct1, correct2 = 1 - 0.9**t, 1 - 0.999**t
            pytorch = 0.05 / correct1 * m[i] / (torch.sqrt(v[i] / correct2) + 0.1)
            tensorflow = 0.05 * math.sqrt(correct2) / correct1 * m[i] / (torch.sqrt(v[i]) + 0.1)
            truth[i] = truth[i] - (pytorch if epsilon_form == "pytorch" else tensorflow)
            other[i] = other[i] - (tensorflow if epsilon_form == "pytorch" else pytorch)
    for a, b, c in zip(ours, truth, other, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-6)
        assert (a.double() - c).abs().max() > 1e-2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("epsilon_form", ["pytorch", "tensorflow"])
@pytest.mark.parametrize("when", [0, 2])
def test_a_gradient_that_is_not_finite_touches_nothing(bad, epsilon_form, when):
    start, gradients = parameters_and_gradients(steps=4, seed=2)
    config = OptimizerConfig(epsilon_form=epsilon_form)
    guarded, clean = ([p.clone().requires_grad_() for p in start] for _ in range(2))
    adam, reference = Adam(guarded, config), Adam(clean, config)
    for step, gradient in enumerate(gradients):
        if step == when:
            poisoned = [g.clone() for g in gradient]
            poisoned[3].view(-1)[-1] = bad
            before = [p.detach().clone() for p in guarded], [m.clone() for p in guarded for m in adam.moments(p)]
            take(adam, guarded, poisoned, 1e-2)
            assert bool(adam.skipped) and not math.isfinite(float(adam.gradient_norm))
            assert float(adam.updates) == step
            assert all(torch.equal(a, b) for a, b in zip(guarded, before[0], strict=True))
            assert all(torch.equal(a, b) for a, b in zip((m for p in guarded for m in adam.moments(p)), before[1], strict=True))
        take(adam, guarded, gradient, 1e-2)
        take(reference, clean, gradient, 1e-2)
        assert not bool(adam.skipped)
    assert all(torch.equal(a, b) for a, b in zip(guarded, clean, strict=True))


def test_the_norm_of_many_elements_is_accurate():
    parameter = torch.zeros(3_000_001, requires_grad=True)
    parameter.grad = torch.randn(3_000_001, generator=torch.Generator().manual_seed(0))
    adam = Adam([parameter], OptimizerConfig())
    adam.step()
    assert float(adam.gradient_norm) == pytest.approx(float(parameter.grad.double().norm()), rel=2e-6)


def test_frozen_parameters_are_left_out():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    model[0].weight.requires_grad_(False)
    assert list(trainable(model)) == ["0.bias", "1.weight", "1.bias"]
