"""Reading and projecting patches, against an explicit loop and against PyTorch's own convolutions."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vatt.kernels.patch_project import (
    patch_project,
    patch_project_reference,
    read_audio_patches,
    read_video_patches,
    to_unit_range,
)
from vatt.kernels.rows.bias_gelu import mask

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
