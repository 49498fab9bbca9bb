"""Compile a recorded launch for a GPU that need not be here, and read from the binary what it will use.

Triton brings the assembler and the disassembler, so all of it works on a machine without CUDA. It cannot in a process whose
Triton interprets (TRITON_INTERPRET): there a kernel is a Python function for good.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vatt.kernels.gpu.launch import Launch
from vatt.kernels.gpu.occupancy import WARP, resident_blocks
from vatt.kernels.gpu.sass import Counts, Usage, counts, functions, usages
from vatt.kernels.gpu.target import Target

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """One binary. products: matrix products in the source as Triton reads it, loops counted once. shared_memory: bytes of a
    block. tensor_columns: of tensor memory, a block (capability 10.0).
    """

    threads: int
    products: int
    shared_memory: int
    tensor_columns: int
    resident_blocks: int
    usage: Usage
    counts: Counts


def key(launch: Launch, target: Target) -> str:
    """The same for launches that Triton compiles to the same binary."""
    kernel = launch.kernel
    parts = (
        target.name,
        kernel.__module__,
        kernel.__name__,
        launch.specialisation(),
        launch.tuning.warps,
        launch.tuning.stages,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def compile_launch(launch: Launch, target: Target) -> Compiled:
    """Compile, disassemble, count. Raises what Triton raises for a kernel that it cannot compile."""
    kernel = launch.kernel
    types, constants, aligned = launch.specialisation()
    names = list(kernel.arg_names)
    place = {name: (names.index(name),) for name in names}
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] for name in names},
        constexprs={place[name]: value for name, value in constants.items()},
        attrs={place[name]: [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": launch.tuning.warps, "num_stages": launch.tuning.stages}
    binary = triton.compile(source, target=GPUTarget("cuda", target.capability, WARP), options=options)
    # A warp-specialised kernel has more threads than the warps asked for; the assembler's input says how many.
    required = re.search(r"\.reqntid (\d+)", binary.asm["ptx"])
    threads = int(required[1]) if required else launch.tuning.warps * WARP
    ((_, usage, found),) = inspect(binary.asm["cubin"])
    shared, columns = int(binary.metadata.shared), int(getattr(binary.metadata, "tmem_size", 0) or 0)
    return Compiled(
        threads=threads,
        products=len(re.findall(r"= tt\.dot\w* ", binary.asm["ttir"])),
        shared_memory=shared,
        tensor_columns=columns,
        resident_blocks=resident_blocks(target, threads, usage.registers, shared, columns),
        usage=usage,
        counts=found,
    )


def inspect(cubin: bytes) -> list[tuple[str, Usage, Counts]]:
    """(name, resources, instructions) of every kernel in a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = usages(_tool("cuobjdump", "-res-usage", file.name))
        listing = _tool("cuobjdump", "-sass", file.name)
    return [(name, usage[name], counts(part)) for name, part in functions(listing)]


def reads_bytes(launch: Launch) -> bool:
    """Whether a launch takes pixels: integers of one byte. (A mask of booleans is no gather.)"""
    return any(
        isinstance(value, Tensor)
        and value.dtype.itemsize == 1
        and not value.dtype.is_floating_point
        and str(value.dtype) != "torch.bool"
        for value in launch.arguments.values()
    )


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    return done.stdout
