"""What runs backward and the optimizer step. Three implementations, one meaning: `deepspeed`, `plain` and `sharded`.

Shared policy. In bf16, every floating parameter of the module is a bf16 working copy of an fp32 master, batch norm's
scale and shift included (their buffers and arithmetic stay fp32); gradients come out of backward in bf16, are averaged
over the ranks in fp32, and Adam moves the masters. In fp32 there is one copy of everything. A loss or a gradient that is
not finite on any rank skips the step on every rank: weights, moments, Adam's count and buffers stay as they were.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vatt.engine.config import ConfigError, RunConfig


class StepOutcome(NamedTuple):
    """What a step did, as device tensors: reading them makes the host wait, so read them when logging."""

    gradient_norm: Tensor  # fp32 scalar: norm of the averaged gradient of all parameters, not finite if skipped
    skipped: Tensor  # bool scalar: nothing was changed, because the loss or a gradient was not finite


class Backend(Protocol):
    """Owns the module from its making on; every forward goes through `module`."""

    module: nn.Module

    def backward(self, loss: Tensor) -> None:
        """Gradients of `loss`, a scalar that is the same on every rank.

        Within `one_reduction` it is a part of the step's objective, and may be this rank's own.
        """

    def one_reduction(self) -> AbstractContextManager[None]:
        """All calls of `backward` inside are one step's: their gradients add up here, and are reduced once, at the end.

        (Not gradient accumulation: nothing is divided by the number of calls.) Collective where backward is.
        """

    def step(self, learning_rate: float | Tensor) -> StepOutcome:
        """Average the gradients over the ranks, update the parameters, drop the gradients. Collective."""

    def gather_state(self) -> dict[str, Tensor] | None:
        """All that a resumed run needs, on rank 0, and None elsewhere. Collective.

        CPU copies under names that know neither rank nor backend: "model/<name>" (fp32 masters, frozen parameters and
        buffers), "adam/m/<name>" and "adam/v/<name>" (fp32), "adam/step" (int64 scalar, updates made so far).
        """

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Undo everything since `gather_state` made `state`: its exact inverse. Every rank passes it. Collective.

        Raises ValueError naming the first tensor that is missing, left over or of another shape.
        """


def make_backend(model: nn.Module, config: RunConfig, *, rank: int, world_size: int, device: torch.device) -> Backend:
    """The backend `config.backend.name` names, around `model` (fp32, the same on every rank); the model is moved and cast.

    Raises ConfigError for a batch that the ranks cannot share evenly and for combinations a backend cannot serve.
    """
    if config.batch_size % world_size:
        raise ConfigError(
            f"batch_size: {config.batch_size} clips do not divide over {world_size} ranks; use a multiple of {world_size}"
        )
    if config.backend.name == "deepspeed":
        from vatt.engine.backend.deepspeed import DeepSpeedBackend

        return DeepSpeedBackend(model, config, rank=rank, world_size=world_size, device=device)
    stage = config.backend.zero_stage
    if stage > 1:
        raise ConfigError(
            f"backend.zero_stage: {stage} needs backend.name = 'deepspeed'; "
            "'torch' divides Adam over the ranks (1) or nothing (0)"
        )
    sharded = stage == 1 and world_size > 1
    if sharded and config.backend.cuda_graph:
        raise ConfigError(
            "backend.cuda_graph: weights arrive during the next step when Adam is divided over the ranks, which a recorded "
            "step cannot wait for; set backend.zero_stage = 0"
        )
    if config.backend.compile:
        for stack in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
            for layer in stack:
                layer.compile()
    if sharded:
        from vatt.engine.backend.sharded import ShardedBackend

        return ShardedBackend(model, config, rank=rank, world_size=world_size, device=device)
    from vatt.engine.backend.plain import PlainBackend

    return PlainBackend(model, config, rank=rank, world_size=world_size, device=device)


def poisoned_unless_finite(loss: Tensor) -> Tensor:
    """`loss`, whose gradient is NaN everywhere if it is not finite itself, so that the optimizer's guard sees it."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)


def check_state(state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Raise ValueError unless `state` holds exactly the tensors of `shapes`."""
    remedy = "the state was saved by a run of another model"
    for name, shape in shapes.items():
        if name not in state:
            raise ValueError(f"{name}: missing from the saved state; {remedy}")
        if state[name].shape != shape:
            raise ValueError(f"{name}: saved with shape {tuple(state[name].shape)}, needed {tuple(shape)}; {remedy}")
    for name in state:
        if name not in shapes:
            raise ValueError(f"{name}: in the saved state, unknown to this model; {remedy}")


def state_shapes(parameters: Mapping[str, torch.Size], moving: Mapping[str, object], buffers: Mapping[str, Tensor]) -> dict:
    """Names and shapes of a saved state, from the shapes of all parameters, the trainable ones' names, and the buffers."""
    shapes = {f"model/{name}": shape for name, shape in parameters.items()}
    shapes |= {f"model/{name}": buffer.shape for name, buffer in buffers.items()}
    shapes |= {f"adam/{moment}/{name}": parameters[name] for moment in "mv" for name in moving}
    return shapes | {"adam/step": torch.Size()}


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The model's persistent buffers by name (the same objects, not copies)."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in parameters}


class KeptBuffers:
    """Undoes what the forward of a skipped step did to the model's buffers: a NaN in batch norm's means would stay."""

    def __init__(self, model: nn.Module):
        self.buffers = list(saved_buffers(model).values())
        self.keep()

    @torch.no_grad()
    def keep(self) -> None:
        """Take the buffers as they are for good ones."""
        self.kept = [buffer.clone() for buffer in self.buffers]

    @torch.no_grad()
    def settle(self, skipped: Tensor) -> None:
        """End of a step: bring the kept values back if it was skipped, else keep the new ones. Does not wait."""
        for buffer, kept in zip(self.buffers, self.kept, strict=True):
            kept.copy_(torch.where(skipped, kept, buffer))
            buffer.copy_(kept)
