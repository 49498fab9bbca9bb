"""Every kernel of the table, on every case: errors within budget, derivatives, and the dispatcher's own checks."""

from __future__ import annotations

import pytest
import torch

from vatt.kernels.contract import NAMES, Case, Kernel, errors, gradients, row, table

CPU = torch.device("cpu")
CASES = [pytest.param(kernel, case, id=f"{kernel.name}-{case.name}") for kernel in table() for case in kernel.cases]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Uninitialised floats are NaN: a kernel that leaves one element unwritten fails."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(("kernel", "case"), CASES)
def test_interpreter_within_budget(kernel: Kernel, case: Case, dtype: torch.dtype) -> None:
    if "interpreter" not in kernel.implementations:
        pytest.fail(f"{kernel.name} has no interpreter path: its GPU kernel would go untested here")
    if torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU in this process; the interpreter is tested where there is none")
    check(kernel, case, dtype, CPU, "interpreter")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("implementation", ["native", "reference"])
@pytest.mark.parametrize(("kernel", "case"), CASES)
def test_cpu_within_budget(kernel: Kernel, case: Case, implementation: str, dtype: torch.dtype) -> None:
    check(kernel, case, dtype, CPU, implementation)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("kernel", "case"), CASES)
def test_gpu_within_budget(kernel: Kernel, case: Case, dtype: torch.dtype) -> None:
    check(kernel, case, dtype, torch.device("cuda"), "native")


@pytest.mark.parametrize(("kernel", "case"), CASES)
def test_second_run_gives_the_same_bits(kernel: Kernel, case: Case) -> None:
    arguments = case.make(torch.float32, CPU)
    first, second = (gradients(kernel.op, arguments, kernel.differentiable) for _ in range(2))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("name", NAMES)
def test_every_shape_can_be_launched(name: str) -> None:
    """The certificate's inputs: each shape's launches recorded from meta tensors, forward and backward."""
    from vatt.kernels.gpu.launch import recording
    from vatt.kernels.gpu.target import TARGETS

    kernel = row(name)
    assert kernel.shapes, f"{name} has no real shape: nothing would be timed or compiled"
    for shape in kernel.shapes:
        with recording(TARGETS["sm_90"]) as launches:
            kernel.launches(**shape.make(torch.bfloat16, torch.device("meta")))
        assert launches, shape.name


def check(kernel: Kernel, case: Case, dtype: torch.dtype, device: torch.device, implementation: str) -> None:
    wrong = [error for error in errors(kernel, case, dtype, device, implementation) if not error.within]
    assert not wrong, f"{kernel.name} {case.name} {implementation} {dtype}: {wrong}"
