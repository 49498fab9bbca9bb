"""What a compiled kernel is made of, read from the listing of its machine code (SASS) and of its resources."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

# "/*0a40*/  @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;" -> LDG.E.128
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)", re.MULTILINE)
_FUNCTION = re.compile(r"^\s*Function : (\S+)", re.MULTILINE)
_USAGE = re.compile(r"^\s*Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", re.MULTILINE)
# The tensor cores' instructions: of a warp (Ampere on), of a warp group (Hopper), of a block (datacentre Blackwell).
_MMA = {"HMMA", "IMMA", "QMMA", "OMMA", "DMMA"}
_WGMMA = {"HGMMA", "IGMMA", "QGMMA"}
_TCGEN05 = re.compile(r"UTC\w*MMA")


@dataclass(frozen=True)
class Usage:
    """Registers and stack of a thread (bytes), static shared memory of a block (bytes), local memory of a thread (bytes)."""

    registers: int
    stack: int
    shared: int
    local: int


@dataclass(frozen=True)
class Counts:
    """Instructions of a kernel, as they stand in the listing: one in a loop counts once.

    spills: to and from local memory, where registers ran out. loads_16B: from global memory, 16 bytes a thread or more, into
    registers or (asynchronously) into shared memory. loads_narrow: one byte a thread. loads_bulk: whole tiles, by the tensor
    memory accelerator. atomics: on global memory.
    """

    instructions: int
    spills: int
    mma: int
    wgmma: int
    tcgen05: int
    loads_16B: int
    loads_narrow: int
    loads_bulk: int
    atomics: int


def counts(listing: str) -> Counts:
    """Count one function's instructions. Raises ValueError where there are none: another format, or an empty listing."""
    found = [name.split(".") for name in _INSTRUCTION.findall(listing)]
    if not found:
        raise ValueError("no instruction in the listing")

    def count(names: set[str], widths: set[str] | None = None) -> int:
        return sum(words[0] in names and (widths is None or bool(widths.intersection(words))) for words in found)

    return Counts(
        instructions=len(found),
        spills=count({"LDL", "STL"}),
        mma=count(_MMA),
        wgmma=count(_WGMMA),
        tcgen05=sum(bool(_TCGEN05.fullmatch(words[0])) for words in found),
        loads_16B=count({"LDG", "LD", "LDGSTS"}, {"128", "256"}),
        loads_narrow=count({"LDG", "LD"}, {"U8", "S8"}),
        loads_bulk=count({"UTMALDG", "UBLKCP"}),
        atomics=count({"ATOM", "ATOMG", "RED", "REDG", "UREDGR"}),
    )


def functions(listing: str) -> Iterator[tuple[str, str]]:
    """(name, its part) of every function of what `cuobjdump -sass` prints."""
    parts = _FUNCTION.split(listing)
    yield from zip(parts[1::2], parts[2::2], strict=True)


def usages(text: str) -> dict[str, Usage]:
    """By function, from what `cuobjdump -res-usage` prints. Raises ValueError where it names none."""
    found = {name: Usage(*map(int, figures)) for name, *figures in _USAGE.findall(text)}
    if not found:
        raise ValueError("no resource usage in the listing")
    return found
