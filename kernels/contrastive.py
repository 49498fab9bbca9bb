"""NCE and MIL-NCE of a common space, tile by tile: the loss of every clip without the matrix of all cosines.

Cosines of video i with candidate c of clip k, over a temperature, are the logits. They are computed in tiles, forward for
three log-sum-exps a clip (own candidates, row i, column block i), and again in backward from those. Memory is that of the
features and their gradients; the eager form keeps several G x G L matrices.

G clips, L candidates of a clip (1 sound, P captions), R = G L candidates, clip-major, D features.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vatt.kernels import contrastive_tiles as tiles
from vatt.kernels.implementation import gpu_module, require, resolve, same_device

Form = Literal["row_column", "symmetric", "all_pairs"]
FORMS = ("row_column", "symmetric", "all_pairs")
MASKED_LOGIT = -1e9
LEAST_LENGTH = 1e-6  # of a feature vector: 1e-12 under the root of the squared norm, as in the released code
WHOLE_UP_TO = 2**16  # logits: below, a CPU computes the whole matrix, see `contrastive`


def contrastive_reference(
    video_GD: Tensor, other_RD: Tensor, valid_GL: Tensor, temperature: float = 0.07, form: Form = "row_column"
) -> Tensor:
    """The losses from features in at least fp32, in that dtype."""
    exact = torch.promote_types(video_GD.dtype, torch.float32)
    return contrastive_eager(video_GD.to(exact), other_RD.to(exact), valid_GL, temperature, form)


def contrastive_eager(
    video_GD: Tensor, other_RD: Tensor, valid_GL: Tensor, temperature: float = 0.07, form: Form = "row_column"
) -> Tensor:
    """Cosines in the dtype of the features, logits and sums in at least fp32: what the kernel has to beat."""
    video_GD, other_RD = (F.normalize(x, dim=-1, eps=LEAST_LENGTH) for x in (video_GD, other_RD))
    cosine = (video_GD @ other_RD.T).to(torch.promote_types(video_GD.dtype, torch.float32))
    logits_GGL = (cosine / temperature).unflatten(1, valid_GL.shape).masked_fill(~valid_GL, MASKED_LOGIT)
    positive = logits_GGL.diagonal(dim1=0, dim2=1).T.logsumexp(-1)
    if form == "all_pairs":
        own = torch.eye(len(logits_GGL), dtype=torch.bool, device=logits_GGL.device)[:, :, None]
        sums = Sums(positive, logits_GGL.masked_fill(own, MASKED_LOGIT).logsumexp((0, 1, 2)).expand_as(positive), None)
    else:
        sums = Sums(positive, logits_GGL.logsumexp((1, 2)), logits_GGL.logsumexp((0, 2)))
    return losses_of(sums, valid_GL, form)


class Sums(NamedTuple):
    """Log-sum-exps of logits, (G,) each: over own candidates; over row i (video i with all candidates); over column block
    i (all videos with clip i's candidates). Of all_pairs, row is one number, over all non-matching pairs, and column None.
    """

    positive: Tensor
    row: Tensor
    column: Tensor | None


def losses_of(sums: Sums, valid_GL: Tensor, form: Form) -> Tensor:
    """(G,); 0 for a clip without a valid candidate.

    row_column: released default, "asymmetric NCE": both directions share one denominator,
    -log( sum over own candidates / (sum over row i + sum over column block i) ). Own pairs are in the row and in the
    column block, so a perfect match costs ln 2.
    symmetric: released option, "symmetric NCE": one term with the row as denominator plus one with the column block.
    all_pairs: the paper's equations 4 and 5: the denominator adds all non-matching pairs of the batch to the own pairs.
    """
    positive, row, column = sums
    if form == "symmetric" and column is not None:
        loss = (row - positive) + (column - positive)
    else:
        loss = torch.logaddexp(positive if column is None else column, row) - positive
    return torch.where(valid_GL.any(1), loss, 0.0)


class Slopes(NamedTuple):
    """dL/dlogit of a pair (i, k) is row e^(l - row_sum) of i plus column e^(l - column_sum) of k; (G,) each.

    A clip's own pairs have own e^(l - own_sum) besides (all_pairs: instead).
    """

    row: Tensor
    row_sum: Tensor
    column: Tensor | None
    column_sum: Tensor | None
    own: Tensor
    own_sum: Tensor


def slopes_of(grad_G: Tensor, sums: Sums, valid_GL: Tensor, form: Form) -> Slopes:
    """The weights of a pair's gradient from the gradients of the losses."""
    positive, row, column = sums
    grad = torch.where(valid_GL.any(1), grad_G, 0.0)
    if column is None:
        total = torch.logaddexp(positive, row)
        shared = (grad * (row - total).exp()).sum().expand_as(grad)
        return Slopes(shared, row, None, None, grad * (positive - total).expm1(), positive)
    if form == "symmetric":
        return Slopes(grad, row, grad, column, -2 * grad, positive)
    total = torch.logaddexp(row, column)
    return Slopes(grad, total, grad, total, -grad, positive)


def contrastive(
    video_GD: Tensor,
    other_RD: Tensor,
    valid_GL: Tensor,
    temperature: float = 0.07,
    form: Form = "row_column",
    implementation: str = "native",
) -> Tensor:
    """The loss of every clip, (G,) in fp32 (fp64 for fp64), differentiable in both features; 0 where no candidate is valid.

    video (G, D) and other (G L, D), clip-major, of one dtype, need not be normalised: that happens inside, in at least fp32,
    with 1e-12 under the root of the squared norm. valid (G, L) bool: candidates that count; the others are neither positives
    nor negatives. temperature divides the cosines. form: see `losses_of`. Every sum has a fixed order: the same bits again.

    Products on a GPU: bf16 features as they are; others in fp32 by three TF32 products, as exact as fp32, or by one where
    torch.set_float32_matmul_precision allows it. "interpreter" takes no bf16.
    implementation: see `vatt.kernels.implementation`. "native" on a CPU is the whole matrix up to 2^16 logits, where it
    is about as fast as tiles, and tiles above; "tiles" (a CPU's) is always tiles.
    Raises KernelError for what cannot be computed.
    """
    op = "contrastive"
    require(form in FORMS, op, "form", f"{form!r} is not one of {', '.join(FORMS)}")
    require(temperature > 0.0, op, "temperature", f"{temperature} is not positive; it divides the cosines")
    require(video_GD.is_floating_point(), op, "video", f"is {video_GD.dtype}; it must be floating point")
    shape = tuple(video_GD.shape)
    require(len(shape) == 2 and video_GD.numel() > 0, op, "video", f"has shape {shape}; it must be (clips, features)")
    require(valid_GL.dtype == torch.bool, op, "valid", f"is {valid_GL.dtype}; it must be bool")
    fits = valid_GL.dim() == 2 and valid_GL.shape[0] == shape[0] and valid_GL.numel() > 0
    require(fits, op, "valid", f"has shape {tuple(valid_GL.shape)}; it must be (clips, candidates) of {shape[0]} clips")
    expected = (valid_GL.numel(), shape[1])
    require(tuple(other_RD.shape) == expected, op, "other", f"has shape {tuple(other_RD.shape)}; it must be {expected}")
    require(other_RD.dtype == video_GD.dtype, op, "other", f"is {other_RD.dtype}, video is {video_GD.dtype}; cast it")
    same_device(op, video_GD, other=other_RD, valid=valid_GL)
    if implementation == "tiles":
        require(video_GD.device.type == "cpu", op, "implementation", "'tiles' takes CPU tensors; use 'native' on a GPU")
        how = "native"
    else:
        how = resolve(op, implementation, video_GD, ("native", "reference", "interpreter", "tiles"))
    if implementation != "tiles" and (how == "reference" or (how == "native" and shape[0] * valid_GL.numel() <= WHOLE_UP_TO)):
        return contrastive_reference(video_GD, other_RD, valid_GL, temperature, form)
    loss: Tensor = torch.ops.vatt.contrastive(video_GD, other_RD, valid_GL, temperature, form, how)[0]
    return loss


@torch.library.custom_op("vatt::contrastive", mutates_args=())
def _forward(
    video: Tensor, other: Tensor, valid: Tensor, temperature: float, form: str, implementation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, positive, row, column), (G,) each; column is empty in all_pairs."""
    module = tiles if implementation == "native" else gpu_module("contrastive")
    positive, row, column = module.forward(video, other, valid, temperature, form == "all_pairs")
    # A sum over nothing is that of masked logits, as in the reference: finite.
    positive, row = positive.clamp(min=MASKED_LOGIT), row.clamp(min=MASKED_LOGIT)
    column = None if column is None else column.clamp(min=MASKED_LOGIT)
    if form == "all_pairs":
        row = row.logsumexp(0).expand_as(row).contiguous()
    loss = losses_of(Sums(positive, row, column), valid, form)  # type: ignore[arg-type]
    return loss, positive, row, row.new_empty(0) if column is None else column


@_forward.register_fake
def _(video, other, valid, temperature, form, implementation):  # type: ignore[no-untyped-def]
    G, dtype = video.shape[0], torch.promote_types(video.dtype, torch.float32)
    loss, positive, row = (video.new_empty(G, dtype=dtype) for _ in range(3))
    return loss, positive, row, video.new_empty(0 if form == "all_pairs" else G, dtype=dtype)


@torch.library.custom_op("vatt::contrastive_backward", mutates_args=())
def _backward(
    grad: Tensor,
    video: Tensor,
    other: Tensor,
    valid: Tensor,
    positive: Tensor,
    row: Tensor,
    column: Tensor,
    temperature: float,
    form: str,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """(dvideo, dother)."""
    sums = Sums(positive, row, None if form == "all_pairs" else column)
    slopes = slopes_of(grad, sums, valid, form)  # type: ignore[arg-type]
    module = tiles if implementation == "native" else gpu_module("contrastive")
    found: tuple[Tensor, Tensor] = module.backward(slopes, video, other, valid, temperature)
    return found


@_backward.register_fake
def _(grad, video, other, valid, positive, row, column, temperature, form, implementation):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (video, other))


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    video, other, valid, *ctx.options = inputs
    ctx.save_for_backward(video, other, valid, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, grad, *_):  # type: ignore[no-untyped-def]
    return *_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
