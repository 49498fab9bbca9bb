"""Words to numbers, and the list of known words a run keeps.

A vocabulary file is plain text, one word a line: row 0 is `<pad>`, row 1 `<unk>`, then words, commonest first.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

PAD, UNKNOWN = 0, 1
RESERVED = ("<pad>", "<unk>")


class VocabularyError(ValueError):
    """A vocabulary file that cannot be used; names the file, the line and the remedy."""


class _Punctuation(dict[int, int | None]):
    """For str.translate: drops punctuation and symbols of every script, learning each character once."""

    def __missing__(self, character: int) -> int | None:
        drop = unicodedata.category(chr(character))[0] in "PS"
        self[character] = None if drop else character
        return self[character]


_PUNCTUATION = _Punctuation()


def split_words(text: str) -> list[str]:
    """Lower-cased words of a sentence; punctuation is removed, not turned into spaces ("it's" -> "its"), as released."""
    return text.lower().translate(_PUNCTUATION).split()


class Vocabulary:
    """Known words and their ids, from 2 on; 0 is padding, 1 an unknown word."""

    def __init__(self, words: Sequence[str]):
        """words: the known words in the order of their ids, without the two reserved rows."""
        self.words = tuple(words)
        self._ids = {word: index for index, word in enumerate(self.words, start=len(RESERVED))}

    def __len__(self) -> int:
        """Rows a word table needs: the words, padding and the unknown word."""
        return len(self.words) + len(RESERVED)

    @classmethod
    def build(cls, captions: Iterable[str], limit: int) -> Vocabulary:
        """The commonest words of `captions`, equally common ones in alphabetical order; `limit` counts the reserved rows."""
        counts = Counter(word for text in captions for word in split_words(text))
        commonest = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(commonest[: max(0, limit - len(RESERVED))])

    @classmethod
    def read(cls, path: str | Path) -> Vocabulary:
        """Read what `write` wrote. Raises VocabularyError."""
        try:
            lines = Path(path).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise VocabularyError(f"{path}: cannot read the vocabulary: {error}") from error
        if lines[-1] == "":
            lines.pop()
        if tuple(lines[:2]) != RESERVED:
            raise VocabularyError(f"{path}: line 1: the first two lines must be {RESERVED[0]} and {RESERVED[1]}")
        seen: dict[str, int] = {}
        for number, word in enumerate(lines, start=1):
            if number > len(RESERVED) and split_words(word) != [word]:
                raise VocabularyError(f"{path}: line {number}: {word!r} is not one lower-case word without punctuation")
            if word in seen:
                raise VocabularyError(f"{path}: line {number}: {word!r} is already on line {seen[word]}; remove one")
            seen[word] = number
        return cls(lines[2:])

    def write(self, path: str | Path) -> None:
        """Write the file whole or not at all: a temporary file beside it, then a rename."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write("\n".join((*RESERVED, *self.words)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def encode(self, text: str, length: int) -> np.ndarray:
        """Ids of the first `length` words, padded with 0: int64 (length,)."""
        ids = np.full(length, PAD, dtype=np.int64)
        for index, word in enumerate(split_words(text)[:length]):
            ids[index] = self._ids.get(word, UNKNOWN)
        return ids


def has_known_word(ids: np.ndarray) -> bool:
    """Whether any id is a word of the vocabulary."""
    return bool((ids > UNKNOWN).any())
