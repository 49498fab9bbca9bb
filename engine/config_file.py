"""TOML and command-line overrides -> the records of `config`, and back.

Strict on purpose: a setting that is not understood would otherwise train a different model in silence. Every problem is
one line that names the file (or the command line), the full dotted key, what was given and what is expected.

The file and the overrides are merged as plain values first, and the records are built once from the result, so a
relation between fields (a named size, an audio span) always sees both.
"""

from __future__ import annotations

import difflib
import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from vatt.engine.config import ConfigError, DataConfig, RunConfig


@dataclass(frozen=True)
class Option:
    """One setting: its dotted key, type, default and sentence."""

    key: str
    kind: Any
    default: Any
    sentence: str


@dataclass(frozen=True)
class Section:
    """One table of the file: its dotted name ("" for the top), its record and its sentence."""

    name: str
    record: type
    sentence: str


def _walk(record: type, name: str, sentence: str) -> Iterator[Section | Option]:
    """The section itself, its own settings, then its sub-sections: the order in which TOML has to be written."""
    yield Section(name, record, sentence)
    kinds = get_type_hints(record)
    nested = []
    for f in fields(record):
        key = f"{name}.{f.name}" if name else f.name
        if is_dataclass(kinds[f.name]):
            nested.append((kinds[f.name], key, f.metadata["sentence"]))
        else:
            assert f.default is not MISSING, f"{key} needs a default"
            yield Option(key, kinds[f.name], f.default, f.metadata["sentence"])
    for kind, key, text in nested:
        yield from _walk(kind, key, text)


TREE: tuple[Section | Option, ...] = tuple(_walk(RunConfig, "", "The run."))
OPTIONS: dict[str, Option] = {entry.key: entry for entry in TREE if isinstance(entry, Option)}
SECTIONS: dict[str, Section] = {entry.name: entry for entry in TREE if isinstance(entry, Section)}

_ACCUMULATION = (
    "gradient accumulation is refused: a clip would be contrasted with its own micro-batch only, not with the whole batch; "
    "set backend.chunk, lower batch_size, or add ranks (backend.gradient_accumulation_steps must stay 1)"
)
_DERIVED = "DeepSpeed's configuration is derived from ours; "
# What people paste from a DeepSpeed file. A nearest-name hint alone would hide why the key does not exist here.
_DEEPSPEED_KEYS = {
    "gradient_accumulation_steps": _ACCUMULATION,
    "train_batch_size": _DERIVED + "set batch_size: the clips of one step over all ranks",
    "train_micro_batch_size_per_gpu": _DERIVED + "set batch_size: the clips of one step over all ranks",
    "zero_optimization": _DERIVED + "set backend.zero_stage",
    "bf16": _DERIVED + "set backend.precision",
    "fp16": _DERIVED + 'set backend.precision ("bf16" or "fp32"; fp16 does not exist here)',
    "gradient_clipping": "gradients are not clipped in this recipe; remove it",
}


def load_run(path_or_recipe: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run described by a TOML file, or by a shipped recipe such as `pretrain/tiny`, with overrides on top.

    overrides: `["--section.key", "VALUE", "--section.key=VALUE", ...]`; a value is read by its field's type
    (`--model.video.patch 4,16,16`, `--log.tensorboard false`). An override of an encoder's `size` by a name replaces the
    whole shape the file gives it. Paths in the result are as written: relative to the current directory.

    Raises ConfigError, in one line.
    """
    path = find_config(str(path_or_recipe))
    given = _read(path)
    changed = parse_overrides(overrides)
    merged = _without_stale(given, changed) | changed
    try:
        return _build("", merged)
    except ConfigError as problem:
        key = str(problem).split(":")[0]
        raise ConfigError(f"command line: --{problem}" if key in changed else f"{path}: {problem}") from None


def from_tree(tree: Mapping[str, Any]) -> RunConfig:
    """The run described by nested plain values, as JSON holds them (`dataclasses.asdict` of a run). Raises ConfigError."""
    return cast(RunConfig, _build("", dict(_flat(tree, ""))))


def find_config(path_or_recipe: str) -> Path:
    """A file, or the file of a shipped recipe; ConfigError listing the recipes if it is neither."""
    path = Path(path_or_recipe)
    if path.is_file():
        return path
    shipped = recipes()
    name = path_or_recipe.removesuffix(".toml")
    if name in shipped:
        return shipped[name]
    if path.is_dir():
        inside = " (did you mean the config.toml inside it?)" if (path / "config.toml").is_file() else ""
        raise ConfigError(f"{path}: is a folder, not a configuration file{inside}")
    near = difflib.get_close_matches(name, shipped, n=1, cutoff=0.6)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ConfigError(f"{path_or_recipe}: no such file or recipe.{hint} Shipped recipes: {', '.join(sorted(shipped))}")


def recipes() -> dict[str, Path]:
    """The shipped recipes by name: `pretrain/tiny` is the file pretrain/tiny.toml of the package vatt.configs."""
    import vatt.configs

    found: dict[str, Path] = {}
    for root in map(Path, vatt.configs.__path__):
        for file in root.rglob("*.toml"):
            found.setdefault(file.relative_to(root).with_suffix("").as_posix(), file)
    return found


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`--section.key VALUE` and `--section.key=VALUE` as {dotted key: value of the field's type}."""
    changed: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--") or len(argument) == 2:
            raise ConfigError(f"command line: expected --section.key VALUE, got {argument!r}")
        key, equals, text = argument[2:].partition("=")
        if key not in OPTIONS:
            raise ConfigError(f"command line: --{key}: {_unknown(key)}")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"command line: --{key}: needs a value, {expected(OPTIONS[key].kind)}")
            text = rest.pop(0)
        if key in changed:
            raise ConfigError(f"command line: --{key}: given twice; keep one")
        value = _parsed(text, OPTIONS[key].kind)
        if value is _MISFIT:
            raise ConfigError(f"command line: --{key}: expected {expected(OPTIONS[key].kind)}, got {text!r}")
        changed[key] = value
    return changed


def to_toml(config: RunConfig) -> str:
    """The whole of a run as TOML; reading it gives an equal record."""
    lines: list[str] = []
    for entry in TREE:
        if isinstance(entry, Section):
            lines += ["", f"[{entry.name}]"] if entry.name else []
        else:
            value: Any = config
            for part in entry.key.split("."):
                value = getattr(value, part)
            lines.append(f"{entry.key.rpartition('.')[2]} = {_toml_value(value)}")
    return "\n".join(lines) + "\n"


def reference() -> str:
    """Every setting as Markdown: key, type, default and sentence, section by section."""
    lines = ["# Configuration reference", "", "Made from the records in `engine/config.py` by `vatt config reference`."]
    for entry in TREE:
        if isinstance(entry, Section):
            title = f"`[{entry.name}]`" if entry.name else "Top of the file"
            lines += ["", f"## {title}", "", entry.sentence, "", "| key | type | default | |", "| --- | --- | --- | --- |"]
        else:
            cells = (f"`{entry.key}`", expected(entry.kind), f"`{_toml_value(entry.default)}`", entry.sentence)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def reference_rows() -> list[dict[str, object]]:
    """The same as rows, for a machine."""
    return [{"key": o.key, "type": expected(o.kind), "default": o.default, "meaning": o.sentence} for o in OPTIONS.values()]


def expected(kind: Any) -> str:
    """A type in words: 'an integer', 'one of "a", "b"', 'an array of 3 integers'."""
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(_toml_value(choice) for choice in get_args(kind))
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        return f"an array of {len(parts)} {'integers' if parts[0] is int else 'numbers'}"
    return {int: "an integer", float: "a number", bool: "true or false", str: "a string"}[kind]


def _read(path: Path) -> dict[str, Any]:
    """The file as {dotted key: value of the field's type}."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise ConfigError(f"{path}: not TOML: {problem}") from None
    except OSError as problem:
        raise ConfigError(f"{path}: cannot be read: {problem.strerror}") from None
    try:
        return dict(_flat(tree, ""))
    except ConfigError as problem:
        raise ConfigError(f"{path}: {problem}") from None


def _flat(table: Mapping[str, Any], section: str) -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        key = f"{section}.{name}" if section else name
        if key in OPTIONS:
            fitted = _fitted(value, OPTIONS[key].kind)
            if fitted is _MISFIT:
                raise ConfigError(f"{key}: expected {expected(OPTIONS[key].kind)}, got {_shown(value)}")
            yield key, fitted
        elif isinstance(value, dict) and name not in _DEEPSPEED_KEYS and (value or key in SECTIONS):
            yield from _flat(value, key)
        elif key in SECTIONS:
            raise ConfigError(f"{key}: expected a section, [{key}], got {_shown(value)}")
        else:
            raise ConfigError(f"{key}: {_unknown(key, SECTIONS if isinstance(value, dict) else OPTIONS)}")


def _unknown(key: str, known: Mapping[str, Any] = OPTIONS) -> str:
    for part in key.split("."):
        if part in _DEEPSPEED_KEYS:
            return f"unknown key; {_DEEPSPEED_KEYS[part]}"
    return f"unknown {'key' if known is OPTIONS else 'section'}; the nearest is {nearest(key, known)}"


def nearest(key: str, known: Mapping[str, Any] = OPTIONS) -> str:
    """The known dotted name most like `key`."""
    names = [name for name in known if name]
    return (difflib.get_close_matches(key, names, n=1, cutoff=0.6) or difflib.get_close_matches(key, names, n=1, cutoff=0.0))[0]


_MISFIT = object()  # None cannot say it: a value that does not fit must never look like a setting


def _fitted(value: Any, kind: Any) -> Any:
    """`value` as the field's type, or _MISFIT. true is not 1 here, though Python thinks so."""
    if get_origin(kind) is Literal:
        return next((choice for choice in get_args(kind) if type(choice) is type(value) and choice == value), _MISFIT)
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        if not isinstance(value, (list, tuple)) or len(value) != len(parts):
            return _MISFIT
        fitted = tuple(_fitted(v, part) for v, part in zip(value, parts, strict=True))
        return _MISFIT if _MISFIT in fitted else fitted
    if kind is float and type(value) is int:
        return float(value)
    if kind is float and type(value) is float and not math.isfinite(value):
        return _MISFIT
    return value if type(value) is kind else _MISFIT


def _parsed(text: str, kind: Any) -> Any:
    """The text of an override as the field's type, or _MISFIT."""
    if get_origin(kind) is Literal:
        return next((choice for choice in get_args(kind) if str(choice) == text), _MISFIT)
    if get_origin(kind) is tuple:
        pieces = text.strip().removeprefix("[").removesuffix("]").split(",")
        parts = get_args(kind)
        if len(pieces) != len(parts):
            return _MISFIT
        values = tuple(_parsed(piece.strip(), part) for piece, part in zip(pieces, parts, strict=True))
        return _MISFIT if _MISFIT in values else values
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), _MISFIT)
    if kind is str:
        return text
    try:
        return _fitted(kind(text), kind)
    except ValueError:
        return _MISFIT


def _without_stale(given: dict[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """The file's values less those that only restate what an override replaces.

    A resolved config.toml spells everything out. There, `--model.video.size large` has to bring its own layers and width,
    and `--data.frames 16` its own audio span; a span that was chosen freely in the file stays.
    """
    stale: set[str] = set()
    for key, value in changed.items():
        if key.endswith(".size") and f"{_section_of(key)}.layers" in OPTIONS and value != "custom":
            stale |= {f"{_section_of(key)}.{name}" for name in ("layers", "width", "heads", "hidden")}
    if any(f"data.{name}" in changed for name in ("frames", "fps", "audio_rate")):
        clip = {name: given[f"data.{name}"] for name in ("frames", "fps", "audio_rate") if f"data.{name}" in given}
        try:
            derived = DataConfig(**clip).audio_samples
        except ConfigError:  # reported with its key when the records are built
            derived = 0
        if given.get("data.audio_samples") == derived:
            stale.add("data.audio_samples")
    return {key: value for key, value in given.items() if key not in stale}


def _build(section: str, values: Mapping[str, Any]) -> Any:
    """The record of a section from {dotted key: value}; its own complaints get the section in front."""
    record = SECTIONS[section].record
    arguments: dict[str, Any] = {}
    for f in fields(record):
        key = f"{section}.{f.name}" if section else f.name
        if key in SECTIONS:
            arguments[f.name] = _build(key, values)
        elif key in values:
            arguments[f.name] = values[key]
    try:
        return record(**arguments)
    except ConfigError as problem:
        raise ConfigError(f"{section}.{problem}" if section else str(problem)) from None


def _section_of(key: str) -> str:
    return key.rpartition(".")[0]


def _shown(value: Any) -> str:
    """A value as the user wrote it, with its type, in a few characters."""
    if isinstance(value, dict):
        return "a table"
    names = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array"}
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f"{names.get(type(value), type(value).__name__)} {text if len(text) <= 60 else text[:57] + '...'}"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, except that TOML also wants DEL escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return repr(value)
