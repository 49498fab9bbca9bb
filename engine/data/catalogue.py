"""A catalogue is a JSON-lines file, one clip a line.

    {"id": "a1", "video": "a1.mp4", "start": 0.0, "end": 10.0,
     "captions": [{"start": 0.0, "end": 4.0, "text": "a red square spins"}], "labels": ["spin"], "source": "howto100m"}

Only "id" and one of "video", "audio" are required. `audio` names a separate sound file; without it the sound of the
video is used. Paths are relative to the catalogue (absolute and `..` paths are the user's own business), times are
seconds on the file's own timeline. A row without start or end reaches to that end of the file; a caption without times
covers the whole clip.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

FIELDS = ("id", "video", "audio", "start", "end", "captions", "labels", "source")
CAPTION_FIELDS = ("start", "end", "text")
LISTED = 20  # problems spelled out in one message; the rest are counted


class CatalogueError(ValueError):
    """A catalogue that cannot be used; names the file and every bad line (the first 20, and how many there are)."""


class _RowError(ValueError):
    """What is wrong with one row."""


@dataclass(frozen=True)
class Caption:
    """A sentence and the seconds of the file it belongs to; (-inf, inf) where the row gives no times."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Clip:
    """One row. Paths are absolute (URLs are kept as they are); times are seconds, None = that end of the file."""

    id: str
    video: str | None
    audio: str | None
    start: float | None
    end: float | None
    captions: tuple[Caption, ...]
    labels: tuple[str, ...]
    source: str
    row: int

    @property
    def files(self) -> tuple[str, ...]:
        """The files the clip is read from."""
        return tuple(f for f in (self.video, self.audio) if f is not None)


class Catalogue(Sequence[Clip]):
    """The clips of one file, in its order. A clip's index here is its sample id."""

    def __init__(self, path: Path, clips: Iterable[Clip]):
        self.path = path
        self._clips = tuple(clips)

    @classmethod
    def read(cls, path: str | Path) -> Catalogue:
        """Read and check every row. Raises CatalogueError listing every bad row by line number.

        UTF-8, with or without a byte-order mark; LF or CRLF; empty lines are passed over. Whether the media files exist
        is not asked here but by `absent`, since a loader may be told to do without them.
        """
        path = Path(path)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise CatalogueError(f"{path}: cannot read the catalogue: {error.strerror}; check the path") from error
        folder = path.absolute().parent
        clips: list[Clip] = []
        problems: list[tuple[int, str]] = []
        line_of_id: dict[str, int] = {}
        for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                clip = _clip(_parse(line), folder, number)
                if clip.id in line_of_id:
                    raise _RowError(f"duplicate id {clip.id!r}, first used on line {line_of_id[clip.id]}; ids must be unique")
            except _RowError as error:
                problems.append((number, str(error)))
                continue
            line_of_id[clip.id] = number
            clips.append(clip)
        if problems:
            raise CatalogueError(listing(path, problems))
        if not clips:
            raise CatalogueError(f"{path}: no clips; a catalogue has one JSON object a line, with an id and a video")
        return cls(path, clips)

    def absent(self) -> list[Clip]:
        """Clips of which a file does not exist. One look at each file; URLs are left out."""
        return [clip for clip in self if any("://" not in f and not Path(f).exists() for f in clip.files)]

    def __len__(self) -> int:
        return len(self._clips)

    @overload
    def __getitem__(self, index: int) -> Clip: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Clip]: ...
    def __getitem__(self, index: int | slice) -> Clip | Sequence[Clip]:
        return self._clips[index]


def listing(path: Path, problems: Sequence[tuple[int, str]]) -> str:
    """One message for (line number, problem) pairs: a single line for one of them."""
    if len(problems) == 1:
        return f"{path}: line {problems[0][0]}: {problems[0][1]}"
    lines = [f"{path}: {len(problems)} bad rows"]
    lines += [f"  line {number}: {problem}" for number, problem in problems[:LISTED]]
    if len(problems) > LISTED:
        lines.append(f"  ... and {len(problems) - LISTED} more")
    return "\n".join(lines)


def _parse(line: bytes) -> dict[str, Any]:
    """The JSON object of a line."""
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise _RowError(f"not UTF-8 (byte {error.start}); save the catalogue as UTF-8") from error
    except json.JSONDecodeError as error:
        raise _RowError(f"not JSON ({error.msg}, column {error.colno}); a row is one JSON object on one line") from error
    except RecursionError as error:
        raise _RowError("nested too deeply; a row is one flat JSON object") from error
    if not isinstance(row, dict):
        raise _RowError(f"a {_kind(row)} where a JSON object was expected")
    return row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys differ; plain json keeps the last of equal ones silently."""
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise _RowError(f"field {next(n for n in names if names.count(n) > 1)!r} is given twice; keep one")
    return result


def _clip(row: dict[str, Any], folder: Path, number: int) -> Clip:
    """A checked row."""
    _known(row, FIELDS, "")
    if "id" not in row:
        raise _RowError('no "id"; every clip needs one of its own')
    if not isinstance(row["id"], str) or not row["id"]:
        raise _RowError(f'"id" must be a non-empty string, not {json.dumps(row["id"])}')
    video, audio = (_location(row, name, folder) for name in ("video", "audio"))
    if video is None and audio is None:
        raise _RowError('neither "video" nor "audio"; name the file the clip is in')
    start, end = _times(row, "")
    labels = row.get("labels") or []
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise _RowError('"labels" must be a list of strings')
    source = row.get("source") or ""
    if not isinstance(source, str):
        raise _RowError('"source" must be a string')
    return Clip(row["id"], video, audio, start, end, _captions(row), tuple(labels), source, number)


def _captions(row: dict[str, Any]) -> tuple[Caption, ...]:
    captions = row.get("captions") or []
    if not isinstance(captions, list):
        raise _RowError(f'"captions" is a {_kind(captions)}; it must be a list of {{"start", "end", "text"}} objects')
    result = []
    for index, caption in enumerate(captions):
        where = f"captions[{index}]"
        if not isinstance(caption, dict):
            raise _RowError(f'{where} is a {_kind(caption)}; it must be an object {{"start", "end", "text"}}')
        _known(caption, CAPTION_FIELDS, f"{where}: ")
        if not isinstance(caption.get("text"), str):
            raise _RowError(f'{where}: "text" must be a string')
        start, end = _times(caption, f"{where}: ", negative=True)
        result.append(Caption(-math.inf if start is None else start, math.inf if end is None else end, caption["text"]))
    return tuple(result)


def _known(row: dict[str, Any], fields: tuple[str, ...], where: str) -> None:
    for name in row:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"the fields are {', '.join(fields)}"
            raise _RowError(f"{where}unknown field {name!r}; {remedy}")


def _location(row: dict[str, Any], name: str, folder: Path) -> str | None:
    value = row.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise _RowError(f'"{name}" must be a path, not {json.dumps(value)}')
    if "\0" in value:
        raise _RowError(f'"{name}" holds a NUL character, which no path can')
    return value if "://" in value else str(folder / value)


def _times(row: dict[str, Any], where: str, *, negative: bool = False) -> tuple[float | None, float | None]:
    """start and end, finite and in order. A caption may begin before the file does, a clip may not."""
    values: dict[str, float | None] = {}
    for name in ("start", "end"):
        value = row.get(name)
        if value is None:
            values[name] = None
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _RowError(f'{where}"{name}" must be a number of seconds, not {json.dumps(value)}')
        if not math.isfinite(value):
            raise _RowError(f'{where}"{name}" is {value}; give finite seconds, or leave it out for the whole file')
        if value < 0 and not negative:
            raise _RowError(f'{where}"{name}" is {value}; seconds count from the beginning of the file, from 0 up')
        values[name] = float(value)
    start, end = values["start"], values["end"]
    begin = start if start is not None else -math.inf if negative else 0.0
    # A caption may be a moment; a clip must have a length.
    if end is not None and (end < begin if negative else end <= begin):
        raise _RowError(f'{where}"end" {end:g} is not after "start" {begin:g}; swap or correct them')
    return start, end


def _kind(value: Any) -> str:
    """JSON's name for the kind of a value."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names[type(value)]
