"""How many blocks of a compiled kernel a multiprocessor holds at once."""

from __future__ import annotations

from vatt.kernels.gpu.target import Target

WARP = 32
# CUDA's occupancy rules, the same for capabilities 8.0, 9.0 and 10.0: registers are given to a warp in units, out of the
# file of one of four partitions; shared memory is given in units, and the driver keeps some of it in every block.
REGISTER_UNIT, PARTITIONS = 256, 4
SHARED_UNIT, SHARED_RESERVED = 128, 1024
TENSOR_COLUMNS_UNIT = 32


def resident_blocks(target: Target, threads: int, registers: int, shared_memory: int, tensor_columns: int = 0) -> int:
    """Blocks a multiprocessor of `target` holds at once; 0 where a single one does not fit.

    threads: of a block. registers: of a thread. shared_memory: bytes of a block. tensor_columns: of tensor memory, a block.
    """
    if threads < 1:
        raise ValueError(f"threads: {threads}; a block has at least one")
    if shared_memory > target.shared_memory:
        return 0
    warps = _up(threads, WARP) // WARP
    limits = [target.blocks, target.threads // (warps * WARP)]
    if registers:
        of_a_warp = _up(registers * WARP, REGISTER_UNIT)
        limits.append(target.registers // PARTITIONS // of_a_warp * PARTITIONS // warps)
    limits.append(target.multiprocessor_memory // _up(shared_memory + SHARED_RESERVED, SHARED_UNIT))
    if tensor_columns:
        limits.append(target.tensor_columns // _up(tensor_columns, TENSOR_COLUMNS_UNIT))
    return min(limits)


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
