"""What one training step asks of a GPU, counted operator by operator on any machine: FLOPs, bytes, launches.

The model runs forward and backward on meta tensors, which have shapes and no memory, and take the GPU's way through every op
(`vatt.kernels.implementation`). Each operator that reaches the device is a row: its FLOPs, and the bytes of its operands and
results, each counted once; that is the least it moves when nothing stays in a cache from one kernel to the next. Two closed
forms check the count (tests/profile/test_counted_step.py): the matrix products against `flops`, and the bytes of a block
against what its tensors are on paper.

The roofline time of a step is the sum over operators of whichever ceiling binds each. It leaves out launches that the host
cannot hide, and waves of blocks that do not fill the GPU; so it is a bound, not a prediction.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vatt.engine.config import RunConfig
from vatt.engine.loss import contrastive_losses
from vatt.engine.meta import shapes_only
from vatt.engine.profile.roofline import Ceiling
from vatt.engine.randomness import Draws
from vatt.kernels.gpu.launch import recording
from vatt.kernels.gpu.target import TARGETS

# Bytes of Adam a parameter: fp32 master and two moments read and written, gradient read, bf16 weight written.
ADAM_BYTES = 3 * 8 + 2 + 2
# Operators that make a view, or memory, and launch nothing.
FREE = {
    "aten.view", "aten._unsafe_view", "aten.t", "aten.transpose", "aten.detach", "aten.select", "aten.slice", "aten.expand",
    "aten.permute", "aten.unsqueeze", "aten.squeeze", "aten.unbind", "aten.split", "aten.alias", "aten.unfold",
    "aten.empty", "aten.empty_like", "aten.new_empty", "aten.empty_strided", "aten.promote_types", "aten.is_same_size",
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """All calls of one operator in a step."""

    operator: str
    calls: int = 0
    launches: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0  # under the ceiling that was given

    def plus(self, flops: float, size: float, seconds: float, launches: int = 1) -> Work:
        """With one more call."""
        return replace(
            self,
            calls=self.calls + 1,
            launches=self.launches + launches,
            flops=self.flops + flops,
            bytes=self.bytes + size,
            seconds=self.seconds + seconds,
        )


def counted_step(config: RunConfig, ceiling: Ceiling) -> list[Work]:
    """Rows of one step of `config.batch_size` clips on one GPU in bf16, slowest first; Adam is the row "adam".

    launches: an operator of PyTorch's is taken to be one kernel (a sum over much may be two); of ours, the wrapper is run on
    the meta tensors, and its Triton launches and PyTorch operators are counted.
    """
    model, batch = shapes_only(config, torch.bfloat16)
    with torch.device("meta"), _Counting(ceiling) as counting:
        space = model(batch, Draws.at(config.seed, 0, batch.sample_id))
        contrastive_losses(space, config.loss).total.backward()
    elements = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    adam = Work("adam").plus(0.0, ADAM_BYTES * elements, ceiling.seconds(ADAM_BYTES * elements, 0.0))
    return sorted([*counting.works.values(), adam], key=lambda work: -work.seconds)


def totals(works: Iterable[Work]) -> Work:
    """One row for all."""
    works = list(works)
    sums = {name: sum(getattr(work, name) for work in works) for name in ("calls", "launches", "flops", "bytes", "seconds")}
    return Work("step", **sums)


class _Counting(TorchDispatchMode):
    """Adds up what passes through the dispatcher."""

    def __init__(self, ceiling: Ceiling) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry  # imports Triton

        self.ceiling, self.formulas = ceiling, flop_registry
        self.works: dict[str, Work] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func).rpartition(".")[0]
        if name in FREE:
            return out
        flops, size = self._flops(func, name, args, out), float(_bytes(name, args, kwargs, out))
        launches = _launches_inside(name, args) if name.startswith("vatt.") else 1
        work = self.works.get(name, Work(name))
        self.works[name] = work.plus(flops, size, self.ceiling.seconds(size, flops), launches)
        return out

    def _flops(self, func: Any, name: str, args: Any, out: Any) -> float:
        """Of PyTorch's products by its own formulas, of ours by those below."""
        formula = self.formulas.get(getattr(func, "overloadpacket", func)) if name.startswith("aten.") else None
        return float(formula(*args, out_val=out)) if formula else _flops(name, args, out)


class _CountingOperators(TorchDispatchMode):
    """How many operators that launch something pass by."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(func).rpartition(".")[0] not in FREE
        return func(*args, **(kwargs or {}))


def _launches_inside(name: str, args: Any) -> int:
    """Of one call of an op of ours on meta tensors: what its GPU wrapper launches."""
    wrapper = OPDEFS[name.replace(".", "::")]._init_fn
    with recording(TARGETS["sm_90"]) as launches, _CountingOperators() as operators:
        wrapper(*args)
    return len(launches) + operators.count


def _bytes(name: str, args: Any, kwargs: Any, out: Any) -> int:
    """Of every distinct tensor read or written; of a patch projection, only the patches that are read."""
    tensors = {id(t): t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)}
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    if name.startswith("vatt.patch_project"):
        signal, index = (args[0], args[1]) if name == "vatt.patch_project" else (args[1], args[2])
        patch, grid = (args[6], args[7]) if name == "vatt.patch_project" else (args[3], args[4])
        kept = math.prod(grid) if index is None else index.shape[1]
        channels = signal.shape[2] if signal.dim() == 5 else 1
        read = signal.shape[0] * kept * channels * math.prod(patch)
        total += (read - signal.numel()) * signal.element_size()
    return total


def _flops(name: str, args: Any, out: Any) -> float:
    """Of an op of ours that multiplies, multiply-adds as 2; of the others 0."""
    if name in ("vatt.attention", "vatt.attention_backward"):
        qkv = args[0] if name == "vatt.attention" else args[1]
        B, N, _, H, D = qkv.shape
        return (4.0 if name == "vatt.attention" else 10.0) * B * H * N * N * D
    if name == "vatt.patch_project":
        return 2.0 * out.shape[0] * (out.shape[1] - 1) * args[2].numel()
    if name == "vatt.patch_project_backward":
        return 2.0 * args[0].shape[0] * (args[0].shape[1] - 1) * out[0].numel()
    if name in ("vatt.contrastive", "vatt.contrastive_backward"):
        video, other = (args[0], args[1]) if name == "vatt.contrastive" else (args[1], args[2])
        # Backward makes the logits again, and both gradients from them.
        return (2.0 if name == "vatt.contrastive" else 6.0) * video.numel() * other.shape[0]
    return 0.0
