"""The fused Adam update by name: torch's own, apex's, DeepSpeed's. None but torch's is required.

Each takes lists of fp32 tensors (parameters, gradients, first and second moments), the number of updates so far as an fp32
scalar on the device (infinity: no bias correction), the rate (a number or an fp32 scalar), and `skipped`, a bool scalar on
the device: nothing may change where it is true.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any, Protocol

import torch
from torch import Tensor

from vatt.engine.config import ConfigError, OptimizerConfig


class AdamKernel(Protocol):
    """Moves the parameters and their moments by one step of Adam in PyTorch's form (see `optimizer.Adam`)."""

    def __call__(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor],
        first: list[Tensor],
        second: list[Tensor],
        updates: Tensor,
        rate: float | Tensor,
        config: OptimizerConfig,
        skipped: Tensor,
    ) -> None: ...


def adam_kernel(name: str, device: torch.device) -> AdamKernel:
    """The kernel called `name` for tensors on `device`. Raises ConfigError, with the remedy, for one that is not there."""
    if name == "torch":
        return _torch
    if name == "apex":
        return _apex(device)
    return _deepspeed(device)


def _torch(parameters, gradients, first, second, updates, rate, config, skipped):  # type: ignore[no-untyped-def]
    torch._fused_adam_(
        parameters,
        gradients,
        first,
        second,
        [],
        [updates] * len(parameters),
        lr=rate,
        beta1=config.beta1,
        beta2=config.beta2,
        weight_decay=0.0,
        eps=config.epsilon,
        amsgrad=False,
        maximize=False,
        grad_scale=None,
        found_inf=skipped.float(),
    )


def _apex(device: torch.device) -> AdamKernel:
    """apex's kernel in its form for CUDA graphs, which reads rate, count and the flag to do nothing on the device."""
    if device.type != "cuda":
        raise ConfigError("optimizer.kernel: 'apex' runs on a GPU; use 'torch'")
    try:
        import amp_C  # type: ignore[import-not-found]
        from apex.multi_tensor_apply import multi_tensor_applier  # type: ignore[import-not-found]
    except ImportError as error:
        raise ConfigError(
            f"optimizer.kernel: 'apex' cannot be imported ({error}); build NVIDIA's apex from source with its CUDA extensions "
            "(PyPI's package of that name is another project), or use 'torch'"
        ) from error

    def update(parameters, gradients, first, second, updates, rate, config, skipped):  # type: ignore[no-untyped-def]
        device = updates.device
        corrected = bool(config.epsilon_form == "pytorch")
        multi_tensor_applier(
            amp_C.multi_tensor_adam_capturable,
            skipped.int().reshape(1),
            [gradients, parameters, first, second],
            rate if isinstance(rate, Tensor) else torch.full((), rate, device=device),
            config.beta1,
            config.beta2,
            config.epsilon,
            updates.int() if corrected else torch.ones((), dtype=torch.int32, device=device),
            1,  # Adam with decoupled decay: with a decay of 0, Adam
            int(corrected),
            0.0,
            torch.ones((), device=device),
        )

    return update


def _deepspeed(device: torch.device) -> AdamKernel:
    """DeepSpeed's kernels, compiled by it on first use. They take count and rate as numbers, so each step reads the device."""
    from vatt.engine.backend.deepspeed import adam_library

    library = adam_library(device)
    logging.getLogger("vatt").warning("optimizer.kernel 'deepspeed' makes the host wait for the device once a step")
    return functools.partial(_update_on_cpu if device.type == "cpu" else _update_on_gpu, library)


def _numbers(updates: Tensor, rate: float | Tensor, config: OptimizerConfig) -> tuple[int, float, bool]:
    """(count, rate, whether moments are bias-corrected) as the host's numbers."""
    count = float(updates)
    return (1, float(rate), False) if math.isinf(count) else (int(count), float(rate), True)


def _update_on_gpu(library: Any, parameters, gradients, first, second, updates, rate, config, skipped):  # type: ignore[no-untyped-def]
    if bool(skipped):
        return
    count, number, corrected = _numbers(updates, rate, config)
    flag = torch.zeros(1, dtype=torch.int32, device=updates.device)
    lists = [gradients, parameters, first, second]
    betas = config.beta1, config.beta2
    library.multi_tensor_adam(2048 * 32, flag, lists, number, *betas, config.epsilon, count, 1, int(corrected), 0.0)


def _update_on_cpu(library: Any, parameters, gradients, first, second, updates, rate, config, skipped):  # type: ignore[no-untyped-def]
    if bool(skipped):
        return
    count, number, corrected = _numbers(updates, rate, config)
    key = 1 << 24  # DeepSpeed's own optimizers count theirs from 0
    library.create_adam(key, number, config.beta1, config.beta2, config.epsilon, 0.0, True, False)
    try:
        for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
            betas = config.beta1, config.beta2
            flat = (t.detach().view(-1) for t in (p, g, m, v))
            library.adam_update(key, count, number, *betas, config.epsilon, 0.0, corrected, *flat)
    finally:
        library.destroy_adam(key)
