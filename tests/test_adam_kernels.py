"""Adam by any kernel is the same Adam: against torch's, both epsilon forms, a skipped step included."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest
import torch

from vatt.engine.adam_kernels import adam_kernel
from vatt.engine.config import ConfigError, OptimizerConfig
from vatt.engine.optimizer import Adam

CPU = torch.device("cpu")


def three_steps(config: OptimizerConfig, device: str = "cpu") -> list[torch.Tensor]:
    """Weights and moments after a step, a step with a NaN in its gradient, and another step."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator).to(device) for shape in ((37, 5), (1,), (64,))]
    adam = Adam(weights, config)
    for step in range(3):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator).to(device)
        if step == 1:
            weights[1].grad.fill_(torch.nan)
        adam.param_groups[0]["lr"] = 1e-2 * (step + 1)
        adam.step()
    return weights + [moment for weight in weights for moment in adam.moments(weight)] + [adam.updates]


def check(config: OptimizerConfig, device: str = "cpu") -> None:
    ours, torchs = three_steps(config, device), three_steps(replace(config, kernel="torch"), device)
    assert torchs[-1] == 2
    for one, other in zip(ours, torchs, strict=True):
        # Some take powers of beta in fp32, where 1 - 0.999 keeps four digits: 1e-4 of an update, which is at most the rate.
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-4 * 1e-2)


FORMS = pytest.mark.parametrize("form", ["pytorch", "tensorflow"])


@pytest.mark.slow  # DeepSpeed compiles it with the C++ compiler
@FORMS
def test_deepspeeds_on_a_cpu(form: str) -> None:
    check(OptimizerConfig(epsilon_form=form, kernel="deepspeed"))


@pytest.mark.gpu
@FORMS
@pytest.mark.parametrize("kernel", ["apex", "deepspeed"])
def test_on_a_gpu(kernel: str, form: str) -> None:
    try:
        adam_kernel(kernel, torch.device("cuda"))
    except ConfigError as error:
        pytest.skip(str(error))
    check(OptimizerConfig(epsilon_form=form, kernel=kernel), "cuda")


def capturable(overflow, lists, lr, beta1, beta2, eps, step, mode, bias_correction, weight_decay, inv_scale):
    """What apex documents of its kernel, in plain arithmetic."""
    assert weight_decay == 0 and mode == 1 and overflow.dtype == torch.int32
    if overflow.item() == 1:
        return
    for g, p, m, v in zip(*lists, strict=True):
        g = g * inv_scale
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        c1, c2 = (1 - beta1 ** step.item(), 1 - beta2 ** step.item()) if bias_correction else (1, 1)
        p.sub_(lr * (m / c1) / ((v / c2).sqrt() + eps))


@FORMS
def test_apex_is_called_as_it_documents(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """apex needs a GPU and a build of its own; a stand-in with its signature shows what it is given."""
    apply = types.ModuleType("apex.multi_tensor_apply")
    apply.multi_tensor_applier = lambda function, overflow, lists, *rest: function(overflow, lists, *rest)  # type: ignore[attr-defined]
    kernels = types.ModuleType("amp_C")
    kernels.multi_tensor_adam_capturable = capturable  # type: ignore[attr-defined]
    for name, module in {"apex": types.ModuleType("apex"), "apex.multi_tensor_apply": apply, "amp_C": kernels}.items():
        monkeypatch.setitem(sys.modules, name, module)
    kernel = adam_kernel("apex", torch.device("cuda"))
    monkeypatch.setattr(
        "vatt.engine.optimizer.adam_kernel", lambda name, device: kernel if name == "apex" else adam_kernel(name, device)
    )
    check(OptimizerConfig(epsilon_form=form, kernel="apex"))


def test_what_is_not_there_says_so() -> None:
    with pytest.raises(ConfigError, match="optimizer.kernel: 'apex' runs on a GPU; use 'torch'"):
        adam_kernel("apex", CPU)
    if "amp_C" not in sys.modules:
        with pytest.raises(ConfigError, match="'apex' cannot be imported .* another project"):
            adam_kernel("apex", torch.device("cuda"))
