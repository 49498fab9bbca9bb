"""Words: the released tokenizer's ids, frequency order, and the file."""

import numpy as np
import pytest

from vatt.engine.data.words import Vocabulary, VocabularyError, has_known_word, split_words


def test_ids_of_the_released_tokenizer(golden):
    arrays = golden("data_processing")
    released = arrays["tokenizer/vocab"].tolist()
    vocabulary = Vocabulary(released[4:])  # after <pad> <bos> <eos> <unk>
    for text, expected in zip(arrays["tokenizer/strings"].tolist(), arrays["tokenizer/ids_max16"], strict=True):
        ids = vocabulary.encode(text, 16)
        ours = {0: 0, 3: 1, **{row: row - 2 for row in range(4, len(released))}}
        assert ids.dtype == np.int64 and ids.tolist() == [ours[row] for row in expected.tolist()]


def test_punctuation_goes_and_scripts_stay():
    assert split_words("It's a   well-known\tFACT: 3 €!") == ["its", "a", "wellknown", "fact", "3"]
    assert split_words("Ça «va»? हिन्दी、日本") == ["ça", "va", "हिन्दी日本"]
    assert split_words("?!") == []


def test_commonest_first_ties_alphabetical():
    captions = ["b b b", "a c", "A c d", "e"]
    assert Vocabulary.build(captions, 100).words == ("b", "a", "c", "d", "e")
    limited = Vocabulary.build(captions, 5)
    assert limited.words == ("b", "a", "c") and len(limited) == 5
    assert limited.encode("d c b zzz a a", 4).tolist() == [1, 4, 2, 1]
    assert limited.encode("c", 3).tolist() == [4, 0, 0]
    assert has_known_word(limited.encode("d a", 2)) and not has_known_word(limited.encode("d", 2))


def test_the_file(tmp_path):
    vocabulary = Vocabulary.build(["the ça the"], 10)
    vocabulary.write(tmp_path / "words.txt")
    assert (tmp_path / "words.txt").read_bytes().decode() == "<pad>\n<unk>\nthe\nça\n"
    assert Vocabulary.read(tmp_path / "words.txt").words == vocabulary.words
    assert [path.name for path in tmp_path.iterdir()] == ["words.txt"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("the\na\n", "line 1: the first two lines must be <pad> and <unk>"),
        ("<pad>\n<unk>\nthe\na b\n", "line 4: 'a b' is not one lower-case word"),
        ("<pad>\n<unk>\nthe\n\nb\n", "line 4: '' is not one"),
        ("<pad>\n<unk>\nthe\na\nthe\n", "line 5: 'the' is already on line 3"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, text, says):
    path = tmp_path / "words.txt"
    path.write_text(text)
    with pytest.raises(VocabularyError) as caught:
        Vocabulary.read(path)
    assert str(path) in str(caught.value) and says in str(caught.value)
