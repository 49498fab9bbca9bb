"""DeepSpeed's engine behind `interface.Backend`: ZeRO stages 1 to 3, and 0 in fp32. The only file that knows the name.

DeepSpeed's settings are derived here from ours and never read from a file. Its engine casts every parameter to bf16 by
itself (buffers it leaves alone), which is the policy of `interface` for batch norm too: ZeRO flattens a group into one
tensor of one dtype, and a second group would be a second optimizer step with a guard of its own.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

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
from vatt.engine.config import ConfigError, RunConfig
from vatt.engine.optimizer import Adam, trainable

# Elements reduced at a time. DeepSpeed allocates them up front, in fp32; its own default of 5e8 is 2 GB a rank.
BUCKET_ELEMENTS = {"cpu": 8 << 20, "cuda": 64 << 20}


def settings(config: RunConfig, world_size: int, device: torch.device, elements: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a run of ours, for a model of `elements` parameters."""
    bucket = min(BUCKET_ELEMENTS[device.type], elements + elements % 2)
    stage = config.backend.zero_stage
    zero: dict[str, Any] = {
        "stage": stage,
        # Overlapping needs a second bucket and a side stream, which a CPU or a lone rank pays for nothing.
        "overlap_comm": device.type == "cuda" and world_size > 1,
        # The bucket's copies cost a third of backward's overhead on a CPU, where nothing fragments.
        "contiguous_gradients": device.type == "cuda" or stage != 1,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if stage in (1, 2):
        zero["compute_grad_norm"] = False  # Adam's guard measures it, without asking the host
    if stage == 3:
        # One sub-group: each is a separate optimizer step, and the guard must see all gradients in one.
        zero["sub_group_size"] = 2 * elements + world_size
        zero["stage3_prefetch_bucket_size"] = bucket
        zero["memory_efficient_linear"] = False  # it would replace torch's linear for the whole process
    return {
        "train_micro_batch_size_per_gpu": config.batch_size // world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # said aloud: its default is 1.0
        "communication_data_type": "fp32",
        # A finite check of its own would read a number back from the device every step.
        "bf16": {"enabled": config.backend.precision == "bf16", "check_grad_overflow": False},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }


def import_deepspeed(device: torch.device) -> Any:
    """The package, set up for `device` and quiet below warnings. Raises ConfigError with the remedy if it is absent."""
    # Decided at its first import: without this it looks for a GPU's tools on a CPU run.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"backend.name: 'deepspeed' cannot be imported ({error}); "
            "pip install 'vatt-engine[deepspeed]', or set backend.name = \"torch\""
        ) from error
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # It calls collectives by names that torch 2.13 is retiring, and would say so at every step.
    retiring = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", message=retiring, category=FutureWarning)
    # A shared-memory kernel for inference that it would compile on every machine with a compiler; training has no use for it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It imports Muon to see that our optimizer is another one, and Muon's file wraps three functions in torch.compile, whose
    # own import is most of DeepSpeed's start (4 s). Nobody calls them here.
    with mock.patch.object(torch, "compile", lambda function=None, **_: function or (lambda wrapped: wrapped)):
        import deepspeed.runtime.zero.muon.muon_optimizer
    # ZeRO-3 hooks what modules return, to fetch parameters before their backward: show it the tensors in our records.
    offload = deepspeed.runtime.zero.parameter_offload
    if not hasattr(offload.apply_to_tensors_only, "sees_records"):
        offload.apply_to_tensors_only = _seeing_records(offload.apply_to_tensors_only)
    return deepspeed


def adam_library(device: torch.device) -> Any:
    """DeepSpeed's own fused Adam for `device`, compiled by it on first use. Raises ConfigError with the remedy."""
    import_deepspeed(device)
    from deepspeed.ops.op_builder import CPUAdamBuilder, FusedAdamBuilder

    try:
        return (CPUAdamBuilder if device.type == "cpu" else FusedAdamBuilder)().load(verbose=False)
    except Exception as error:  # whatever a compiler can do wrong
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise ConfigError(f"optimizer.kernel: DeepSpeed cannot compile its Adam here ({reason[0]}); use 'torch'") from error


def _seeing_records(apply: Callable[..., Any]) -> Callable[..., Any]:
    """DeepSpeed's `apply_to_tensors_only`, which looks into tuples, lists and dicts, made to look into dataclasses too."""

    def applied(function: Callable[[Tensor], Tensor], value: Any, warning_msg_fn: Callable[[Any], str] | None = None) -> Any:
        if not dataclasses.is_dataclass(value) or isinstance(value, type):
            return apply(function, value, warning_msg_fn)
        held = {f.name: applied(function, getattr(value, f.name), warning_msg_fn) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **held)

    applied.sees_records = True  # type: ignore[attr-defined]
    return applied


class DeepSpeedBackend:
    """Implements `interface.Backend`; `module` is DeepSpeed's engine around the model.

    Needs a joined process group (`distributed.joined`), also for one rank.
    """

    def __init__(self, model: nn.Module, config: RunConfig, *, rank: int, world_size: int, device: torch.device):
        self.stage = config.backend.zero_stage
        low_precision = config.backend.precision == "bf16"
        if self.stage == 0 and low_precision:
            raise ConfigError(
                "backend.zero_stage: 0 with bf16 makes DeepSpeed wait for the device at every parameter and start Adam's "
                'count at 1; use zero_stage 1 (as fast on one rank), or backend.name = "torch"'
            )
        deepspeed = import_deepspeed(device)
        self.rank, self.world_size = rank, world_size
        self.model = model.to(device)
        self.weights = trainable(model)
        # The engine makes masters of weights it has already rounded. These give them back every bit.
        exact = {name: w.detach().to("cpu", copy=True) for name, w in self.weights.items()} if low_precision else {}
        elements = sum(parameter.numel() for parameter in model.parameters())
        # It wants a launcher's variable even when it was handed everything else.
        os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
        logger = deepspeed.utils.logger
        level = logger.level
        logger.setLevel(logging.ERROR)  # it warns of an optimizer that is not its own
        self.module, optimizer, _, _ = deepspeed.initialize(
            model=model,
            # A callable, because an instance would have to be a torch.optim.Optimizer (see `Adam`).
            optimizer=lambda parameters: Adam(parameters, config.optimizer, partitioned=self.stage > 0),
            model_parameters=list(self.weights.values()),
            config=settings(config, world_size, device, elements),
        )
        logger.setLevel(level)
        self.zero: Any = optimizer if self.stage > 0 else None
        self.adam: Adam = optimizer.optimizer if self.zero else optimizer
        self._ready_state()
        for name, tensor in exact.items():
            self._write(self.weights[name], None, tensor)
        if exact:
            self._refresh_weights()
        self.gradients = GradientSum(self.weights.values())
        self.buffers = KeptBuffers(model)

    @torch.no_grad()
    def _ready_state(self) -> None:
        """Make the moments now, so that a run can be saved or loaded before its first step."""
        self.adam.updates.zero_()
        for parameter in self._masters():
            self.adam.moments(parameter)
        if self.stage in (1, 2):
            self.zero._lazy_init_hp_params_optimizer_state()
        if self.stage == 3:
            # Its norm reads the device to decide what Adam's guard decides on the device; a constant turns that off.
            self.zero._get_norm_groups = lambda: [0.0]

    def _masters(self) -> list[Tensor]:
        """What Adam moves on this rank: one flat fp32 partition under ZeRO."""
        if self.stage == 0:
            return list(self.weights.values())
        flat = self.zero.single_partition_of_fp32_groups if self.stage < 3 else self.zero.fp32_partitioned_groups_flat
        if len(flat) != 1:
            raise RuntimeError(f"DeepSpeed made {len(flat)} optimizer groups where the device-side guard needs one")
        return list(flat)

    def backward(self, loss: Tensor) -> None:
        """Gradients, reduced over ranks on the way as the ZeRO stage has it."""
        self.module.backward(poisoned_unless_finite(loss))
        self.gradients.add()

    @contextmanager
    def one_reduction(self) -> Iterator[None]:
        """The engine's own way to leave gradients whole on the weights and reduce them when it is left.

        Its stages 2 and 3 then hold a whole gradient, and in bf16 its sum, on every rank until the end.
        """
        with self.module.no_sync() if self.stage == 0 else self.module.coalesce_grad_reduction(), self.gradients.over_passes():
            yield
        if self.stage == 0:
            self.module.allreduce_gradients()

    def step(self, learning_rate: float | Tensor) -> StepOutcome:
        """One guarded Adam update, and the new weights to whoever needs them."""
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        self.module.step()
        self.buffers.settle(self.adam.skipped)
        return StepOutcome(self.adam.gradient_norm, self.adam.skipped)

    @torch.no_grad()
    def gather_state(self) -> dict[str, Tensor] | None:
        """One tensor at a time, so that no device ever holds more than its share and the largest one."""
        state: dict[str, Any] = {}  # of None on the other ranks, which only take part
        for name, parameter in self.model.named_parameters():
            state[f"model/{name}"] = self._assemble(parameter, None)
        for name, parameter in self.weights.items():
            for moment in "mv":
                state[f"adam/{moment}/{name}"] = self._assemble(parameter, moment)
        for name, buffer in saved_buffers(self.model).items():
            dtype = torch.float32 if buffer.is_floating_point() else buffer.dtype
            state[f"model/{name}"] = buffer.detach().to("cpu", dtype, copy=True)
        state["adam/step"] = self.adam.updates.to("cpu", torch.int64)
        return state if self.rank == 0 else None

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Each rank copies its own share out of the whole state."""
        shapes = {name: _shape(parameter) for name, parameter in self.model.named_parameters()}
        buffers = saved_buffers(self.model)
        check_state(state, state_shapes(shapes, self.weights, buffers))
        for name, parameter in self.model.named_parameters():
            self._write(parameter, None, state[f"model/{name}"])
        for name, parameter in self.weights.items():
            for moment in "mv":
                self._write(parameter, moment, state[f"adam/{moment}/{name}"])
        for name, buffer in buffers.items():
            buffer.copy_(state[f"model/{name}"])
        self.adam.updates.copy_(state["adam/step"])
        self.buffers.keep()
        self._refresh_weights()

    def _share(self, parameter: Any, moment: str | None) -> tuple[int, Tensor]:
        """This rank's share of a parameter's master (or of its moment "m" or "v"): first element, and a flat view.

        Whatever every rank holds is rank 0's share.
        """
        size = _shape(parameter).numel()
        if self.stage == 3:
            held = parameter.requires_grad  # a frozen parameter has no master
            part = self.zero.get_local_fp32_param(parameter, moment) if held else parameter.ds_tensor
            start = min(self.rank * part.numel(), size)
            return start, part.detach().view(-1)[: size - start]  # the last ranks' shares are padded
        if self.stage == 0 or not parameter.requires_grad:
            whole = parameter.data if moment is None else self.adam.state[parameter][moment]
            return 0, whole.view(-1) if self.rank == 0 else whole.new_empty(0)
        mapping = parameter._hp_mapping
        if mapping is None:
            return 0, parameter.new_empty(0, dtype=torch.float32)
        return mapping.lp_fragment_address.start, mapping.get_hp_fragment(moment).detach()

    def _assemble(self, parameter: nn.Parameter, moment: str | None) -> Tensor | None:
        """The whole fp32 tensor on rank 0's CPU, None elsewhere."""
        start, share = self._share(parameter, moment)
        whole = torch.zeros(_shape(parameter).numel(), dtype=torch.float32, device=share.device)
        whole[start : start + share.numel()] = share
        if self.world_size > 1:
            # Added as integers, where 0 + x has the bits of x: as floats, -0.0 would come back as 0.0.
            dist.reduce(whole.view(torch.int32), dst=0)
        return whole.view(_shape(parameter)).cpu() if self.rank == 0 else None

    @torch.no_grad()
    def _write(self, parameter: nn.Parameter, moment: str | None, whole: Tensor) -> None:
        """This rank's share from the whole tensor."""
        replicated = self.stage == 0 or (self.stage < 3 and not parameter.requires_grad)
        if replicated:
            (parameter.data if moment is None else self.adam.state[parameter][moment]).copy_(whole)
            return
        start, share = self._share(parameter, moment)
        share.copy_(whole.reshape(-1)[start : start + share.numel()])

    @torch.no_grad()
    def _refresh_weights(self) -> None:
        """Working copies from masters."""
        if self.stage in (1, 2):
            self.zero.update_lp_params()
        elif self.stage == 3:
            self.zero._partition_all_parameters()
            self.zero._reassign_or_swap_out_partitioned_parameters(0)
            self.zero._post_step(set())


def _shape(parameter: nn.Parameter) -> torch.Size:
    """A parameter's whole shape; ZeRO-3 leaves only a placeholder where the parameter was."""
    return getattr(parameter, "ds_shape", parameter.shape)
