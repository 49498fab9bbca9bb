"""Zero-shot retrieval: which video does this sentence, or this sound, belong to?

Every clip is seen in K windows. Their raw head outputs are averaged, then normalised, then compared by cosine: the
paper's way (the released code's "embd" mode). A sentence meets videos in the video-text space, a sound in the video-audio
space. The query sentence of a clip is its first caption.

N = clips, A = features of the video-audio space, T = of the video-text space.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vatt.engine.config import RunConfig
from vatt.engine.data.catalogue import Catalogue, Clip
from vatt.engine.data.words import Vocabulary, has_known_word, split_words
from vatt.engine.durable import replace_file
from vatt.engine.evaluate.metrics import chance, cosine_similarity, oracle, ranks, retrieval_metrics
from vatt.engine.progress import Progress

if TYPE_CHECKING:
    from vatt.engine.model import VATT
    from vatt.engine.run_directory import RunDirectory

THUMBNAILS, THUMBNAIL_PIXELS = 3, 64
TOP = 5
# Queries compared at a time, and the clips whose similarities are kept for the report's plots.
BLOCK, PLOTTED = 1024, 300
# What the sounds of a sample world tell: they are made from the shape and the motion.
WORLD_ATTRIBUTES = ("shape", "colour", "motion")
HEARD_ATTRIBUTES = ("shape", "motion")


@dataclass
class Embeddings:
    """Raw embeddings of a catalogue, float32; rows of clips that `found`, `heard` or `read` deny are zero.

    video_audio, audio_video (N, A); video_text, text_video (N, T); found, heard, read bool (N,): the clip could be
    decoded, has sound, has a first caption with a known word. thumbnails uint8 (N, F, h, w, 3): frames of one window.
    """

    video_audio: np.ndarray
    audio_video: np.ndarray
    video_text: np.ndarray
    text_video: np.ndarray
    found: np.ndarray
    heard: np.ndarray
    read: np.ndarray
    thumbnails: np.ndarray


@dataclass(frozen=True)
class Direction:
    """One kind of retrieval: which embeddings ask, which answer, and which clips take part in each."""

    name: str
    query: str
    gallery: str
    asks: str
    answers: str


DIRECTIONS = (
    Direction("text_to_video", "text_video", "video_text", "read", "found"),
    Direction("audio_to_video", "audio_video", "video_audio", "heard", "found"),
    Direction("video_to_audio", "video_audio", "audio_video", "heard", "heard"),
)


def retrieval(source: Path | str, catalogue: Path | str) -> dict[str, Any]:
    """`vatt evaluate retrieval`: the scores of what `source` names on a catalogue, after printing them as a table."""
    from vatt.engine.pretrained import load_trained

    clips = Catalogue.read(catalogue)  # first: a bad row should not wait for the weights
    trained = load_trained(source)
    scores, _ = evaluate_retrieval(trained.model, trained.config, clips, trained.vocabulary)
    print(table(scores))
    return scores


def evaluate_run(directory: RunDirectory, model: VATT, catalogue: Catalogue, vocabulary: Vocabulary) -> dict[str, Any]:
    """Evaluate a run's model, keep what its report shows (`evaluation.json`, `evaluation.npz`), and say the scores."""
    directory.say(f"evaluating zero-shot retrieval on {catalogue.path}: {len(catalogue)} clips")
    scores, embeddings = evaluate_retrieval(model, directory.config, catalogue, vocabulary)
    keep_for_report(directory.path, directory.config, catalogue, scores, embeddings)
    directory.say(table(scores))
    return scores


def evaluate_retrieval(
    model: VATT, config: RunConfig, catalogue: Catalogue, vocabulary: Vocabulary
) -> tuple[dict[str, Any], Embeddings]:
    """Scores of all directions, each with its queries, gallery, chance and oracle, and the embeddings behind them.

    A clip that cannot be decoded takes no part, and is counted in clips: {"expected", "found", "heard", "read"}.
    Fractions are of 1; what is undefined (no queries, no known oracle) is None.
    """
    embeddings = embed_catalogue(model, config, catalogue, vocabulary)
    clips = {"expected": len(catalogue)} | {name: int(getattr(embeddings, name).sum()) for name in ("found", "heard", "read")}
    scores: dict[str, Any] = {"catalogue": str(catalogue.path), "windows": config.evaluate.windows, "clips": clips}
    for direction in DIRECTIONS:
        scores[direction.name] = score(direction, embeddings, catalogue)
    return scores, embeddings


def score(direction: Direction, embeddings: Embeddings, catalogue: Catalogue) -> dict[str, Any]:
    """Scores of one direction beside those of chance and of the oracle."""
    asking, answering = members(direction, embeddings)
    place = {int(clip): position for position, clip in enumerate(answering)}
    gallery = getattr(embeddings, direction.gallery)[answering]
    found = [np.empty(0, np.int64)]
    for block in np.split(asking, range(BLOCK, len(asking), BLOCK)):
        if len(block):
            similarity = cosine_similarity(getattr(embeddings, direction.query)[block], gallery)
            found.append(ranks(similarity, np.array([place[int(clip)] for clip in block])))
    keys = oracle_keys(direction.name, catalogue)
    best = None if keys is None else oracle([keys[i] for i in asking], [keys[i] for i in answering])
    return {
        "queries": len(asking),
        "gallery": len(answering),
        **_known(retrieval_metrics(np.concatenate(found))),
        "chance": _known(chance(len(answering))),
        "oracle": best and _known(best),
    }


def members(direction: Direction, embeddings: Embeddings) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the clips that ask and of those that answer. Only a clip that is itself in the gallery asks."""
    answers = embeddings.found & getattr(embeddings, direction.answers)
    asks = answers & getattr(embeddings, direction.asks)
    return np.flatnonzero(asks), np.flatnonzero(answers)


def oracle_keys(direction: str, catalogue: Sequence[Clip]) -> list[Hashable] | None:
    """All that a perfect reader can tell of each clip in this direction, or None if the catalogue does not say.

    Clips with labels `shape:`, `colour:` and `motion:` (a sample world's) are what these say; a sound tells the shape and
    the motion. Of other clips only the words of the first caption are known, which says nothing of sounds.
    """
    attributes = [dict(label.split(":", 1) for label in clip.labels if ":" in label) for clip in catalogue]
    text = direction == "text_to_video"
    if all(name in found for found in attributes for name in WORLD_ATTRIBUTES):
        told = WORLD_ATTRIBUTES if text else HEARD_ATTRIBUTES
        return [tuple(found[name] for name in told) for found in attributes]
    if text:
        return [tuple(split_words(clip.captions[0].text)) if clip.captions else () for clip in catalogue]
    return None


def embed_catalogue(model: VATT, config: RunConfig, catalogue: Catalogue, vocabulary: Vocabulary) -> Embeddings:
    """Embeddings of every clip that can be decoded, on the model's device, with every token kept and nothing augmented.

    The model is left in the mode (training or evaluation) it was in.
    """
    from vatt.engine.data.loader import evaluation_batches

    device, count, heads = next(model.parameters()).device, len(catalogue), config.model.heads
    sums = {
        "video_audio": np.zeros((count, heads.video_audio), np.float32),
        "audio_video": np.zeros((count, heads.video_audio), np.float32),
        "video_text": np.zeros((count, heads.video_text), np.float32),
    }
    seen, heard = np.zeros(count, np.int64), np.zeros(count, np.int64)
    thumbnails: dict[int, np.ndarray] = {}
    progress = Progress(count, noun="clip")
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for clip_B, _, batch in evaluation_batches(config, catalogue, vocabulary):
                batch = batch.to(device)
                video_audio, video_text = model.heads.project_video(model.encode_video(batch.video))
                audio_video = model.heads.project_audio(model.encode_audio(batch.audio))
                with_sound = batch.has_audio.cpu().numpy()
                np.add.at(sums["video_audio"], clip_B, _array(video_audio))
                np.add.at(sums["video_text"], clip_B, _array(video_text))
                np.add.at(sums["audio_video"], clip_B[with_sound], _array(audio_video)[with_sound])
                np.add.at(seen, clip_B, 1)
                np.add.at(heard, clip_B[with_sound], 1)
                for row, clip in enumerate(clip_B.tolist()):
                    if clip not in thumbnails:
                        thumbnails[clip] = thumbnail(batch.video[row])
                progress.report({"step": int((seen > 0).sum())})
            text_video, read = embed_captions(model, config, catalogue, vocabulary)
    finally:
        progress.close()
        model.train(was_training)
    shape = next(iter(thumbnails.values())).shape if thumbnails else (THUMBNAILS, 1, 1, 3)
    blank = np.zeros(shape, np.uint8)
    return Embeddings(
        video_audio=sums["video_audio"] / np.maximum(seen, 1)[:, None],
        audio_video=sums["audio_video"] / np.maximum(heard, 1)[:, None],
        video_text=sums["video_text"] / np.maximum(seen, 1)[:, None],
        text_video=text_video,
        found=seen > 0,
        heard=heard > 0,
        read=read,
        thumbnails=np.stack([thumbnails.get(i, blank) for i in range(count)]) if count else blank[None][:0],
    )


def embed_captions(
    model: VATT, config: RunConfig, catalogue: Sequence[Clip], vocabulary: Vocabulary
) -> tuple[np.ndarray, np.ndarray]:
    """(N, T) embeddings of the clips' first captions, and which clips have one with a known word."""
    device = next(model.parameters()).device
    words_NL = np.zeros((len(catalogue), config.data.words), np.int64)
    for i, clip in enumerate(catalogue):
        if clip.captions:
            words_NL[i] = vocabulary.encode(clip.captions[0].text, config.data.words)
    read = np.array([has_known_word(words) for words in words_NL], dtype=bool)
    result = np.zeros((len(catalogue), config.model.heads.video_text), np.float32)
    rows = np.flatnonzero(read)
    # A caption costs a hundredth of a clip, so many more fit at a time.
    for block in np.split(rows, range(256, len(rows), 256)):
        if len(block):
            ids_RL = torch.from_numpy(words_NL[block]).to(device)
            result[block] = _array(model.heads.project_text(model.encode_text(ids_RL)))
    return result, read


def thumbnail(video_TCHW: Tensor) -> np.ndarray:
    """uint8 (F, h, w, 3): a few frames, at most THUMBNAIL_PIXELS high, of uint8 or [-1, 1] frames."""
    frames = video_TCHW[torch.linspace(0, video_TCHW.shape[0] - 1, THUMBNAILS).round().long()]
    small = frames.float() if frames.dtype == torch.uint8 else (frames.float() + 1) * 127.5
    height, width = frames.shape[-2:]
    if height > THUMBNAIL_PIXELS:
        small = F.interpolate(small, (THUMBNAIL_PIXELS, max(1, round(width * THUMBNAIL_PIXELS / height))), mode="area")
    return small.round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def keep_for_report(
    folder: Path, config: RunConfig, catalogue: Catalogue, scores: dict[str, Any], embeddings: Embeddings
) -> None:
    """Write `evaluation.npz` (similarities for the plots, thumbnails of the strips), then `evaluation.json`."""
    import io

    arrays: dict[str, np.ndarray] = {}
    for direction in DIRECTIONS:
        asking, _ = members(direction, embeddings)
        some = asking[np.unique(np.linspace(0, len(asking) - 1, PLOTTED).round().astype(int))] if len(asking) else asking
        query, gallery = getattr(embeddings, direction.query)[some], getattr(embeddings, direction.gallery)[some]
        arrays[f"similarity/{direction.name}"] = cosine_similarity(query, gallery).astype(np.float32)
    shown, pictures = strips(config.evaluate.strips, catalogue, embeddings)
    arrays["thumbnails"] = embeddings.thumbnails[pictures]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # the stub takes **kwds for allow_pickle
    replace_file(folder / "evaluation.npz", buffer.getvalue())
    replace_file(folder / "evaluation.json", json.dumps(scores | {"step": config.steps, "strips": shown}, indent=1) + "\n")


def strips(count: int, catalogue: Catalogue, embeddings: Embeddings) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Up to `count` sentences spread over the catalogue with the TOP videos each finds, and the clips to be pictured.

    A strip: text, clip (the true one's id), rank of it, true (its picture), top: [{clip, similarity, picture, is_true}].
    """
    direction = DIRECTIONS[0]
    asking, answering = members(direction, embeddings)
    if not len(asking) or not count:
        return [], np.empty(0, np.int64)
    chosen = asking[np.unique(np.linspace(0, len(asking) - 1, count).round().astype(int))]
    similarity = cosine_similarity(embeddings.text_video[chosen], embeddings.video_text[answering])
    place = np.searchsorted(answering, chosen)
    rank = ranks(similarity, place)
    best = np.argsort(-similarity, axis=1, kind="stable")[:, :TOP]
    pictures = np.unique(np.concatenate([chosen, answering[best].ravel()]))
    picture = {int(clip): position for position, clip in enumerate(pictures)}
    shown = []
    for i, clip in enumerate(chosen.tolist()):
        top = [
            {
                "clip": catalogue[int(answering[j])].id,
                "similarity": round(float(similarity[i, j]), 4),
                "picture": picture[int(answering[j])],
                "is_true": int(answering[j]) == clip,
            }
            for j in best[i]
        ]
        strip = {"text": catalogue[clip].captions[0].text, "clip": catalogue[clip].id, "rank": int(rank[i])}
        shown.append(strip | {"true": picture[clip], "top": top})
    return shown, pictures


def table(scores: dict[str, Any]) -> str:
    """The scores as lines of text: percentages beside chance and oracle."""
    clips = scores["clips"]
    lines = [
        f"{scores['catalogue']}: {clips['found']} of {clips['expected']} clips found, "
        f"{clips['heard']} with sound, {clips['read']} with a caption; {scores['windows']} windows a clip",
        f"{'':<16}{'':<8}{'R@1':>8}{'R@5':>8}{'R@10':>8}{'median':>9}",
    ]
    for direction in DIRECTIONS:
        own = scores[direction.name]
        for who, row in (("model", own), ("chance", own["chance"]), ("oracle", own["oracle"])):
            name = direction.name.replace("_", " ") if who == "model" else ""
            lines.append(f"{name:<16}{who:<8}" + ("  not known for this catalogue" if row is None else _cells(row)))
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> str:
    recall = "".join(f"{'-':>8}" if row[f"R@{k}"] is None else f"{row[f'R@{k}']:>8.1%}" for k in (1, 5, 10))
    return recall + (f"{'-':>9}" if row["median_rank"] is None else f"{row['median_rank']:>9.1f}")


def _known(row: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN: what is undefined is null."""
    return {key: None if np.isnan(value) else value for key, value in row.items()}


def _array(x: Tensor) -> np.ndarray:
    return x.float().cpu().numpy()
