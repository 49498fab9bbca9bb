"""Features to the two common spaces, video-audio and video-text ("fac" heads of the released code; paper, section 3.3).

G = clips of the global batch, R = G x candidates, A = video-audio features, T = video-text features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vatt.engine.config import HeadsConfig

BATCH_NORM_MOMENTUM = 0.1  # TensorFlow's 0.9
BATCH_NORM_EPSILON = 1e-5


class BatchNorm(nn.Module):
    """Batch normalisation of rows that are already the whole global batch.

    Statistics, buffers and arithmetic are fp32 always. Scale and shift are fp32 as well, and stay so when the model is cast
    as a whole (`model.bfloat16()`); in bf16 training, though, a backend makes them bf16 working copies of fp32 masters like
    every other parameter (see backend.interface). The running variance is the biased one (Keras; PyTorch's own keeps the
    unbiased). A batch with a non-finite statistic leaves the buffers alone.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_variance", torch.ones(features))
        self.running_mean: Tensor
        self.running_variance: Tensor

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Follow the model to another device, never to another dtype: a bf16 running mean would swallow small moves."""

        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, features) in fp32; in fp64 if x is."""
        x = _at_least_float(x)
        if self.training:
            mean = x.mean(0)
            variance = (x - mean).square().mean(0)
            self._remember(mean.detach(), variance.detach())
        else:
            mean, variance = self.running_mean, self.running_variance
        return (x - mean) * torch.rsqrt(variance + BATCH_NORM_EPSILON) * self.weight + self.bias

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        finite = torch.isfinite(mean).all() & torch.isfinite(variance).all()
        for buffer, batch in ((self.running_mean, mean), (self.running_variance, variance)):
            buffer.copy_(torch.where(finite, torch.lerp(buffer, batch.to(buffer.dtype), BATCH_NORM_MOMENTUM), buffer))


def _at_least_float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class CommonSpaceHeads(nn.Module):
    """The hierarchy of projections: video -> video-audio space -> video-text space; audio and text one linear each.

    Batch norm is on the video path only. The video-text step starts from the batch-normalised, not L2-normalised,
    video-audio vector.
    """

    def __init__(self, config: HeadsConfig, video: int, audio: int, text: int) -> None:
        super().__init__()
        va, vt = config.video_audio, config.video_text
        self.video_hidden = nn.Linear(video, va, bias=False)
        self.video_hidden_norm = BatchNorm(va)
        self.video_audio = nn.Linear(va, va, bias=False)
        self.video_audio_norm = BatchNorm(va)
        self.video_text = nn.Linear(va, vt, bias=False)
        self.video_text_norm = BatchNorm(vt)
        self.audio = nn.Linear(audio, va)
        self.text = nn.Linear(text, vt)

    def project_video(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(G, A) and (G, T), fp32, not normalised."""
        dtype = self.video_hidden.weight.dtype
        hidden = F.relu(self.video_hidden_norm(self.video_hidden(features)))
        video_audio = self.video_audio_norm(self.video_audio(hidden.to(dtype)))
        video_text = self.video_text_norm(self.video_text(F.relu(video_audio).to(dtype)))
        return video_audio, video_text

    def project_audio(self, features: Tensor) -> Tensor:
        """(G, A) fp32, not normalised."""
        return _at_least_float(self.audio(features))

    def project_text(self, features: Tensor) -> Tensor:
        """(R, T) fp32, not normalised."""
        return _at_least_float(self.text(features))
