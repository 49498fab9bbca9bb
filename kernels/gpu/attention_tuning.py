"""How attention is cut into tiles: the shipped tunings, and what share of the arithmetic falls on padding.

A program owns a tile of one side and walks over the other. Its walk ends with a tile of its own, as narrow as what is left
allows (`tail`), so that the loop before it needs no mask and little is computed for tokens that do not exist.

Legend: N tokens, D features of a head.
"""

from __future__ import annotations

import re

import torch

from vatt.kernels.gpu.launch import Tuning, Tunings
from vatt.kernels.gpu.target import Target

SHORTEST_TAIL = 16  # what one tensor-core instruction takes
SHORT = 32  # up to so many tokens (captions) one tile is the whole sequence


def tail(length: int, block: int) -> int:
    """Width of the last tile of a walk over `length` in steps of `block`: 0, or the least power of two that holds the rest."""
    rest = length % block
    return max(SHORTEST_TAIL, 1 << (rest - 1).bit_length()) if rest else 0


def tile_waste(N: int, block_m: int, block_n: int) -> float:
    """Scores computed / scores wanted, for a program's own tile of `block_m` and a walk in steps of `block_n`. 1 is ideal."""
    own = -(-N // block_m) * block_m
    walked = N - N % block_n + tail(N, block_n)
    return own * walked / (N * N)


# What is offered, best first, for each pass, kind of call and GPU: <BLOCK_M queries>x<BLOCK_N keys>_<warps>w<stages>. All of it
# compiles without spilling at VATT's shapes. On Hopper and Blackwell a product has 64 rows at least, and 64 rows of queries are
# also what wastes least at 785 and 601 tokens. Ampere keeps operands in registers, so its backward tiles are smaller, and the
# random words of a dropout need registers too. Kinds: features of a head; "short", up to SHORT tokens; "fp32".
_OFFERED = {
    # Queries are a program's own, the walk is over keys.
    "forward": {
        "32": {"sm_80": "64x128_4w2 64x64_4w2", "sm_90": "64x128_4w2 64x64_4w2", "sm_100": "64x128_4w2"},
        "64": {
            "sm_80": "64x128_4w2 64x64_4w2 64x64_4w3 64x32_4w3 128x64_8w2 128x128_8w2",
            "sm_90": "64x128_4w2 64x64_4w2 64x64_4w3 128x64_4w2 128x64_8w2 128x128_8w2",
            "sm_100": "64x64_4w2 64x128_4w2 64x64_4w3 128x64_8w2 128x128_8w2",
        },
        "64 dropout": {
            "sm_80": "64x64_4w2 64x32_4w3 128x64_8w2",
            "sm_90": "64x64_4w2 64x32_4w3 64x128_4w2 128x64_8w2",
            "sm_100": "64x64_4w2 64x32_4w3 64x128_4w2",
        },
        "128": {"sm_80": "128x64_8w2", "sm_90": "64x64_4w2 128x64_8w2", "sm_100": "64x64_4w2 128x64_8w2"},
        "short": dict.fromkeys(("sm_80", "sm_90", "sm_100"), "32x32_4w1"),
        "fp32": dict.fromkeys(("sm_80", "sm_90", "sm_100"), "32x32_4w1"),
    },
    # The same: queries are a program's own.
    "backward_q": {
        "32": {"sm_80": "64x64_4w2 64x128_4w2", "sm_90": "64x64_4w2 64x128_4w2", "sm_100": "64x64_4w2 64x128_4w2"},
        "64": {
            "sm_80": "64x64_4w2 64x64_4w3 64x32_4w3 128x64_8w2",
            "sm_90": "64x64_4w2 64x64_4w3 64x128_4w2 128x64_8w2 128x128_8w2",
            "sm_100": "64x64_4w2 64x64_4w3 64x128_4w2 128x64_8w2 128x128_8w2",
        },
        "64 dropout": {"sm_80": "64x32_4w3", "sm_90": "64x64_4w2 64x32_4w3", "sm_100": "64x64_4w2 64x32_4w3"},
        "128": {
            "sm_80": "128x32_8w2 32x64_8w2",
            "sm_90": "64x64_4w2 64x32_4w2",
            "sm_100": "64x64_4w2 64x32_4w2",
        },
        "short": dict.fromkeys(("sm_80", "sm_90", "sm_100"), "32x32_4w1"),
        "fp32": dict.fromkeys(("sm_80", "sm_90", "sm_100"), "32x32_4w1"),
    },
    # Keys and values are a program's own, the walk is over queries.
    "backward_kv": {
        "32": {"sm_80": "64x64_4w2 32x64_4w2", "sm_90": "64x64_4w2 32x64_4w2", "sm_100": "64x64_4w2 32x64_4w2"},
        "64": {
            "sm_80": "32x64_4w2 32x128_8w2",
            "sm_90": "64x64_4w2 64x64_4w3 32x64_4w2 64x128_8w2 32x128_8w2",
            "sm_100": "64x64_4w2 64x64_4w3 64x128_8w2 64x128_4w2",
        },
        "64 dropout": {
            "sm_80": "32x32_4w2 16x64_4w2 32x32_4w1",
            "sm_90": "32x64_4w2 64x64_4w2",
            "sm_100": "32x64_4w2 64x64_4w2",
        },
        "128": {"sm_80": "32x32_4w2", "sm_90": "32x64_4w2 64x64_8w2", "sm_100": "32x64_4w2 64x64_8w2"},
        "short": dict.fromkeys(("sm_80", "sm_90", "sm_100"), "32x32_4w1"),
        "fp32": dict.fromkeys(("sm_80", "sm_90", "sm_100"), "32x32_4w1 16x32_4w1"),
    },
}


def _tuning(name: str) -> Tuning:
    m, n, warps, stages = map(int, re.findall(r"\d+", name))
    return Tuning({"BLOCK_M": m, "BLOCK_N": n}, warps, stages)


def _table(kernel: str, kind: str, target: str, offered: str) -> Tunings:
    names = offered.split()
    name = f"attention_{kernel}_{kind.replace(' ', '_')}_{target}"
    return Tunings(name, {candidate: _tuning(candidate) for candidate in names}, {target: names[0]})


TABLES = {
    (kernel, kind, target): _table(kernel, kind, target, offered)
    for kernel, kinds in _OFFERED.items()
    for kind, targets in kinds.items()
    for target, offered in targets.items()
}


def pick(kernel: str, qkv_BN3HD: torch.Tensor, dropout: bool, target: Target) -> Tuning:
    """The tuning of a pass ("forward", "backward_q", "backward_kv") over a packed projection."""
    N, D = qkv_BN3HD.shape[1], qkv_BN3HD.shape[4]
    kind = "fp32" if qkv_BN3HD.dtype == torch.float32 else "short" if N <= SHORT else str(D)
    if dropout and (kernel, f"{kind} dropout", target.name) in TABLES:
        kind += " dropout"
    return TABLES[kernel, kind, target.name].pick(target)
