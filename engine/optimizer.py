"""Adam with a guard that lives on the device, and the learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vatt.engine.adam_kernels import adam_kernel
from vatt.engine.config import OptimizerConfig

# Elements whose squares are added up in one go on a CPU.
CHAIN = 1 << 14


def learning_rate(step: int, config: OptimizerConfig, steps: int) -> float:
    """Learning rate of step `step` (from 0) of a run of `steps` steps.

    Linear warm-up from 0 at step 0 to `learning_rate` at step `warmup`, then, with p the fraction of the rest done,

        quarter_cosine  final + (peak - final) cos(pi/2 p)          paper, section 4.1
        half_cosine     final + (peak - final) (1 + cos(pi p)) / 2  released code
        constant        peak

    and the decay's end from step `steps` on, where the released code divides by zero and returns NaN.
    """
    peak, final = config.learning_rate, config.final_learning_rate
    if step < config.warmup and step < steps:
        return peak * step / config.warmup
    if config.schedule == "constant":
        return peak
    done = 1.0 if step >= steps else (step - config.warmup) / (steps - config.warmup)
    if config.schedule == "quarter_cosine":
        return final + (peak - final) * math.cos(0.5 * math.pi * done)
    return final + (peak - final) * 0.5 * (1.0 + math.cos(math.pi * done))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters the optimizer moves, by name: all that are not frozen, in the model's order. None is decayed."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class Adam:
    """Adam (Kingma and Ba, 2015) that leaves weights, moments and step count alone when a gradient is not finite.

    With m and v the moments after the update and t the number of updates so far, the two forms differ in epsilon only:

        pytorch     w -= lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)
        tensorflow  w -= lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps)

    so the second is the first with eps / sqrt(1 - b2^t).

    The guard never asks the host: the gradient's norm is taken on the device in fp32, and the update reads it there. A
    gradient whose norm overflows fp32 counts as not finite. With `partitioned`, each rank holds other elements (ZeRO), and
    the squared norm is summed over the ranks: a NaN anywhere then reaches all of them in that one number. Every call of
    `step` makes its own decision, so all parameters must be updated by one call.

    It has the attributes of a torch.optim.Optimizer (`param_groups` with `lr`, `state`, `step`, `zero_grad`) but is none:
    making one imports torch's compiler, which takes longer (1.7 s) than the first steps of a small run.

    After `step` or `guard`: `gradient_norm` (fp32 scalar) and `skipped` (bool scalar), both on the device.
    """

    def __init__(self, parameters: Iterable[Tensor], config: OptimizerConfig, *, partitioned: bool = False):
        self.config = config
        self.partitioned = partitioned
        self.param_groups: list[dict[str, Any]] = [{"params": list(parameters), "lr": config.learning_rate}]
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        first = self.param_groups[0]["params"][0]
        self.kernel = adam_kernel(config.kernel, first.device)
        self.updates = torch.zeros((), dtype=torch.float32, device=first.device)  # t; exact to 2^24
        self.gradient_norm = torch.zeros((), dtype=torch.float32, device=first.device)
        self.skipped = torch.zeros((), dtype=torch.bool, device=first.device)

    def moments(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """First and second moment of a parameter; zeros until its first update."""
        if parameter not in self.state:
            self.state[parameter] = {moment: torch.zeros_like(parameter, requires_grad=False) for moment in "mv"}
        state = self.state[parameter]
        return state["m"], state["v"]

    @torch.no_grad()
    def guard(self, gradients: list[Tensor]) -> None:
        """Measure the gradient, decide whether the step is taken, and count it if so."""
        if self.updates.device.type == "cpu":
            square = torch.cat([_chained_norms(gradient.reshape(-1)) for gradient in gradients]).square().sum()
        else:
            square = torch.stack(torch._foreach_norm(gradients, 2.0, dtype=torch.float32)).square().sum()
        if self.partitioned and dist.get_world_size() > 1:
            dist.all_reduce(square)
        self.gradient_norm = square.sqrt()
        self.skipped = ~torch.isfinite(square)
        self.updates += ~self.skipped

    @torch.no_grad()
    def update(self, parameters: list[Tensor], gradients: list[Tensor], learning_rate: float | Tensor) -> None:
        """Move fp32 `parameters` by fp32 `gradients`, unless the last `guard` said no.

        The rate may be an fp32 scalar on the device, which a recorded step reads anew at each replay.
        """
        rate: float | Tensor = learning_rate
        updates = self.updates
        if self.config.epsilon_form == "tensorflow":
            # The fused kernel knows PyTorch's form only. At t = infinity its two bias corrections are 1 and the forms
            # agree, so what is left of TensorFlow's goes into the rate.
            t, config = updates.double(), self.config
            rate = (learning_rate * torch.sqrt(1.0 - config.beta2**t) / (1.0 - config.beta1**t)).float()
            updates = torch.full_like(updates, math.inf)
        moments = [self.moments(parameter) for parameter in parameters]
        first, second = [m for m, _ in moments], [v for _, v in moments]
        self.kernel(parameters, gradients, first, second, updates, rate, self.config, self.skipped)

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient, at the rate in `param_groups`."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in parameters]
        self.guard(gradients)
        self.update(parameters, gradients, self.param_groups[0]["lr"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


def _chained_norms(flat: Tensor) -> Tensor:
    """fp32 norms of pieces of at most CHAIN elements.

    The CPU's norm adds up one long fp32 chain: 3e-5 off at 4e5 elements, and growing. CUDA's is a tree.
    """
    whole = flat.numel() // CHAIN * CHAIN
    norms = torch.linalg.vector_norm(flat[:whole].view(-1, CHAIN), dim=1, dtype=torch.float32)
    if whole == flat.numel():
        return norms
    return torch.cat([norms, torch.linalg.vector_norm(flat[whole:], dtype=torch.float32)[None]])
