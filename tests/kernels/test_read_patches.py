"""read_patches: its C++ against the specification bit for bit, what it refuses, what it moves, and what nvcc makes of it."""

from __future__ import annotations

import math
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vatt.kernels import native
from vatt.kernels.implementation import KernelError
from vatt.kernels.read_patches import read_patches, traffic

pytestmark = pytest.mark.filterwarnings("error:C.. kernels are not used")
PATCH, GRID = (2, 8, 16), (2, 2, 3)


def frames(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def poisoned_memory():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


def same_bits(signal: Tensor, index: Tensor | None, patch: tuple[int, ...], grid: tuple[int, ...], dtype: torch.dtype) -> None:
    ours = read_patches(signal, index, patch, grid, dtype)
    truth = read_patches(signal, index, patch, grid, dtype, "reference")
    assert ours.dtype == dtype and ours.equal(truth), (tuple(signal.shape), signal.dtype, patch, grid, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("seed", range(40))
def test_random_shapes_have_the_bits_of_the_specification(seed: int, dtype: torch.dtype) -> None:
    """Remainders left out and padded, strides of every kind, all three dtypes of frames, with and without an index."""
    draw = random.Random(seed)
    patch = draw.randint(1, 4), draw.randint(1, 17), draw.choice([1, 5, 8, 15, 16, 17, 32, 33])
    grid = draw.randint(1, 3), draw.randint(1, 4), draw.randint(1, 4)
    extent = [max(1, p * g + draw.randint(-p - 1, 6)) for p, g in zip(patch, grid, strict=True)]
    video = frames(draw.randint(1, 3), extent[0] + 1, draw.choice([1, 3]), extent[1], extent[2] + 3, seed=seed)
    cut = draw.choice([video, video[:, 1:, ..., 3:], video.flip(1)[:, :-1], video.transpose(3, 4)])
    unit = cut.float() / 127.5 - 1
    count = math.prod(grid)
    index = torch.tensor([[draw.randrange(count) for _ in range(draw.randint(1, 9))]]).expand(len(video), -1)
    for signal in (cut, unit, unit.bfloat16()):
        for chosen in (None, index):
            same_bits(signal, chosen, patch, grid, dtype)


def test_every_pixel_value_is_rounded_as_specified() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 1, 256)
    levels = read_patches(every, None, (1, 1, 256), (1, 1, 1)).flatten()
    assert levels[0] == -1 and levels[255] == 1 and (levels.diff() > 0).all()
    assert levels.equal(torch.arange(256).float().mul(2.0 / 255.0).sub(1.0))
    same_bits(every, None, (1, 1, 256), (1, 1, 1), torch.bfloat16)


@pytest.mark.parametrize("grid", [5, 6, 7])
def test_waveforms(grid: int) -> None:
    audio = torch.rand(3, 200, generator=torch.Generator().manual_seed(0)) * 2 - 1
    index = torch.tensor([[4, 0], [1, 2], [3, 3]])
    for dtype in (torch.float32, torch.bfloat16):
        same_bits(audio, index, (32,), (grid,), dtype)
        same_bits(audio[:, ::2], None, (16,), (grid,), dtype)
    assert read_patches(audio, index, (32,), (grid,))[1, 1].equal(audio[1, 64:96])


def test_what_lies_beyond_the_frames_is_zero() -> None:
    video = frames(1, 3, 3, 12, 20)
    last = read_patches(video, torch.tensor([[7]]), (2, 8, 16), (2, 2, 2)).view(2, 3, 8, 16)
    assert last[1].eq(0).all() and last[0, :, 4:].eq(0).all() and last[0, :, :, 4:].eq(0).all()
    assert last[0, :, :4, :4].equal(video[0, 2, :, 8:, 16:].float().mul(2 / 255).sub(1))


def test_nothing_but_the_kept_pixels_matters() -> None:
    video, index = frames(1, 4, 3, 16, 48), torch.tensor([[0, 5]])
    kept = read_patches(video, index, PATCH, GRID)
    other = video.clone()
    other[:, :2, :, :8, 16:], other[:, :2, :, 8:, :32], other[:, 2:] = 0, 0, 0
    assert read_patches(other, index, PATCH, GRID).equal(kept)


def test_the_op_keeps_the_dispatchers_rules() -> None:
    video, index = frames(2, 4, 3, 16, 48), torch.tensor([[0, 5, 11]]).expand(2, -1)
    for signal in (video, video.float()):
        torch.library.opcheck(torch.ops.vatt.read_patches, (signal, index, [*PATCH], [*GRID], torch.bfloat16))
    torch.library.opcheck(torch.ops.vatt.read_patches, (torch.rand(2, 90), None, [16], [5], torch.float32))


def test_other_dtypes_are_pytorchs() -> None:
    video = frames(1, 4, 3, 16, 48)
    for dtype in (torch.float16, torch.float64):
        same_bits(video, None, PATCH, GRID, dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index_BK": torch.tensor([[12]])}, "index: 12 is outside the grid of 12 patches"),
        ({"index_BK": torch.tensor([[3, -1]])}, "index: -1 is outside"),
        ({"index_BK": torch.tensor([[1]], dtype=torch.int32)}, "index: is torch.int32; make it int64"),
        ({"index_BK": torch.tensor([1])}, r"index: has shape \(1,\); make it \(1, K\)"),
        ({"signal": torch.zeros(3, 4, 5)}, r"signal: has shape \(3, 4, 5\)"),
        ({"signal": torch.zeros(1, 4, 3, 0, 48)}, "signal: .* nothing to read"),
        ({"signal": torch.zeros(1, 4, 3, 16, 48, dtype=torch.int64)}, "signal: is torch.int64; make it uint8"),
        ({"signal": torch.zeros(1, 4, 3, 16, 48, requires_grad=True)}, "signal: wants a gradient, which only 'reference' has"),
        ({"signal": torch.zeros(1, 4, 3, 16, 48, device="meta")}, "signal: is on meta; move it"),
        ({"dtype": torch.uint8}, "dtype: torch.uint8 cannot hold"),
        ({"patch": (16,)}, r"patch: \(16,\) has 1 axes, the signal 3"),
        ({"grid": (2, 0, 3)}, r"grid: \(2, 0, 3\) has an axis without extent"),
        ({"implementation": "fast"}, "implementation: 'fast' is not native or reference"),
    ],
)
def test_what_cannot_be_read_is_named(change: dict, message: str) -> None:
    arguments = {"signal": frames(1, 4, 3, 16, 48), "index_BK": None, "patch": PATCH, "grid": GRID} | change
    with pytest.raises(KernelError, match=f"^read_patches: {message}"):
        read_patches(**arguments)


def test_the_op_itself_checks_its_index() -> None:
    with pytest.raises(KernelError, match="index: 99 is outside"):
        torch.ops.vatt.read_patches(frames(1, 4, 3, 16, 48), torch.tensor([[99]]), [*PATCH], [*GRID], torch.float32)


def test_the_reference_is_differentiable_in_floats() -> None:
    video = torch.rand(1, 4, 3, 16, 48, requires_grad=True)
    read_patches(video, torch.tensor([[0, 0, 11]]), PATCH, GRID, implementation="reference").sum().backward()
    assert video.grad is not None and video.grad.sum() == 3 * 3 * math.prod(PATCH) and video.grad[:, :2, :, :8, :16].eq(2).all()


@pytest.mark.parametrize(("dropped", "sectors"), [(0.5, 1.2), (0.75, 1.28)])
def test_bytes_requested_of_video_large(dropped: float, sectors: float) -> None:
    """Requested: within 5 % of the pixels and tokens themselves. Sectors: two runs of 16 bytes share one of 32, no more."""
    video, grid = torch.empty(1, 32, 3, 224, 224, dtype=torch.uint8), (8, 14, 14)
    index = torch.randperm(1568, generator=torch.Generator().manual_seed(0))[None, : int(1568 * (1 - dropped))].sort().values
    moved = traffic(video, index, (4, 16, 16), grid, torch.bfloat16)
    assert moved.floor == index.numel() * 3 * math.prod((4, 16, 16)) * (1 + 2)
    assert moved.floor < moved.requested <= 1.05 * moved.floor
    assert moved.floor < moved.sectors <= sectors * moved.floor


def test_bytes_are_counted_from_addresses() -> None:
    video = torch.empty(1, 1, 1, 1, 64, dtype=torch.uint8)
    one = traffic(video, torch.tensor([[1]]), (1, 1, 16), (1, 1, 4), torch.float32)
    assert one == (16 + 64, 16 + 64 + 8, 32 + 64)
    shared = traffic(video, torch.tensor([[0, 1]]), (1, 1, 16), (1, 1, 4), torch.float32)
    assert shared == (32 + 128, 32 + 128 + 16, 32 + 128)
    across = traffic(video, torch.tensor([[1]]), (1, 1, 24), (1, 1, 2), torch.float32)  # bytes 24 to 48: two sectors
    assert across == (24 + 96, 24 + 96 + 8, 64 + 96)
    clipped = traffic(video, torch.tensor([[1]]), (1, 1, 48), (1, 1, 2), torch.float32)  # 16 of 48 exist
    assert clipped == (16 + 192, 16 + 192 + 8, 32 + 192)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiled_for_a_gpu(capability: int, tmp_path: Path) -> None:
    """No spill anywhere; the gather loads pixels 16 bytes at a time and nothing by the byte."""
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("nvcc is not on the path: the CUDA sources cannot be compiled")
    from vatt.kernels.gpu.compiled import inspect

    torch_headers = Path(torch.__file__).parent / "include"
    arch = f"-gencode=arch=compute_{capability},code=sm_{capability}"
    cubin, objects = tmp_path / "k.cubin", tmp_path / "k.o"
    base = [compiler, *native.CUDA_FLAGS, arch, f"-I{torch_headers}", f"-I{native.folder()}"]
    (source,) = native.sources("cuda")
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    for mode, target in (("-cubin", cubin), *([("-c", objects)] if capability == 90 else [])):  # -c: the registration too
        done = subprocess.run([*base, mode, str(source), "-o", str(target)], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
    kernels = inspect(cubin.read_bytes())
    gathers = [(usage, counts) for name, usage, counts in kernels if "read_vectors" in name]
    assert len(kernels) == 18 and len(gathers) == 9
    assert all(counts.spills == 0 and usage.local == 0 and usage.stack == 0 for _, usage, counts in kernels)
    assert all(counts.loads_16B >= 1 and counts.loads_narrow == 0 for _, counts in gathers)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [96, 100])
def test_gpu_has_the_bits_of_the_specification(width: int, dtype: torch.dtype) -> None:
    video, index = frames(2, 9, 3, 40, width).cuda(), torch.tensor([[5, 0, 17], [44, 7, 7]]).cuda()
    for signal in (video, video.float() / 127.5 - 1, (video.float() / 127.5 - 1).bfloat16(), video[..., 3:]):
        for patch, grid in (((4, 16, 16), (3, 3, 5)), ((2, 5, 7), (3, 3, 5))):
            for chosen in (index, None):
                same_bits(signal, chosen, patch, grid, dtype)
