"""How the released TensorFlow checkpoints name and lay out what our model holds.

Dense kernels there are (in, out), convolution kernels (time, rows, columns, channels, out), queries, keys and values are
separate. `to_released` turns our tensors, weights or gradients alike, into that form; `from_released` goes back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vatt.engine.config import RunConfig

ROOT = "model/layer_with_weights-0"


@dataclass(frozen=True)
class Name:
    """One parameter of ours, and the released keys whose tensors, once laid out our way, stack up to it."""

    ours: str
    released: tuple[str, ...]
    layout: str = "same"  # same | dense (transposed) | video_patch | audio_patch


def released_names(config: RunConfig) -> list[Name]:
    """Every parameter and buffer of the configuration's model."""
    base, head = f"{ROOT}/_base_layer", f"{ROOT}/_head_layer/_bridge_heads/0"
    names = list(_agnostic(base, config) if config.model.kind == "agnostic" else _specific(base, config))
    return names + list(_heads(head))


def to_released(tensors: Mapping[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """Our tensors by our names -> the released layout by the released keys; names not in `tensors` are left out."""
    out = {}
    for name in released_names(config):
        if name.ours in tensors:
            for key, part in zip(name.released, tensors[name.ours].chunk(len(name.released)), strict=True):
                out[key] = _lay_out(part, name.layout, config)
    return out


def from_released(arrays: Mapping[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """The released layout -> our tensors by our names. Raises KeyError naming the first key that is absent."""
    return {
        name.ours: torch.cat([_lay_back(arrays[key], name.layout) for key in name.released]) for name in released_names(config)
    }


def _lay_out(tensor: Tensor, layout: str, config: RunConfig) -> Tensor:
    if layout == "dense":
        return tensor.T
    if layout == "video_patch":
        frames, rows, columns = config.model.video.patch
        return tensor.T.unflatten(0, (frames, 3, rows, columns)).permute(0, 2, 3, 1, 4)
    if layout == "audio_patch":
        return tensor.T[:, None, :]
    return tensor


def _lay_back(tensor: Tensor, layout: str) -> Tensor:
    if layout == "dense":
        return tensor.T
    if layout == "video_patch":
        return tensor.permute(0, 3, 1, 2, 4).flatten(0, 3).T
    if layout == "audio_patch":
        return tensor[:, 0, :].T
    return tensor


def _norm(ours: str, released: str) -> Iterator[Name]:
    yield Name(f"{ours}.weight", (f"{released}/gamma",))
    yield Name(f"{ours}.bias", (f"{released}/beta",))


def _linear(ours: str, *released: str, bias: bool = True) -> Iterator[Name]:
    yield Name(f"{ours}.weight", tuple(f"{r}/kernel" for r in released), "dense")
    if bias:
        yield Name(f"{ours}.bias", tuple(f"{r}/bias" for r in released))


def _attention(ours: str, released: str, bias: bool) -> Iterator[Name]:
    yield from _linear(f"{ours}.qkv", *(f"{released}/{part}" for part in "qkv"), bias=bias)
    yield from _linear(f"{ours}.out", f"{released}/o", bias=bias)


def _encoder(ours: str, released: str, layers: int) -> Iterator[Name]:
    for i in range(layers):
        block, layer = f"{ours}.blocks.{i}", f"{released}/layers/{i}"
        yield from _norm(f"{block}.attention_norm", f"{layer}/layer_norm")
        yield from _attention(f"{block}.attention", f"{layer}/mha", bias=True)
        yield from _norm(f"{block}.feed_forward_norm", f"{layer}/feed_forward/layer_norm")
        yield from _linear(f"{block}.feed_forward.up", f"{layer}/feed_forward/mlp/wi")
        yield from _linear(f"{block}.feed_forward.down", f"{layer}/feed_forward/mlp/wo")
    yield from _norm(f"{ours}.norm", f"{released}/final_layer_norm")


def _patches(ours: str, projection: str, positions: str, modality: str) -> Iterator[Name]:
    yield Name(f"{ours}.weight", (f"{projection}/kernel",), f"{modality}_patch")
    yield Name(f"{ours}.bias", (f"{projection}/bias",))
    axes = ("temporal", "vertical", "horizontal") if modality == "video" else ("temporal",)
    for i, axis in enumerate(axes):
        yield Name(f"{ours}.positions.tables.{i}", (f"{positions}/{axis}_position_embeddings/embeddings",))
    yield from _norm(f"{ours}.positions.norm", f"{positions}/layernorm")


def _specific(base: str, config: RunConfig) -> Iterator[Name]:
    for modality, folder, projection in (
        ("video", "vid_backbone", "voxel_to_patch"),
        ("audio", "aud_backbone", "wave_to_patch"),
    ):
        tower = f"{base}/{folder}/_base"
        yield Name(f"{modality}.aggregate", (f"{tower}/agg_embedding",))
        yield from _patches(f"{modality}.tokens", f"{tower}/{projection}", f"{tower}/pos_embedding_lookup", modality)
        yield from _encoder(f"{modality}.encoder", f"{tower}/tx", getattr(config.model, modality).layers)
    text, language_model = f"{base}/txt_backbone", f"{base}/txt_backbone/base_lm"
    yield Name("text.aggregate", (f"{text}/agg_embedding",))
    yield Name("text.words.weight", (f"{text}/embedding/embeddings",))
    yield from _linear("text.projection", f"{text}/pre_proj", bias=False)
    first = f"{language_model}/layers/0/self_attention/attention"
    yield Name("text.relative_bias.table", (f"{first}/relative_attention_bias/embeddings",))
    for i in range(config.model.text.layers):
        block, layer = f"text.blocks.{i}", f"{language_model}/layers/{i}"
        yield Name(f"{block}.attention_norm.weight", (f"{layer}/self_attention/layer_norm/weight",))
        yield from _attention(f"{block}.attention", f"{layer}/self_attention/attention", bias=False)
        yield from _norm(f"{block}.feed_forward_norm", f"{layer}/feed_forward/layer_norm")
        yield from _linear(f"{block}.feed_forward.up", f"{layer}/feed_forward/mlp/wi", bias=False)
        yield from _linear(f"{block}.feed_forward.down", f"{layer}/feed_forward/mlp/wo", bias=False)
    yield Name("text.norm.weight", (f"{language_model}/final_layer_norm/weight",))


def _agnostic(base: str, config: RunConfig) -> Iterator[Name]:
    unified = f"{base}/unified_backbone/unified_transformer"
    for modality, short in (("video", "vid"), ("audio", "aud"), ("text", "txt")):
        yield Name(f"{modality}.aggregate", (f"{unified}/{short}_agg_embedding",))
        yield from _linear(f"{modality}.pre_projection.0", f"{unified}/pre_proj/{modality}")
        yield from _linear(f"{modality}.post_projection.0", f"{unified}/post_proj/{modality}")
        embeddings, positions = f"{unified}/raw_to_embeddings/{modality}", f"{unified}/pos_embedding_lookup/{modality}"
        if modality == "text":
            yield Name("text.words.weight", (f"{embeddings}/embeddings",))
            yield Name("text.positions.tables.0", (f"{positions}/temporal_position_embeddings/embeddings",))
            yield from _norm("text.positions.norm", f"{positions}/layernorm")
        else:
            yield from _patches(f"{modality}.tokens", embeddings, positions, modality)
    yield from _encoder("encoder", f"{unified}/tx", config.model.shared.layers)


def _heads(head: str) -> Iterator[Name]:
    yield from _linear("heads.video_hidden", f"{head}/vid_to_hid", bias=False)
    yield from _linear("heads.video_audio", f"{head}/hid_to_va/dense", bias=False)
    yield from _linear("heads.video_text", f"{head}/va_to_vat/dense", bias=False)
    yield from _linear("heads.audio", f"{head}/aud_to_va")
    yield from _linear("heads.text", f"{head}/txt_to_vat")
    for ours, released in (
        ("video_hidden_norm", "hid_to_va/pre_bn"),
        ("video_audio_norm", "hid_to_va/bn"),
        ("video_text_norm", "va_to_vat/bn"),
    ):
        yield from _norm(f"heads.{ours}", f"{head}/{released}")
        yield Name(f"heads.{ours}.running_mean", (f"{head}/{released}/moving_mean",))
        yield Name(f"heads.{ours}.running_variance", (f"{head}/{released}/moving_variance",))
