"""What the records of a configuration are made of."""

from __future__ import annotations

from dataclasses import field
from typing import Any


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the key, what is wrong and the remedy, in one line."""


def option(default: Any, sentence: str) -> Any:
    """A field of a record: its default and the sentence the config reference prints."""
    return field(default=default, metadata={"sentence": sentence})


def section(record: type, sentence: str) -> Any:
    """A field that holds a nested record."""
    return field(default_factory=record, metadata={"sentence": sentence})


def require(condition: bool, key: str, problem: str) -> None:
    """Raise ConfigError("key: problem") unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key}: {problem}")
