"""Reading and projecting patches, against an explicit loop and against PyTorch's own convolutions."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vatt.kernels.contract import gradients, row
from vatt.kernels.drop_tokens import drop_tokens
from vatt.kernels.implementation import KernelError
from vatt.kernels.patch_project import (
    patch_project,
    patch_project_reference,
    read_audio_patches,
    read_video_patches,
    to_unit_range,
)
from vatt.kernels.rows.bias_gelu import mask
from vatt.kernels.rows.patch_project import TUBELET, VIDEO, _make, traffic

D = 6
VIDEO_PATCHES = list(itertools.product((4, 5, 8), (16, 32)))


def frames(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def grid_of(shape: tuple[int, ...], patch: tuple[int, int, int]) -> tuple[int, int, int]:
    return shape[1] // patch[0], shape[3] // patch[1], shape[4] // patch[2]


@pytest.mark.parametrize(("depth", "side"), VIDEO_PATCHES)
def test_video_is_the_released_convolution(depth: int, side: int) -> None:
    """A Conv3d whose stride is its kernel, read row-major: pins the order of patches and of a patch's features."""
    patch, shape = (depth, side, side), (2, 2 * depth, 3, 3 * side, 2 * side)
    video = frames(shape)
    grid = grid_of(shape, patch)
    assert len(set(grid[1:])) == 2, "rows and columns must differ to tell them apart"
    weight = torch.randn(D, depth * 3 * side * side, dtype=torch.float64)
    bias = torch.randn(D, dtype=torch.float64)
    tokens = patch_project_reference(video, weight, bias, None, patch, grid)
    signal = (video.double() * 2 / 255 - 1).transpose(1, 2)  # B, C, T, H, W
    kernel = weight.unflatten(1, (depth, 3, side, side)).transpose(1, 2)
    expected = F.conv3d(signal, kernel, bias, stride=patch).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-4)


def test_audio_is_the_released_convolution() -> None:
    audio = torch.rand(3, 320, dtype=torch.float64) * 2 - 1
    weight, bias = torch.randn(D, 32, dtype=torch.float64), torch.randn(D, dtype=torch.float64)
    tokens = patch_project_reference(audio, weight, bias, None, (32,), (10,))
    torch.testing.assert_close(tokens, F.conv1d(audio[:, None], weight[:, None], bias, stride=32).transpose(1, 2))


def test_every_pixel_is_where_it_should_be() -> None:
    """An explicit loop over patches and their pixels, with kept indices in an order of their own for each sample."""
    pt, ph, pw = patch = (2, 3, 4)
    video = frames((2, 4, 3, 6, 12))
    grid = (2, 2, 3)
    index = torch.tensor([[11, 0, 7, 4], [3, 3, 10, 1]])
    patches = read_video_patches(video, patch, grid, index)
    for b in range(2):
        for k, token in enumerate(index[b].tolist()):
            t, h, w = token // 6, token // 3 % 2, token % 3
            at = 0
            for dt, c, dh, dw in itertools.product(range(pt), range(3), range(ph), range(pw)):
                pixel = video[b, t * pt + dt, c, h * ph + dh, w * pw + dw].item()
                assert patches[b, k, at].item() == pytest.approx(pixel / 127.5 - 1, abs=1e-6)
                at += 1
    assert patches.shape == (2, 4, at)


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_an_index_picks_from_all_patches(modality: str) -> None:
    if modality == "video":
        signal, read = frames((3, 4, 3, 16, 24)), lambda s, i: read_video_patches(s, (2, 8, 8), (2, 2, 3), i)
    else:
        signal, read = torch.rand(3, 120), lambda s, i: read_audio_patches(s, 10, 12, i)
    every = read(signal, None)
    index = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(b))[:7] for b in range(3)])
    some = read(signal, index)
    for b in range(3):
        assert some[b].equal(every[b, index[b]])
    assert read(signal, torch.arange(12).expand(3, 12)).equal(every)


def test_bytes_become_the_unit_range() -> None:
    levels = to_unit_range(torch.arange(256, dtype=torch.uint8))
    assert levels.dtype == torch.float32
    assert levels[0] == -1 and levels[255] == 1
    torch.testing.assert_close(levels, torch.linspace(-1, 1, 256), rtol=0, atol=1e-6)
    floats = torch.tensor([-1.0, 0.25, 1.0], dtype=torch.float64)
    assert to_unit_range(floats) is floats


@pytest.mark.parametrize("index", [None, torch.tensor([[5, 0, 2], [1, 7, 3]])])
def test_bytes_and_floats_give_the_same_tokens(index: Tensor | None) -> None:
    video = frames((2, 4, 3, 16, 16))
    before = video.clone()
    from_bytes = read_video_patches(video, (2, 8, 8), (2, 2, 2), index)
    from_floats = read_video_patches(video.float() / 127.5 - 1, (2, 8, 8), (2, 2, 2), index)
    torch.testing.assert_close(from_bytes, from_floats, rtol=0, atol=1e-6)
    assert video.equal(before), "the batch must not be written to"


def test_floor_leaves_the_remainder_out() -> None:
    video, audio = frames((1, 5, 3, 19, 23)), torch.rand(1, 37)
    assert read_video_patches(video, (2, 8, 8), (2, 2, 2), None).equal(
        read_video_patches(video[:, :4, :, :16, :16], (2, 8, 8), (2, 2, 2), None)
    )
    assert read_audio_patches(audio, 10, 3, None).flatten(1).equal(audio[:, :30])


@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_ceil_pads_the_remainder_with_the_middle_of_the_range(kind: str) -> None:
    """0 in [-1, 1] is grey and silence; a uint8 frame must not be padded with black."""
    pixels, audio = frames((1, 5, 3, 19, 23)), torch.rand(1, 37)
    video = pixels if kind == "uint8" else pixels.float() / 127.5 - 1
    padded = torch.zeros(1, 6, 3, 24, 24)
    padded[:, :5, :, :19, :23] = pixels.float() / 127.5 - 1
    index = torch.tensor([[26, 2, 8, 0]])
    for chosen in (None, index):
        ours = read_video_patches(video, (2, 8, 8), (3, 3, 3), chosen)
        torch.testing.assert_close(ours, read_video_patches(padded, (2, 8, 8), (3, 3, 3), chosen), rtol=0, atol=1e-6)
    last = read_audio_patches(audio, 10, 4, torch.tensor([[3]]))[0, 0]
    assert last.equal(torch.cat([audio[0, 30:], torch.zeros(3)]))


def test_one_axis_may_be_padded_while_another_is_cut() -> None:
    """A grid may ask for more frames than there are and for fewer rows."""
    video = torch.rand(1, 3, 3, 20, 16)
    patches = read_video_patches(video, (2, 8, 8), (2, 2, 2), None)
    padded = F.pad(video, (0, 0, 0, 0, 0, 0, 0, 1))[:, :, :, :16]
    assert patches.equal(read_video_patches(padded, (2, 8, 8), (2, 2, 2), None))


def test_each_kept_patch_gets_its_own_position() -> None:
    audio, weight, bias = torch.zeros(2, 35), torch.randn(D, 5), torch.randn(D)
    position, aggregate = torch.randn(7, D), torch.randn(D)
    index = torch.tensor([[6, 1, 3], [0, 2, 5]])
    tokens = patch_project_reference(audio, weight, bias, aggregate, (5,), (7,), index, position)
    torch.testing.assert_close(tokens[:, 1:], bias + position[index])
    assert tokens[:, 0].equal(aggregate.expand(2, D))
    all_tokens = patch_project_reference(audio, weight, bias, None, (5,), (7,), None, position)
    torch.testing.assert_close(all_tokens, (bias + position).expand(2, 7, D))


@pytest.mark.parametrize("implementation", ["reference", "native"])
@pytest.mark.parametrize("kept", [False, True])
def test_gradcheck_of_signal_weight_bias_aggregate_and_positions(implementation: str, kept: bool) -> None:
    def double(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    index = torch.tensor([[4, 1, 2], [0, 3, 2]]) if kept else None
    dropout = mask(2, torch.device("cpu"), rate=0.3)

    def project(signal: Tensor, w: Tensor, b: Tensor, a: Tensor, p: Tensor) -> Tensor:
        return patch_project(signal, w, b, a, (4,), (5,), index, p, dropout, implementation=implementation)

    assert torch.autograd.gradcheck(project, (double(2, 20), double(D, 4), double(D), double(D), double(5, D)))


def test_gradient_reaches_every_pixel_read_and_no_other() -> None:
    video = torch.rand(1, 2, 3, 16, 24, requires_grad=True)
    read_video_patches(video, (2, 8, 8), (1, 2, 3), torch.tensor([[4, 0]])).sum().backward()
    expected = torch.zeros_like(video)
    expected[..., 8:16, 8:16] = expected[..., :8, :8] = 1
    assert video.grad.equal(expected)


@pytest.mark.parametrize("implementation", ["reference", "native"])
def test_projection_follows_the_weights_dtype(implementation: str) -> None:
    weight, bias = torch.rand(D, 8).bfloat16(), torch.rand(D).bfloat16()
    tokens = patch_project(torch.rand(1, 16), weight, bias, None, (8,), (2,), implementation=implementation)
    assert tokens.dtype == torch.bfloat16


# ---- the op ----------------------------------------------------------------------------------------------------------

INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU in this process")
CPU = torch.device("cpu")


def case(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return next(c for c in row("patch_project").cases if c.name == name).make(dtype, CPU)


@INTERPRETED
@pytest.mark.parametrize("name", ["dropout_every_patch", "no_position", "wave", "no_aggregate"])
def test_opcheck(name: str) -> None:
    given = case(name)
    for key in ("weight_DF", "bias_D", "aggregate_D", "position_ND"):
        if given[key] is not None:
            given[key].requires_grad_()
    drawn = given["dropout"] or (0.0, None, None, None, 0)
    order = ("signal", "index_BK", "weight_DF", "bias_D", "position_ND", "aggregate_D", "patch", "grid")
    torch.library.opcheck(torch.ops.vatt.patch_project, (*(given[key] for key in order), *drawn))


@INTERPRETED
def test_only_kept_patches_are_read() -> None:
    """Everything else is NaN, and no token is."""
    given = case("float_frames")
    grid, index = given["grid"], given["index_BK"]
    (pt, ph, pw), h, w = given["patch"], grid[1], grid[2]
    frames = torch.full_like(given["signal"], float("nan"))
    for b, places in enumerate(index.tolist()):
        for place in places:
            t, y, x = place // (h * w) * pt, place // w % h * ph, place % w * pw
            part = (b, slice(t, t + pt), slice(None), slice(y, y + ph), slice(x, x + pw))
            frames[part] = given["signal"][part]
    whole = patch_project(**given, implementation="interpreter")
    assert patch_project(**given | {"signal": frames}, implementation="interpreter").equal(whole)


@INTERPRETED
@pytest.mark.parametrize("modality", ["bytes", "floats", "wave"])
def test_a_grid_beyond_the_signal_pads_with_the_middle(modality: str) -> None:
    if modality == "wave":
        patch, grid, signal = (10,), (4,), torch.rand(2, 37)
    else:
        patch, grid, signal = (2, 8, 8), (3, 3, 3), frames((2, 5, 3, 19, 23))
        signal = signal if modality == "bytes" else signal.float() / 127.5 - 1
    weight, bias = torch.randn(D, math.prod(patch) * (1 if modality == "wave" else 3)), torch.randn(D)
    for index in (None, torch.tensor([[3, 0], [2, 1]])):
        of = lambda how, i=index: patch_project(signal, weight, bias, None, patch, grid, i, implementation=how)  # noqa: E731
        torch.testing.assert_close(of("interpreter"), of("reference"), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(of("native"), of("reference"), rtol=1e-4, atol=1e-4)


@INTERPRETED
def test_a_shared_index_repeats_itself_without_a_copy() -> None:
    given = case("kept")
    shared = given["index_BK"][:1].expand(3, -1)
    assert shared.stride(0) == 0
    ours, plain = (
        gradients(row("patch_project").op, given | {"index_BK": i}, ["position_ND"], implementation="interpreter")
        for i in (shared, shared.contiguous())
    )
    for name, tensor in ours.items():
        assert tensor.equal(plain[name]), name


@INTERPRETED
def test_what_cannot_be_checked_without_waiting_shows_as_nan() -> None:
    """On a GPU an index outside the grid, and one that repeats itself, must neither stop the host nor go unseen."""
    from vatt.kernels.gpu.patch_project import forward
    from vatt.kernels.gpu.patch_project_backward import backward

    given = case("no_position")
    patch, grid = given["patch"], given["grid"]
    index = torch.tensor([[0, 8, 3, -1, 2], [1, 7, 1, 5, 2]])
    y = forward(given["signal"], index, given["weight_DF"], given["bias_D"], None, None, patch, grid, None)
    assert y.isnan().all(-1).tolist() == [[False, True, False, True, False], [False] * 5]
    grad = torch.ones_like(y)
    _, dbias, dposition, _ = backward(grad, given["signal"], index, patch, grid, True, False, None)
    assert dposition.isnan().all(-1).tolist() == [False, True] + [False] * 6
    assert dbias.isnan().all()


@INTERPRETED
def test_flops_are_counted_through_the_op() -> None:
    from vatt.kernels.gpu import patch_project as _  # noqa: F401 - registers the formulas

    given = case("kept")
    given["weight_DF"].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        tokens = patch_project(**given, implementation="interpreter")
        forward = counter.get_total_flops()
        tokens.sum().backward()
    assert forward == 2 * 3 * 7 * 40 * (4 * 3 * 16 * 16)
    assert counter.get_total_flops() == 2 * forward


@INTERPRETED
def test_parts_of_the_weight_gradient() -> None:
    """As few as leave no multiprocessor idle for long; never more than there are blocks of rows."""
    from vatt.kernels.gpu.patch_project_backward import splits_of

    assert splits_of(132, 700, 132) == 1
    assert splits_of(96, 784, 132) == 4  # 384 programs, 3 rounds of 132; 96, 192 and 288 leave a quarter idle
    assert splits_of(6, 600, 132) == 21  # 126 programs: near enough to 132
    assert splits_of(6, 5, 132) == 5
    assert splits_of(1, 1, 132) == 1


# ---- bytes -----------------------------------------------------------------------------------------------------------


class Loads:
    """Which addresses the interpreted kernels load, and how many bytes in all, by tensor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import interpreter_builder as builder

        self.total, self.distinct = 0, set[int]()
        load = type(builder).create_masked_load

        def counted(builder, pointers, mask, *rest):  # type: ignore[no-untyped-def]
            size = pointers.get_element_ty().primitive_bitwidth // 8
            wanted = pointers.data[mask.data]
            self.total += wanted.size * size
            for offset in range(size):
                self.distinct.update((wanted.astype("int64") + offset).flatten().tolist())
            return load(builder, pointers, mask, *rest)

        monkeypatch.setattr(type(builder), "create_masked_load", counted)


@INTERPRETED
@pytest.mark.parametrize(("B", "kept"), [(2, 6), (12, 11)])
def test_bytes_requested_are_the_least(B: int, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted load by load: at most 5 % above kept pixels, weights, positions and indices once; and with re-reads exactly
    what `traffic` says.
    """
    from vatt.kernels.gpu.patch_project import LARGE
    from vatt.kernels.gpu.target import TARGETS

    width, patch, grid = 150, (2, 16, 16), (2, 3, 4)
    make = _make(B, patch, grid, width, kept=kept)
    given = make(torch.float16, CPU)
    blocks = LARGE.pick(TARGETS["sm_90"]).blocks
    expected = traffic(given["index_BK"], patch, grid, width, blocks["BLOCK_M"], blocks["BLOCK_D"])
    loads = Loads(monkeypatch)
    tokens = patch_project(**given, implementation="interpreter")
    written = tokens.numel() * 2
    assert expected.least <= len(loads.distinct) + written <= 1.05 * expected.least
    assert loads.total + written == expected.l2


@pytest.mark.parametrize(("rate", "low", "high"), [(0.0, 1.0, 1.0), (0.5, 1.25, 1.35), (0.75, 1.35, 1.5)])
def test_sectors_at_video_large(rate: float, low: float, high: float) -> None:
    """Neighbouring rows of 16 bytes share a sector of 32, so dropping a patch does not always save its bytes."""
    seed, step = torch.tensor(1), torch.tensor(2)
    index = drop_tokens(1568, round(1568 * (1 - rate)), seed, step, torch.arange(64), 7)
    found = traffic(index, TUBELET, VIDEO, 1024, 128, 128)
    assert low <= found.sectors / found.least <= high
    # Weights come from the cache for every tile of rows, pixels for every tile of columns.
    assert found.l2 > found.least


def test_sectors_counted_one_by_one() -> None:
    """Against every byte of a few kept patches: 8 columns, a grid whose rows are no multiple of a sector."""
    patch, grid, index = (2, 4, 8), (2, 2, 3), torch.tensor([[0, 4, 5, 11]])
    numbers = torch.arange(4 * 3 * 8 * 24, dtype=torch.float64).view(1, 4, 3, 8, 24)
    touched = {int(n) // 32 for n in read_video_patches(numbers, patch, grid, index).flatten().tolist()}
    found = traffic(index, patch, grid, 8, 16, 16)
    assert found.sectors - found.least == 32 * len(touched) - 4 * math.prod(patch) * 3


# ---- bad input -------------------------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], str]] = [
    ({"signal": torch.zeros(2, 3, 4)}, r"signal: has shape \(2, 3, 4\); make it \(B, T, 3, H, W\) frames"),
    ({"signal": torch.zeros(0, 4, 3, 16, 24)}, "signal: has shape .*: nothing to read"),
    ({"signal": torch.zeros(2, 4, 3, 16, 24, dtype=torch.int32)}, "signal: is torch.int32; frames are uint8 or float"),
    ({"patch": (2, 8)}, r"patch: is \(2, 8\); give 3 sizes above 0"),
    ({"grid": (2, 0, 3)}, r"grid: is \(2, 0, 3\); give 3 sizes above 0"),
    ({"weight_DF": torch.zeros(D)}, r"weight: has shape \(6,\); make it \(D, F\)"),
    ({"weight_DF": torch.zeros(D, 384, dtype=torch.int64)}, "weight: is torch.int64; it must be floating point"),
    ({"weight_DF": torch.zeros(D, 380)}, "weight: has 380 columns; a patch has 384 features"),
    ({"bias_D": torch.zeros(5)}, r"bias: has shape \(5,\); make it \(6,\)"),
    ({"bias_D": torch.zeros(D).double()}, "bias: is torch.float64, weight is torch.float32; cast it"),
    ({"aggregate_D": torch.zeros(1, D)}, r"aggregate: has shape \(1, 6\); make it \(6,\)"),
    ({"position_ND": torch.zeros(11, D)}, r"position: has shape \(11, 6\); make it \(12, 6\)"),
    ({"position_ND": torch.zeros(12, D, device="meta")}, "position: is on meta, the rest on cpu; move it there"),
    ({"index_BK": torch.zeros(2, 0, dtype=torch.int64)}, r"index: has shape \(2, 0\); make it \(B, K\)"),
    ({"index_BK": torch.zeros(3, 2, dtype=torch.int64)}, r"index: has shape \(3, 2\); make it \(B, K\)"),
    ({"index_BK": torch.zeros(2, 2, dtype=torch.int32)}, "index: is torch.int32; make it int64"),
    ({"index_BK": torch.tensor([[0, 12], [1, 2]])}, "index: 12 is outside the grid of 12 patches"),
    ({"index_BK": torch.tensor([[0, 11], [-1, 2]])}, "index: -1 is outside the grid of 12 patches"),
    ({"dropout": mask(3, CPU)}, "sample_id: 2 rows are not a multiple of 3 samples"),
    ({"dropout": mask(2, CPU, rate=1.0)}, r"rate: 1.0 is not in \[0, 1\)"),
    ({"implementation": "fast"}, "implementation: 'fast' is not one of native, reference, interpreter"),
    ({"implementation": "interpreter", "signal": torch.zeros(2, 4, 3, 16, 24, requires_grad=True)}, "signal: wants a gradient"),
]


@INTERPRETED
@pytest.mark.parametrize(("change", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_input(change: dict[str, Any], message: str) -> None:
    good = {
        "signal": frames((2, 4, 3, 16, 24)),
        "weight_DF": torch.zeros(D, 384),
        "bias_D": torch.zeros(D),
        "aggregate_D": torch.zeros(D),
        "patch": (2, 8, 8),
        "grid": (2, 2, 3),
    }
    patch_project(**good)
    with pytest.raises(KernelError, match=f"^patch_project: {message}"):
        patch_project(**good | change)
