"""The contrastive op: every form by its definition, its corners, its errors, and what it holds in memory.

G = clips, L = candidates of a clip, D = features.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import vatt.kernels.contrastive_tiles as tiles
from vatt.benchmarks.bench_contrastive import GPU_CHUNK, bytes_held, held, pair
from vatt.kernels.contract import Case, errors
from vatt.kernels.contrastive import FORMS, WHOLE_UP_TO, contrastive
from vatt.kernels.implementation import KernelError
from vatt.kernels.rows.contrastive import ROW, mask

CPU = torch.device("cpu")


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles whose edges fall inside the clips of a small batch, on and off the diagonal."""
    monkeypatch.setattr(tiles, "ROWS", 3)
    monkeypatch.setattr(tiles, "COLUMNS", 8)


@pytest.fixture(autouse=True)
def poisoned_memory():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


def features(G: int, L: int, D: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (G, G * L))
    video, other = (x.to(dtype).requires_grad_() for x in draws)
    return video, other


def by_definition(video: Tensor, other: Tensor, valid: Tensor, temperature: float, form: str) -> Tensor:
    """Every clip's loss, pair by pair, from the formulas of the paper (all_pairs) and of the released code."""
    G, L = valid.shape
    z, t = ([x / x.square().sum().clamp(min=1e-12).sqrt() for x in rows] for rows in (video, other))
    e = {
        (i, k, c): ((z[i] * t[k * L + c]).sum() / temperature).exp()
        for i in range(G)
        for k in range(G)
        for c in range(L)
        if valid[k, c]
    }
    losses = []
    for i in range(G):
        own, row, column, apart = (
            sum((value for place, value in e.items() if chosen(*place)), torch.zeros((), dtype=video.dtype))
            for chosen in (
                lambda a, b, c: a == b == i,  # noqa: B023
                lambda a, b, c: a == i,  # noqa: B023
                lambda a, b, c: b == i,  # noqa: B023
                lambda a, b, c: a != b,
            )
        )
        denominators = {"row_column": [row + column], "symmetric": [row, column], "all_pairs": [own + apart]}[form]
        losses.append(sum(d.log() - own.log() for d in denominators) if valid[i].any() else torch.zeros_like(own))
    return torch.stack(losses)


@pytest.mark.parametrize("implementation", ["tiles", "reference"])
@pytest.mark.parametrize("kind", ["all", "ragged", "some"])
@pytest.mark.parametrize(("G", "L"), [(1, 1), (1, 5), (4, 1), (5, 3)])
@pytest.mark.parametrize("form", FORMS)
def test_definition(form: Any, G: int, L: int, kind: str, implementation: str, small_tiles: None) -> None:
    video, other = features(G, L, 6)
    valid = mask(G, L, kind, CPU)
    weights = torch.randn(G, dtype=torch.float64)
    ours = contrastive(video, other, valid, 0.3, form, implementation)
    true = by_definition(video, other, valid, 0.3, form)
    torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-12)
    if not valid.any():
        return
    for a, b in zip(*(torch.autograd.grad(x @ weights, (video, other)) for x in (ours, true)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.3, 0.002])  # the second: running maxima instead of a bound, in fp64 too
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: Any, temperature: float, small_tiles: None) -> None:
    video, other = features(5, 2, 4)
    if temperature < 0.01:
        video, other = (x.detach() * 0.01 + torch.ones(4) for x in (video, other))
        video.requires_grad_(), other.requires_grad_()
    valid = mask(5, 2, "ragged", CPU)
    assert torch.autograd.gradcheck(lambda v, o: contrastive(v, o, valid, temperature, form, "tiles"), (video, other), eps=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", ROW.cases, ids=lambda case: case.name)
def test_tiles_within_budget(case: Case, dtype: torch.dtype) -> None:
    """The table's test takes the whole matrix at these sizes."""
    wrong = [error for error in errors(ROW, case, dtype, CPU, "tiles") if not error.within]
    assert not wrong, wrong


@pytest.mark.parametrize("temperature", [0.07, 0.01])
@pytest.mark.parametrize("form", FORMS)
def test_interpreter_across_blocks(form: Any, temperature: float) -> None:
    """More videos than a block and than the ones whose gradients are kept at a time, D not a multiple of a block."""
    import vatt.kernels.gpu.contrastive as gpu

    if torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU in this process; the interpreter is tested where there is none")
    before = gpu.CHUNK, gpu.SUM_TILES, gpu.PROGRAMS, gpu.LEAST_SPAN
    gpu.CHUNK, gpu.SUM_TILES, gpu.PROGRAMS, gpu.LEAST_SPAN = 100, 1, 6, 32
    try:
        video, other = features(150, 2, 40, torch.float32)
        valid = mask(150, 2, "some", CPU)
        check_against_fp64(video, other, valid, temperature, form, "interpreter")
    finally:
        gpu.CHUNK, gpu.SUM_TILES, gpu.PROGRAMS, gpu.LEAST_SPAN = before


def check_against_fp64(video: Tensor, other: Tensor, valid: Tensor, temperature: float, form: Any, implementation: str) -> None:
    """Losses and gradients at most twice as wrong as the whole matrix in fp32, plus a unit in the last place."""
    cotangent = torch.randn(len(video), generator=torch.Generator().manual_seed(5))
    found = []
    for dtype, how in ((torch.float64, "reference"), (torch.float32, "reference"), (torch.float32, implementation)):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (video, other)]
        loss = contrastive(*inputs, valid, temperature, form, how)
        found.append([loss.detach(), *torch.autograd.grad(loss, inputs, cotangent.to(dtype))])
    for true, eager, ours in zip(*found, strict=True):
        budget = 2 * (eager - true).abs().max() + torch.finfo(torch.float32).eps * true.abs().max()
        assert (ours - true).abs().max() <= budget


@pytest.mark.parametrize("implementation", ["native", "tiles", "interpreter"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("L", [1, 5])
def test_a_lone_clip(form: Any, L: int, implementation: str) -> None:
    """Nothing to be told from: ln 2 where row and column share a denominator, else 0, and no gradient either way."""
    video, other = features(1, L, 24, torch.float32)
    loss = contrastive(video, other, torch.ones(1, L, dtype=torch.bool), 0.07, form, implementation)
    assert loss.item() == pytest.approx(math.log(2) if form == "row_column" else 0.0, abs=2e-6)
    # Rounding of a logit of up to 1 / 0.07, times the slope of a cosine divided by the temperature.
    bound = 8 * torch.finfo(torch.float32).eps / 0.07 / 0.07
    for gradient, x in zip(torch.autograd.grad(loss.sum(), (video, other)), (video, other), strict=True):
        assert (gradient.norm(dim=1) <= bound / x.norm(dim=1)).all()


@pytest.mark.parametrize("implementation", ["reference", "tiles", "interpreter"])
@pytest.mark.parametrize("form", FORMS)
def test_features_of_no_length(form: Any, implementation: str) -> None:
    """Zero, and shorter than 1e-6: divided by 1e-6, as in the released code, with the gradient of that."""
    video, other = features(4, 2, 5)
    rescale = torch.tensor([1.0, 0.0, 1e-9, 1.0], dtype=torch.float64)[:, None]
    dtype = torch.float32 if implementation == "interpreter" else torch.float64
    video, other = (video * rescale).detach().to(dtype), (other * rescale.repeat(2, 1)).detach().to(dtype)
    valid = torch.ones(4, 2, dtype=torch.bool)
    inputs = [video.requires_grad_(), other.requires_grad_()]
    gradients = torch.autograd.grad(contrastive(*inputs, valid, 0.3, form, implementation).sum(), inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = torch.autograd.grad(by_definition(*exact, valid, 0.3, form).sum(), exact)
    for ours, true in zip(gradients, truth, strict=True):
        assert true.abs().max() > 1e3
        torch.testing.assert_close(ours.double(), true, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=1e-4)


@pytest.mark.parametrize("implementation", ["native", "interpreter"])
@pytest.mark.parametrize("form", FORMS)
def test_dispatcher(form: str, implementation: str) -> None:
    video, other = features(4, 3, 8, torch.float32)
    arguments = (video, other, mask(4, 3, "ragged", CPU), 0.07, form, implementation)
    torch.library.opcheck(torch.ops.vatt.contrastive, arguments)


def test_native_is_the_whole_matrix_for_small_batches_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(tiles, "forward", lambda *given, f=tiles.forward: calls.append(len(given[0])) or f(*given))
    G = math.isqrt(WHOLE_UP_TO)
    for clips in (G, G + 1):
        video, other = features(clips, 1, 8, torch.float32)
        loss = contrastive(video, other, torch.ones(clips, 1, dtype=torch.bool))
        torch.testing.assert_close(
            loss, contrastive(video, other, torch.ones(clips, 1, dtype=torch.bool), implementation="tiles")
        )
    assert calls == [G, G + 1, G + 1]


@pytest.mark.parametrize("form", FORMS)
def test_real_tiles_of_a_real_batch(form: Any) -> None:
    """Several tiles each way at the shipped size, with odd edges."""
    video, other = features(tiles.ROWS + 77, 5, 32, torch.float32)
    check_against_fp64(video, other, mask(len(video), 5, "some", CPU), 0.07, form, "tiles")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", ["eager", "tiles"])
def test_bytes_held(way: str, form: Any) -> None:
    """The counting functions against what was allocated: 3 % for the vectors they leave out."""
    G, L, D = (300, 2, 256) if way == "eager" else (1100, 2, 64)
    assert held(*pair(G, L, D), form, way) == pytest.approx(bytes_held(G, L, D, form, way), rel=0.03)


def test_bytes_held_by_the_gpu_code() -> None:
    """What its wrappers allocate, run by the interpreter; 10 %, as vectors and partial sums weigh more in a small batch."""
    from vatt.kernels.gpu.contrastive import CHUNK

    if torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU in this process; the interpreter is tested where there is none")
    assert CHUNK == GPU_CHUNK
    assert held(*pair(200, 2, 256), "row_column", "interpreter") == pytest.approx(
        bytes_held(200, 2, 256, "row_column", "gpu"), rel=0.1
    )


def test_memory_goal() -> None:
    """At least 20 times less than the whole matrix at 16k and 32k clips, and no term that grows with their square."""
    for way in ("tiles", "gpu"):
        for G in (16384, 32768):
            assert bytes_held(G, 5, 256, "row_column", "eager") >= 20 * bytes_held(G, 5, 256, "row_column", way)
        assert bytes_held(2**20, 5, 256, "row_column", way) <= 2.001 * bytes_held(2**19, 5, 256, "row_column", way)


def test_errors() -> None:
    video, other = (x.detach() for x in features(3, 2, 4, torch.float32))
    valid = torch.ones(3, 2, dtype=torch.bool)
    good = {"video_GD": video, "other_RD": other, "valid_GL": valid}
    for change, message in (
        ({"form": "rows"}, "form: 'rows' is not one of row_column, symmetric, all_pairs"),
        ({"temperature": 0.0}, "temperature: 0.0 is not positive"),
        ({"temperature": math.nan}, "temperature: nan is not positive"),
        ({"video_GD": video.long()}, "video: is torch.int64; it must be floating point"),
        ({"video_GD": video[0]}, r"video: has shape \(4,\); it must be \(clips, features\)"),
        ({"video_GD": video[:0]}, r"video: has shape \(0, 4\)"),
        ({"valid_GL": valid.float()}, "valid: is torch.float32; it must be bool"),
        ({"valid_GL": valid[:2]}, r"valid: has shape \(2, 2\); it must be \(clips, candidates\) of 3 clips"),
        ({"valid_GL": valid[:, :0]}, r"valid: has shape \(3, 0\)"),
        ({"other_RD": other[:5]}, r"other: has shape \(5, 4\); it must be \(6, 4\)"),
        ({"other_RD": other[:, :3]}, r"other: has shape \(6, 3\); it must be \(6, 4\)"),
        ({"other_RD": other.double()}, "other: is torch.float64, video is torch.float32; cast it"),
        ({"other_RD": other.to("meta")}, "other: is on meta, the rest on cpu; move it there"),
        ({"implementation": "tile"}, "implementation: 'tile' is not one of native, reference, interpreter, tiles"),
        ({k: x.to("meta") for k, x in good.items()} | {"implementation": "tiles"}, "implementation: 'tiles' takes CPU tensors"),
    ):
        with pytest.raises(KernelError, match=f"^contrastive: {message}"):
            contrastive(**(good | change))  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_gpu_memory_grows_with_the_features_alone(form: Any) -> None:
    """Twice the clips: about twice the bytes, and at least 20 times fewer than the eager form counts."""
    G, L, D = 8192, 5, 256
    peaks = []
    for clips in (G // 2, G):
        video, other, valid = (x.cuda() for x in pair(clips, L, D))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = contrastive(video.requires_grad_(), other.requires_grad_(), valid, 0.07, form)
        torch.autograd.grad(loss.sum(), (video, other))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= 2.2 * peaks[0]
    assert 20 * peaks[1] <= bytes_held(G, L, D, form, "eager")
