"""What every speed comparison is measured against: one VATT training step in plain PyTorch, written with care.

Good practice and nothing of ours: packed QKV, patches gathered before a Linear projection (no Conv3d, dropped patches are
never projected), `scaled_dot_product_attention`, exact GELU, fused Adam, and the whole in one of three precisions:

    bf16      bf16 weights and activations, fp32 masters; heads and losses in fp32
    autocast  fp32 weights, torch.autocast
    fp32      fp32 throughout

eager or compiled. A comparison takes the fastest of what the device runs well (`contestants`). Dropout is 0.
`build("bbs", "cpu", "fp32")` returns a `Step` that can be called for one step on synthetic clips, and a record of what it runs.

Legend: B clips, N tokens with AGG, K kept patches, F features of a patch, D width, H heads, P caption candidates, L words.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Precision = Literal["bf16", "autocast", "fp32"]


@dataclass(frozen=True)
class Step:
    """A training step in its two parts, so that they can be timed apart; calling it does both and returns the loss."""

    forward_backward: Callable[[], Tensor]
    update: Callable[[], object]

    def __call__(self) -> Tensor:
        loss = self.forward_backward()
        self.update()
        return loss


# (layers, width, heads, hidden) of the paper's Table 8; the towers of each model by name.
TOWERS = {
    "small": (6, 512, 8, 2048),
    "base": (12, 768, 12, 3072),
    "medium": (12, 1024, 16, 4096),
    "large": (24, 1024, 16, 4096),
}
MODELS = {"bbs": ("base", "base"), "mbs": ("medium", "base"), "lbs": ("large", "base")}

FRAMES, SIZE, SAMPLES = 32, 224, 153_600
TUBELET, WAVE_PATCH = (4, 16, 16), 128
GRID = (FRAMES // TUBELET[0], SIZE // TUBELET[1], SIZE // TUBELET[2])
CAPTIONS, WORDS, VOCABULARY, WORD_WIDTH = 5, 16, 65_536, 300
BIAS_BUCKETS, BIAS_DISTANCE, TEMPERATURE = 32, 64, 0.07


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool, scale: float):
        super().__init__()
        self.heads, self.scale = heads, scale
        self.qkv, self.out = nn.Linear(width, 3 * width, bias), nn.Linear(width, width, bias)

    def forward(self, x_BND: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x_BND).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out_BHNE = F.scaled_dot_product_attention(
            q, k, v, None if mask is None else mask.to(q.dtype), 0.0, False, scale=self.scale
        )
        return self.out(out_BHNE.transpose(1, 2).flatten(2))


class RMSNorm(nn.RMSNorm):
    def __init__(self, width: int):
        super().__init__(width, eps=1e-6)


class Block(nn.Module):
    """Pre-norm; `text` = T5's: RMS norm before attention, no bias in the linears, unscaled scores."""

    def __init__(self, width: int, heads: int, hidden: int, text: bool):
        super().__init__()
        self.norm1 = RMSNorm(width) if text else nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads, not text, 1.0 if text else (width // heads) ** -0.5)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.up, self.down = nn.Linear(width, hidden, not text), nn.Linear(hidden, width, not text)

    def forward(self, x_BND: Tensor, mask: Tensor | None = None) -> Tensor:
        x_BND = x_BND + self.attention(self.norm1(x_BND), mask)
        return x_BND + self.down(F.gelu(self.up(self.norm2(x_BND))))


class SignalTower(nn.Module):
    """Kept patches -> Linear + LayerNorm(sum of positions) -> AGG in front -> blocks -> AGG feature."""

    def __init__(self, size: str, features: int, axes: tuple[int, ...]):
        super().__init__()
        layers, width, heads, hidden = TOWERS[size]
        self.axes = axes
        self.projection = nn.Linear(features, width)
        self.positions = nn.ParameterList(nn.Parameter(torch.randn(n, width) * width**-0.5) for n in axes)
        self.position_norm, self.norm = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.aggregate = nn.Parameter(torch.randn(width) * width**-0.5)
        self.blocks = nn.ModuleList(Block(width, heads, hidden, text=False) for _ in range(layers))

    def forward(self, patches_BKF: Tensor, index_BK: Tensor) -> Tensor:
        table = self.positions[0]
        for axis in list(self.positions)[1:]:
            table = (table[:, None] + axis[None]).flatten(0, 1)
        x = self.projection(patches_BKF.to(self.projection.weight.dtype)) + self.position_norm(table)[index_BK]
        x = torch.cat([self.aggregate.to(x.dtype).expand(len(x), 1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


class TextTower(nn.Module):
    """T5-like: learned word table, AGG in word space, Linear + GELU, relative bias shared by all blocks."""

    def __init__(self) -> None:
        super().__init__()
        layers, width, heads, hidden = TOWERS["small"]
        self.words = nn.Embedding(VOCABULARY, WORD_WIDTH)
        self.aggregate = nn.Parameter(torch.randn(WORD_WIDTH) * WORD_WIDTH**-0.5)
        self.projection = nn.Linear(WORD_WIDTH, width, bias=False)
        self.relative_bias = nn.Parameter(torch.rand(BIAS_BUCKETS, heads) * 0.1 - 0.05)
        self.blocks = nn.ModuleList(Block(width, heads, hidden, text=True) for _ in range(layers))
        self.norm = RMSNorm(width)
        self.register_buffer("bucket", _relative_buckets(WORDS + 1), persistent=False)

    def forward(self, ids_RL: Tensor) -> Tensor:
        visible = F.pad(ids_RL != 0, (1, 0), value=True)[:, None, None, :]
        mask = self.relative_bias[self.bucket].permute(2, 0, 1)[None] + torch.where(visible, 0.0, -1e9)
        words = self.words(ids_RL)
        x = F.gelu(self.projection(torch.cat([self.aggregate.to(words.dtype).expand(len(words), 1, -1), words], 1)))
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)[:, 0]


class Heads(nn.Module):
    """The common spaces; batch norm on the video path only."""

    def __init__(self, video: int, audio: int, text: int):
        super().__init__()
        self.hidden, self.bn_hidden = nn.Linear(video, 512, bias=False), nn.BatchNorm1d(512)
        self.va, self.bn_va = nn.Linear(512, 512, bias=False), nn.BatchNorm1d(512)
        self.vt, self.bn_vt = nn.Linear(512, 256, bias=False), nn.BatchNorm1d(256)
        self.audio, self.text = nn.Linear(audio, 512), nn.Linear(text, 256)

    def forward(self, video: Tensor, audio: Tensor, text: Tensor) -> Tensor:
        """The loss: NCE (video, audio) and MIL-NCE (video, text), averaged."""
        va = self.bn_va(self.va(F.relu(self.bn_hidden(self.hidden(video)))))
        vt = self.bn_vt(self.vt(F.relu(va)))
        return 0.5 * (mil_nce(va, self.audio(audio), 1) + mil_nce(vt, self.text(text), CAPTIONS))


def mil_nce(video_BD: Tensor, other_RD: Tensor, candidates: int) -> Tensor:
    """Row and column in one denominator, `candidates` positives a clip."""
    logits = (F.normalize(video_BD, dim=-1) @ F.normalize(other_RD, dim=-1).T / TEMPERATURE).unflatten(1, (-1, candidates))
    own = logits.diagonal(dim1=0, dim2=1).T.logsumexp(-1)
    return (torch.logaddexp(logits.logsumexp((1, 2)), logits.logsumexp((0, 2))) - own).mean()


class PlainVATT(nn.Module):
    def __init__(self, model: str, drop_rate: float):
        super().__init__()
        video, audio = MODELS[model]
        self.drop_rate = drop_rate
        self.video = SignalTower(video, 3 * TUBELET[0] * TUBELET[1] * TUBELET[2], GRID)
        self.audio = SignalTower(audio, WAVE_PATCH, (SAMPLES // WAVE_PATCH,))
        self.text = TextTower()
        self.heads = Heads(TOWERS[video][1], TOWERS[audio][1], TOWERS["small"][1])

    def forward(self, video_BTCHW: Tensor, audio_BS: Tensor, ids_BPL: Tensor) -> Tensor:
        rows = torch.arange(len(audio_BS), device=audio_BS.device)[:, None]
        (t, h, w), (pt, ph, pw) = GRID, TUBELET
        tiles = video_BTCHW.unflatten(1, (t, pt)).unflatten(4, (h, ph)).unflatten(6, (w, pw))
        kept_v, kept_a = self.kept(rows, t * h * w), self.kept(rows, SAMPLES // WAVE_PATCH)
        pixels = tiles[rows, kept_v // (h * w), :, :, kept_v // w % h, :, kept_v % w].flatten(2).float() * (2 / 255) - 1
        waves = audio_BS.unflatten(1, (-1, WAVE_PATCH))[rows, kept_a]
        features = self.video(pixels, kept_v), self.audio(waves, kept_a), self.text(ids_BPL.flatten(0, 1))
        with torch.autocast(audio_BS.device.type, enabled=False):
            return self.heads(*(x.float() for x in features))

    def kept(self, rows: Tensor, total: int) -> Tensor:
        """int64 (B, K): which patches each clip keeps, in order."""
        kept = int(total * (1 - self.drop_rate) + 1e-6)
        return torch.rand(len(rows), total, device=rows.device).topk(kept, dim=1).indices.sort(dim=1).values


@dataclass
class Info:
    """What a built step runs."""

    model: str
    batch: int
    drop_rate: float
    precision: Precision
    compiled: bool
    parameters: int


def build(
    size: str,
    device: str,
    precision: Precision = "bf16",
    *,
    batch: int = 2,
    drop_rate: float = 0.5,
    compiled: bool = False,
    backends: list | None = None,
) -> tuple[Step, Info]:
    """(step, info): each call of `step` is one whole training step on the same synthetic clips and returns its loss.

    size: bbs, mbs or lbs. backends: SDPA backends in order of preference (torch.nn.attention), None = PyTorch's choice.
    """
    if size not in MODELS:
        raise ValueError(f"size: {size!r} is not one of {', '.join(MODELS)}")
    torch.manual_seed(0)
    model = PlainVATT(size, drop_rate).to(device)
    masters = list(model.parameters())
    if precision == "bf16":
        masters = [p.detach().clone() for p in masters]
        for tower in (model.video, model.audio, model.text):
            tower.to(torch.bfloat16)
    adam = torch.optim.Adam(masters, lr=1e-4, fused=True)
    forward = torch.compile(model) if compiled else model
    video = torch.randint(0, 256, (batch, FRAMES, 3, SIZE, SIZE), dtype=torch.uint8, device=device)
    audio = torch.rand(batch, SAMPLES, device=device) * 2 - 1
    ids = torch.randint(1, VOCABULARY, (batch, CAPTIONS, WORDS), device=device)

    def forward_backward() -> Tensor:
        with contextlib.ExitStack() as stack:
            if backends is not None:
                stack.enter_context(torch.nn.attention.sdpa_kernel(backends, set_priority=True))
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "autocast"):
                loss = forward(video, audio, ids)
            loss.backward()
        return loss.detach()

    def update() -> None:
        if precision == "bf16":
            for master, weight in zip(masters, model.parameters(), strict=True):
                master.grad = weight.grad.float()
        adam.step()
        if precision == "bf16":
            with torch.no_grad():
                torch._foreach_copy_(list(model.parameters()), masters)
        model.zero_grad(set_to_none=True)

    return Step(forward_backward, update), Info(
        size, batch, drop_rate, precision, compiled, sum(p.numel() for p in model.parameters())
    )


def contestants(device: str) -> list[Precision]:
    """The precisions worth a place among the best-of: bf16 and autocast only where bf16 products are no slower than fp32.

    A processor without bf16 products runs them up to 200 times slower; a whole step would take ten minutes.
    """
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.randn(512, 768, device=device, dtype=dtype), torch.randn(768, 768, device=device, dtype=dtype)
        for _ in range(3):  # the last, warm one counts
            start = time.perf_counter()
            float((x @ weight).sum())
            seconds[dtype] = time.perf_counter() - start
    return ["bf16", "autocast"] if seconds[torch.bfloat16] < seconds[torch.float32] else ["fp32"]


def _relative_buckets(length: int) -> Tensor:
    """T5's bidirectional buckets of key minus query."""
    position = torch.arange(length)
    offset = position[None] - position[:, None]
    half, exact = BIAS_BUCKETS // 2, BIAS_BUCKETS // 4
    distance = offset.abs()
    far = exact + ((distance.clamp(min=1) / exact).log() / torch.tensor(BIAS_DISTANCE / exact).log() * (half - exact)).long()
    return torch.where(distance < exact, distance, far.clamp(max=half - 1)) + half * (offset > 0)


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for precision in contestants(device):
        step, info = build("bbs", device, precision)
        for _ in range(3):
            start = time.perf_counter()
            loss = float(step())
            print(f"{info.model} {precision} batch {info.batch}: {time.perf_counter() - start:.2f} s, loss {loss:.4f}")
