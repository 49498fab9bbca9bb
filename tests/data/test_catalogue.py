"""Catalogues: every bad row is named by its line, with what is wrong and what to do."""

import json
import math

import pytest

from vatt.engine.data.catalogue import Catalogue, CatalogueError


def read(tmp_path, *lines, join="\n", prefix=b""):
    path = tmp_path / "clips.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_bytes(prefix + join.join(texts).encode())
    return Catalogue.read(path)


def test_a_row_becomes_a_clip(tmp_path):
    row = {
        "id": "a", "video": "sub/a.mp4", "audio": "a.flac", "start": 1, "end": 9.5, "labels": ["x"], "source": "audioset",
        "captions": [{"start": 0.5, "end": 2, "text": "one"}, {"text": "all of it"}],
    }  # fmt: skip
    catalogue = read(
        tmp_path, "", row, {"id": "b", "video": "http://x/b.mp4"}, {"id": "c", "video": "/elsewhere/c.mp4", "start": None}
    )
    clip = catalogue[0]
    assert len(catalogue) == 3 and clip.id == "a" and clip.row == 2
    assert clip.video == str(tmp_path / "sub/a.mp4") and clip.audio == str(tmp_path / "a.flac")
    assert (clip.start, clip.end, clip.labels, clip.source) == (1.0, 9.5, ("x",), "audioset")
    assert [(c.start, c.end, c.text) for c in clip.captions] == [(0.5, 2.0, "one"), (-math.inf, math.inf, "all of it")]
    assert catalogue[1].video == "http://x/b.mp4" and catalogue[1].start is None and catalogue[1].captions == ()
    assert catalogue[2].video == "/elsewhere/c.mp4"


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    catalogue = read(tmp_path, {"id": "é", "video": "a"}, {"id": "b", "video": "b"}, join="\r\n", prefix=b"\xef\xbb\xbf")
    assert [clip.id for clip in catalogue] == ["é", "b"] and catalogue[1].video == str(tmp_path / "b")


GOOD = {"id": "good", "video": "a.mp4"}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "not JSON"),
        ("[1]", "a list where a JSON object"),
        ('{"id": "a", "id": "b", "video": "v"}', "'id' is given twice"),
        ({"video": "a.mp4"}, 'no "id"'),
        ({"id": "", "video": "a.mp4"}, '"id" must be a non-empty string'),
        ({"id": 3, "video": "a.mp4"}, '"id" must be a non-empty string'),
        ({"id": "good", "video": "b.mp4"}, "duplicate id 'good', first used on line 1"),
        ({"id": "a"}, 'neither "video" nor "audio"'),
        ({"id": "a", "video": 7}, '"video" must be a path'),
        ({"id": "a", "vidoe": "a.mp4"}, "unknown field 'vidoe'; did you mean 'video'?"),
        ('{"id": "a", "video": "v", "start": NaN}', '"start" is nan'),
        ('{"id": "a", "video": "v", "end": Infinity}', '"end" is inf'),
        ({"id": "a", "video": "v", "start": -1}, '"start" is -1'),
        ({"id": "a", "video": "v", "start": "1"}, '"start" must be a number'),
        ({"id": "a", "video": "v", "start": True}, '"start" must be a number'),
        ({"id": "a", "video": "v", "start": 5, "end": 2}, '"end" 2 is not after "start" 5'),
        ({"id": "a", "video": "v", "start": 5, "end": 5}, '"end" 5 is not after "start" 5'),
        ({"id": "a", "video": "v", "end": 0}, '"end" 0 is not after "start" 0'),
        ({"id": "a", "video": "v", "captions": "words"}, '"captions" is a string'),
        ({"id": "a", "video": "v", "captions": ["words"]}, "captions[0] is a string"),
        ({"id": "a", "video": "v", "captions": [{"start": 0, "end": 1}]}, 'captions[0]: "text" must be a string'),
        (
            {"id": "a", "video": "v", "captions": [{"text": "x", "strat": 0}]},
            "captions[0]: unknown field 'strat'; did you mean 'start'",
        ),
        ({"id": "a", "video": "v", "captions": [{"text": "x", "start": 2, "end": 1}]}, 'captions[0]: "end" 1 is not after'),
        ({"id": "a", "video": "v", "labels": "x"}, '"labels" must be a list'),
    ],
)
def test_bad_rows_are_named(tmp_path, row, says):
    with pytest.raises(CatalogueError) as caught:
        read(tmp_path, GOOD, row)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'clips.jsonl'}: line 2: ") and says in message and "\n" not in message


def test_bytes_that_are_not_utf8(tmp_path):
    path = tmp_path / "clips.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"id": "\xff", "video": "v"}\n')
    with pytest.raises(CatalogueError, match=r"line 2: not UTF-8 .*save the catalogue as UTF-8"):
        Catalogue.read(path)


def test_every_bad_row_is_counted_and_twenty_are_listed(tmp_path):
    with pytest.raises(CatalogueError) as caught:
        read(tmp_path, *[GOOD if i == 0 else {"id": f"{i}"} for i in range(31)])
    lines = str(caught.value).split("\n")
    assert lines[0].endswith("30 bad rows") and lines[1].startswith("  line 2: ") and lines[20].startswith("  line 21: ")
    assert lines[21] == "  ... and 10 more" and len(lines) == 22


def test_no_file_and_no_rows(tmp_path):
    with pytest.raises(CatalogueError, match=r"absent\.jsonl: cannot read the catalogue: No such file"):
        Catalogue.read(tmp_path / "absent.jsonl")
    with pytest.raises(CatalogueError, match="no clips"):
        read(tmp_path, "", "")


def test_absent_files(tmp_path):
    (tmp_path / "there.mp4").touch()
    rows = [
        {"id": "a", "video": "there.mp4"},
        {"id": "b", "video": "gone.mp4"},
        {"id": "c", "video": "there.mp4", "audio": "gone.wav"},
    ]
    assert [clip.id for clip in read(tmp_path, *rows, {"id": "d", "video": "http://x/y.mp4"}).absent()] == ["b", "c"]
