"""The plain backend with Adam divided over the ranks: ZeRO's first stage without its engine.

Every rank holds all working weights, and of each bucket of parameters one slice of the fp32 masters and moments. A step
moves the bytes an all-reduce would: each rank receives the mean gradient of its slices (reduce-scatter), updates them, and
the new working weights go to everyone (all-gather). Nobody waits for the gathers at the end of the step: they run under
the next forward, and a module waits for its own weights when it is entered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vatt.engine.backend.gradient_sum import GradientSum
from vatt.engine.backend.interface import KeptBuffers, StepOutcome, check_state, saved_buffers, state_shapes
from vatt.engine.backend.plain import PlainBackend
from vatt.engine.config import RunConfig
from vatt.engine.optimizer import Adam, trainable

# Newer names of the same two collectives; the older ones warn where both exist.
_reduce_scatter: Callable[..., object] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather: Callable[..., dist.Work] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Bucket:
    """Parameters that are reduced, updated and gathered together, one after the other in a flat tensor.

    working: all of them, in the working dtype; the parameters are views of it. master: this rank's slice in fp32. The flat
    length is padded to a multiple of the ranks; the padding stays zero.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], dtype: torch.dtype, rank: int, world_size: int):
        self.parameters = dict(parameters)
        self.rank, self.world_size = rank, world_size
        elements = sum(parameter.numel() for parameter in self.parameters.values())
        self.slice = -(-elements // world_size)
        exact = self.flattened({name: parameter.detach() for name, parameter in self.parameters.items()}, torch.float32)
        self.master = exact.narrow(0, rank * self.slice, self.slice).clone()
        self.working = exact.to(dtype)
        for name, piece in self.pieces(self.working):
            self.parameters[name].data = piece
        self.arriving: dist.Work | None = None

    def flattened(self, tensors: Mapping[str, Tensor | None], dtype: torch.dtype) -> Tensor:
        """One tensor a parameter, end to end; zeros for None and in the padding."""
        first = next(iter(self.parameters.values()))
        flat = torch.zeros(self.slice * self.world_size, dtype=dtype, device=first.device)
        for name, piece in self.pieces(flat):
            tensor = tensors[name]
            if tensor is not None:
                piece.copy_(tensor)
        return flat

    def pieces(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Views of a flat tensor, one a parameter."""
        start = 0
        for name, parameter in self.parameters.items():
            yield name, flat[start : start + parameter.numel()].view(parameter.shape)
            start += parameter.numel()

    def mean_gradient(self) -> Tensor:
        """fp32 (slice,): this rank's part of the gradients' mean over the ranks. Collective; drops the gradients."""
        flat = self.flattened({name: parameter.grad for name, parameter in self.parameters.items()}, torch.float32)
        for parameter in self.parameters.values():
            parameter.grad = None
        mine = torch.empty_like(self.master)
        _reduce_scatter(mine, flat)
        return mine.div_(self.world_size)

    def send(self) -> None:
        """Start the gather of everybody's new slices into the working weights. Collective."""
        self.arriving = _all_gather(self.working, self.master.to(self.working.dtype), async_op=True)

    def wait(self) -> None:
        """Until the working weights are there (on a GPU: until the stream may count on it)."""
        if self.arriving is not None:
            self.arriving.wait()
            self.arriving = None

    def whole(self, mine: Tensor) -> dict[str, Tensor]:
        """Everybody's slices of an fp32 quantity, by parameter, on the CPU. Collective."""
        flat = torch.empty_like(self.working, dtype=torch.float32)
        _all_gather(flat, mine)
        return {name: piece.detach().to("cpu", copy=True) for name, piece in self.pieces(flat)}

    def own(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """This rank's slice of tensors given by parameter."""
        return self.flattened(tensors, torch.float32).narrow(0, self.rank * self.slice, self.slice)


class ShardedBackend(PlainBackend):
    """Implements `interface.Backend` on several ranks; `backward` is the plain backend's."""

    def __init__(self, model: nn.Module, config: RunConfig, *, rank: int, world_size: int, device: torch.device):
        self.module = model.to(device)
        self.rank, self.world_size = rank, world_size
        self.low_precision = config.backend.precision == "bf16"
        self.weights = trainable(model)
        dtype = torch.bfloat16 if self.low_precision else torch.float32
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        self.buckets: list[Bucket] = []
        names = {parameter: name for name, parameter in self.weights.items()}
        for modules, parameters in units(model):
            held = {names[parameter]: parameter for parameter in parameters if parameter in names}
            if held:
                bucket = Bucket(held, dtype, rank, world_size)
                self.buckets.append(bucket)
                for module in modules:
                    module.register_forward_pre_hook(lambda _, __, bucket=bucket: bucket.wait())
        self.gradients = GradientSum(self.weights.values())
        self.adam = Adam([bucket.master for bucket in self.buckets], config.optimizer, partitioned=True)
        self.buffers = KeptBuffers(model)

    @torch.no_grad()
    def step(self, learning_rate: float | Tensor) -> StepOutcome:
        """One guarded Adam update of this rank's slices, from the gradients' mean over ranks."""
        gradients = [bucket.mean_gradient() for bucket in self.buckets]
        self.adam.guard(gradients)
        self.adam.update([bucket.master for bucket in self.buckets], gradients, learning_rate)
        for bucket in self.buckets:
            bucket.send()
        self.buffers.settle(self.adam.skipped)
        return StepOutcome(self.adam.gradient_norm, self.adam.skipped)

    @torch.no_grad()
    def gather_state(self) -> dict[str, Tensor] | None:
        """One bucket at a time goes to every rank; rank 0 keeps it."""
        state: dict[str, Tensor] = {}
        for bucket in self.buckets:
            bucket.wait()
            moments = self.adam.moments(bucket.master)
            for key, mine in (("model", bucket.master), ("adam/m", moments[0]), ("adam/v", moments[1])):
                whole = bucket.whole(mine)
                if self.rank == 0:
                    state |= {f"{key}/{name}": tensor for name, tensor in whole.items()}
        if self.rank != 0:
            return None
        for name, tensor in self._unmoved().items():
            saved = torch.float32 if tensor.is_floating_point() else tensor.dtype
            state[f"model/{name}"] = tensor.detach().to("cpu", saved, copy=True)
        return state | {"adam/step": self.adam.updates.to("cpu", torch.int64)}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Each rank reads all of it and keeps its slices: no communication."""
        shapes = {name: parameter.shape for name, parameter in self.module.named_parameters()}
        check_state(state, state_shapes(shapes, self.weights, saved_buffers(self.module)))
        for bucket in self.buckets:
            bucket.wait()
            for key, mine in zip(
                ("model", "adam/m", "adam/v"), (bucket.master, *self.adam.moments(bucket.master)), strict=True
            ):
                mine.copy_(bucket.own({name: state[f"{key}/{name}"] for name in bucket.parameters}))
            for name, piece in bucket.pieces(bucket.working):
                piece.copy_(state[f"model/{name}"])
        for name, tensor in self._unmoved().items():
            tensor.copy_(state[f"model/{name}"])
        self.adam.updates.copy_(state["adam/step"])
        self.buffers.keep()

    def _unmoved(self) -> dict[str, Tensor]:
        """Frozen parameters and buffers by name: every rank holds them whole."""
        frozen = {name: p for name, p in self.module.named_parameters() if name not in self.weights}
        return frozen | saved_buffers(self.module)


def units(model: nn.Module) -> Iterator[tuple[list[nn.Module], list[nn.Parameter]]]:
    """What is gathered together, as (modules that wait for it when they are entered, its parameters).

    Each layer of a stack (an element of a ModuleList) is a unit. What else a top-level child holds is another; and what the
    model itself holds is one more. Every module of a unit waits for all of it, not only the outermost: some children are
    used by their parts only, and a layer's first norm is applied before the layer is entered.
    """
    yield [model], list(model.parameters(recurse=False))
    for child in model.children():
        layers = [layer for stack in child.modules() if isinstance(stack, nn.ModuleList) for layer in stack]
        inside = {id(module) for layer in layers for module in layer.modules()}
        rest = [module for module in child.modules() if id(module) not in inside]
        yield rest, [parameter for module in rest for parameter in module.parameters(recurse=False)]
        for layer in layers:
            yield list(layer.modules()), list(layer.parameters())
