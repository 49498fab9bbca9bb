"""What every kernel promises, in one table that the tests, the benches and the offline certificate all read.

A kernel's row (`rows/<kernel>.py`, one `ROW` each) says what the op is, what specifies it, what PyTorch would do instead,
on which small cases it is tried, and at which real shapes it is timed, counted and compiled. So a bench cannot time a
shape whose kind the tests never saw, and the certificate compiles the launches that training makes.

The error budget: truth is the reference in fp64. A kernel may be at most twice as wrong as PyTorch in the same dtype, plus
one unit in the last place of the largest true element (which a result rounded once may be off by).
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]  # of the op, by name
# (dtype, device) -> arguments; `device` may be "meta". Values are drawn in fp64 and rounded to dtype once, so that every
# dtype's run has a truth of its own.
Make = Callable[[torch.dtype, torch.device], Arguments]

NAMES = ("bias_gelu", "add_layer_norm", "attention", "drop_tokens", "contrastive", "patch_project", "dropout")


@dataclass(frozen=True)
class Case:
    """A small input for the tests: an odd length, one row, a strided tensor, a mask."""

    name: str
    make: Make


@dataclass(frozen=True)
class Shape:
    """A real shape of VATT. Bytes: the least that has to be read and written; FLOPs: multiply-adds count 2.

    divided: the same shape with that many times fewer clips, for timing on a CPU (see `divisible`).
    """

    name: str
    make: Make
    forward_bytes: int
    backward_bytes: int
    forward_flops: int = 0
    backward_flops: int = 0
    divided: Callable[[int], Shape] | None = None


def divisible(*counts: str) -> Callable[[Callable[..., Shape]], Callable[..., Shape]]:
    """For a function that makes shapes: `counts` are its parameters that grow with the number of clips (0 stays 0)."""

    def decorate(make_shape: Callable[..., Shape]) -> Callable[..., Shape]:
        signature = inspect.signature(make_shape)

        @functools.wraps(make_shape)
        def made(*arguments: Any, **named: Any) -> Shape:
            given = signature.bind(*arguments, **named)

            def divided(factor: int) -> Shape:
                fewer = signature.bind(*given.args, **given.kwargs)
                fewer.arguments |= {name: max(1, n // factor) for name, n in given.arguments.items() if name in counts and n}
                return made(*fewer.args, **fewer.kwargs)

            return replace(make_shape(*arguments, **named), divided=divided)

        return made

    return decorate


@dataclass(frozen=True)
class Kernel:
    """One row of the table.

    op: the public function; takes `implementation`. reference: the specification, same arguments. eager: PyTorch's own
    functions in the tensors' dtype. differentiable: arguments that get gradients. launches: runs the forward and backward
    GPU code on the arguments of a shape, for `gpu.launch.recording`. matrix: uses the tensor cores.
    """

    name: str
    op: Callable[..., Any]
    reference: Callable[..., Any]
    eager: Callable[..., Any]
    differentiable: Sequence[str]
    cases: Sequence[Case]
    shapes: Sequence[Shape]
    launches: Callable[..., None]
    matrix: bool = False
    implementations: Sequence[str] = ("native", "interpreter")
    options: Mapping[str, Any] = field(default_factory=dict)


def table() -> list[Kernel]:
    """Every kernel's row, in the order of NAMES."""
    return [row(name) for name in NAMES]


def row(name: str) -> Kernel:
    """One kernel's row. Raises ValueError for a name that is not in NAMES."""
    if name not in NAMES:
        raise ValueError(f"{name!r} is not a kernel; there are {', '.join(NAMES)}")
    kernel: Kernel = importlib.import_module(f"vatt.kernels.rows.{name}").ROW
    return kernel


def drawn(shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int = 0, spread: float = 1.0) -> Tensor:
    """A normal tensor, the same on every device; empty on meta."""
    if device.type == "meta":
        return torch.empty(*shape, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * spread).to(dtype).to(device)


def gradients(function: Callable[..., Any], arguments: Arguments, names: Sequence[str], **options: Any) -> dict[str, Tensor]:
    """Outputs ("out", or "out0", "out1", …) and the gradients ("d" + name) of a fixed cotangent, detached."""
    inputs = {
        # A view of a detached leaf keeps the strides a case chose.
        name: value.detach().requires_grad_() if name in names and isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    wanted = [name for name in names if isinstance(inputs.get(name), Tensor)]
    output = function(**inputs, **options)
    outputs = [output] if isinstance(output, Tensor) else [o for o in output if isinstance(o, Tensor)]
    found = {"out" if len(outputs) == 1 else f"out{i}": o.detach() for i, o in enumerate(outputs)}
    moving = [o for o in outputs if o.requires_grad]
    if wanted and moving:
        # The same cotangent for every dtype that is compared: drawn in fp64, exact in bf16 and fp16 alike.
        cotangents = [
            drawn(o.shape, torch.float64, torch.device("cpu"), 99 + i).bfloat16().to(o.dtype).to(o.device)
            for i, o in enumerate(moving)
        ]
        results = torch.autograd.grad(moving, [inputs[name] for name in wanted], cotangents, allow_unused=True)
        found |= {f"d{name}": g.detach() for name, g in zip(wanted, results, strict=True) if g is not None}
    return found


def widened(arguments: Arguments) -> Arguments:
    """The same arguments with every floating tensor in fp64: what the truth is computed from."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


@dataclass(frozen=True)
class Error:
    """How wrong one output is, how wrong PyTorch is, and the budget; all are largest absolute differences from the truth."""

    output: str
    kernel: float
    eager: float
    budget: float

    @property
    def within(self) -> bool:
        """NaN is not: every comparison with it is false."""
        return self.kernel <= self.budget


def errors(kernel: Kernel, case: Case, dtype: torch.dtype, device: torch.device, implementation: str) -> list[Error]:
    """Every output and gradient of one case against its budget."""
    arguments = case.make(dtype, device)
    names = kernel.differentiable
    ours = gradients(kernel.op, arguments, names, implementation=implementation)
    eager = gradients(kernel.eager, arguments, names)
    truth = gradients(kernel.reference, widened(arguments), names)
    if not ours.keys() == eager.keys() == truth.keys():
        raise AssertionError(f"{kernel.name}: {sorted(ours)} of the kernel, {sorted(eager)} eager, {sorted(truth)} true")
    return [error(name, ours[name], eager[name], true) for name, true in truth.items()]


def error(name: str, ours: Tensor, eager: Tensor, truth: Tensor) -> Error:
    """One tensor against its budget."""
    if ours.shape != truth.shape or ours.dtype != eager.dtype:
        raise AssertionError(f"{name}: {ours.dtype} {tuple(ours.shape)}, expected {eager.dtype} {tuple(truth.shape)}")
    of_kernel, of_eager = largest(ours.double() - truth), largest(eager.double() - truth)
    scale = largest(truth) if ours.is_floating_point() else 0.0
    rounding = torch.finfo(ours.dtype).eps * scale if ours.is_floating_point() else 0.0
    return Error(name, of_kernel, of_eager, 2 * of_eager + rounding)


def largest(x: Tensor) -> float:
    return float(x.double().abs().max()) if x.numel() else 0.0
