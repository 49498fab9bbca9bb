"""How a run is executed: what may change from machine to machine without changing what is learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vatt.engine.config_record import option, require


@dataclass(frozen=True)
class BackendConfig:
    """What runs backward and the optimizer step."""

    name: Literal["deepspeed", "torch"] = option("deepspeed", "DeepSpeed's engine, or its plain-PyTorch twin.")
    zero_stage: Literal[0, 1, 2, 3] = option(
        1, "What is divided over the ranks (ZeRO): nothing, Adam, + gradients, + weights; torch knows 0 and 1."
    )
    precision: Literal["bf16", "fp32"] = option("bf16", "bf16 weights with fp32 masters, or fp32 throughout.")
    chunk: int = option(
        0, "Gradient caching: clips per rank that the towers see at a time, and again in backward; 0 = all at once."
    )
    recompute_layers: int = option(
        0, "Activation checkpointing: so many of each tower's first blocks run again in backward instead of being kept."
    )
    gradient_accumulation_steps: int = option(1, "Must stay 1: accumulation would shrink the set of negatives.")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "Where to train.")
    threads: int = option(0, "CPU threads per rank; 0 = cores / ranks on the host.")
    cuda_graph: bool = option(False, "torch, on a GPU: record the step once and replay it, for small local batches.")
    fp8: bool = option(False, "Eight-bit operands in the blocks' linear layers; faster from the H100 on, emulated elsewhere.")
    compile: bool = option(False, "torch: each block of a tower through torch.compile; the first steps take minutes.")
    tower_streams: bool = option(False, "On a GPU: audio and text towers beside the video tower, each on its own stream.")

    def __post_init__(self) -> None:
        for name in ("cuda_graph", "compile"):
            require(not getattr(self, name) or self.name == "torch", name, "needs backend.name = 'torch'")
        require(
            not (self.compile and self.recompute_layers),
            "compile",
            "does not go with backend.recompute_layers, the compiler decides itself what to keep; choose one",
        )
        for name in ("chunk", "recompute_layers"):
            require(getattr(self, name) >= 0, name, "must not be negative")
        require(
            self.gradient_accumulation_steps == 1,
            "gradient_accumulation_steps",
            "must be 1: accumulated micro-batches would contrast each clip with its own micro-batch only; "
            "set backend.chunk, which keeps the whole batch's negatives, lower batch_size, or add ranks",
        )
