"""The plain-PyTorch twin: the same policy as DeepSpeed's engine (see `interface`), nothing sharded, no dependency."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vatt.engine.backend.gradient_sum import GradientSum
from vatt.engine.backend.interface import (
    KeptBuffers,
    StepOutcome,
    check_state,
    poisoned_unless_finite,
    saved_buffers,
    state_shapes,
)
from vatt.engine.config import RunConfig
from vatt.engine.optimizer import Adam, trainable

# Elements of the fp32 staging buffers: gradients are averaged, and bf16 gradients widened for Adam, this many at a time.
STAGING_ELEMENTS = 32 << 20


class PlainBackend:
    """Implements `interface.Backend` on one process or, with gloo or NCCL, on many that each hold everything."""

    def __init__(self, model: nn.Module, config: RunConfig, *, rank: int, world_size: int, device: torch.device):
        self.module = model.to(device)
        self.rank, self.world_size = rank, world_size
        self.low_precision = config.backend.precision == "bf16"
        self.weights = trainable(model)
        # The masters are taken before the cast: they start from every bit of the initialisation or of a loaded table.
        self.masters: dict[str, Tensor] = dict(self.weights)
        if self.low_precision:
            self.masters = {name: weight.detach().clone() for name, weight in self.weights.items()}
            for parameter in model.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
        self.gradients = GradientSum(self.weights.values())
        self.adam = Adam(self.masters.values(), config.optimizer)
        self.buffers = KeptBuffers(model)

    def backward(self, loss: Tensor) -> None:
        """Leave this rank's gradients on the parameters."""
        poisoned_unless_finite(loss).backward()
        self.gradients.add()

    def one_reduction(self) -> AbstractContextManager[None]:
        """Nothing is reduced before `step`."""
        return self.gradients.over_passes()

    @torch.no_grad()
    def step(self, learning_rate: float | Tensor) -> StepOutcome:
        """One guarded Adam update from the gradients' mean over ranks."""
        # ZeRO sees a zero where a parameter took no part; so do we, or the backends' moments would part.
        gradients = [w.grad if w.grad is not None else torch.zeros_like(w) for w in self.weights.values()]
        masters = list(self.masters.values())
        if self.world_size > 1:
            self._average(gradients)
        self.adam.guard(gradients)
        if self.low_precision:
            for bucket in buckets(masters):
                wide = [gradient.float() for gradient in gradients[bucket]]
                self.adam.update(masters[bucket], wide, learning_rate)
            torch._foreach_copy_(list(self.weights.values()), masters)
        else:
            self.adam.update(masters, gradients, learning_rate)
        for weight in self.weights.values():
            weight.grad = None
        self.buffers.settle(self.adam.skipped)
        return StepOutcome(self.adam.gradient_norm, self.adam.skipped)

    def _average(self, gradients: Sequence[Tensor]) -> None:
        """Replace each gradient by its mean over the ranks, summed in fp32."""
        for bucket in buckets(gradients):
            members = gradients[bucket]
            flat = torch.cat([gradient.reshape(-1).float() for gradient in members])
            dist.all_reduce(flat)
            flat /= self.world_size
            means = [mean.view_as(g) for mean, g in zip(flat.split([g.numel() for g in members]), members, strict=True)]
            torch._foreach_copy_(list(members), means)

    @torch.no_grad()
    def gather_state(self) -> dict[str, Tensor] | None:
        """Rank 0 holds everything already: no communication."""
        if self.rank != 0:
            return None
        state = {f"model/{name}": tensor for name, tensor in self._model_tensors().items()}
        for name, master in self.masters.items():
            state[f"adam/m/{name}"], state[f"adam/v/{name}"] = self.adam.moments(master)
        # `copy`, because on CPU the tensors would otherwise go on changing under the caller.
        state = {key: tensor.detach().to("cpu", _saved_dtype(tensor), copy=True) for key, tensor in state.items()}
        return state | {"adam/step": self.adam.updates.to("cpu", torch.int64)}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Each rank reads all of it: no communication."""
        shapes = {name: parameter.shape for name, parameter in self.module.named_parameters()}
        check_state(state, state_shapes(shapes, self.masters, saved_buffers(self.module)))
        for name, tensor in self._model_tensors().items():
            tensor.copy_(state[f"model/{name}"])
        for name, master in self.masters.items():
            for moment, key in zip(self.adam.moments(master), "mv", strict=True):
                moment.copy_(state[f"adam/{key}/{name}"])
            if self.low_precision:
                self.weights[name].copy_(master)
        self.adam.updates.copy_(state["adam/step"])
        self.buffers.keep()

    def _model_tensors(self) -> dict[str, Tensor]:
        """Masters, frozen parameters and buffers by name."""
        return dict(self.module.named_parameters()) | saved_buffers(self.module) | self.masters


def _saved_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.is_floating_point() else tensor.dtype


def buckets(tensors: Sequence[Tensor], limit: int = STAGING_ELEMENTS) -> Iterator[slice]:
    """Consecutive slices of `tensors` of at most `limit` elements each (a larger tensor is alone in its slice)."""
    start = held = 0
    for index, tensor in enumerate(tensors):
        if held and held + tensor.numel() > limit:
            yield slice(start, index)
            start, held = index, 0
        held += tensor.numel()
    if start < len(tensors):
        yield slice(start, len(tensors))
