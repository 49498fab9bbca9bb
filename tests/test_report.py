"""The report: one file that stands alone, shows what was measured, and says what is missing."""

import json
import re
import struct
import zlib
from base64 import b64decode
from html.parser import HTMLParser

import numpy as np
import pytest

from vatt.engine.charts import heatmap, line_chart, png_uri, short, thin, ticks
from vatt.engine.config import ConfigError, DataConfig, LogConfig, RunConfig
from vatt.engine.data.catalogue import Caption, Catalogue, Clip
from vatt.engine.evaluate.metrics import chance
from vatt.engine.evaluate.retrieval import DIRECTIONS, Embeddings, keep_for_report, score
from vatt.engine.report import write_report
from vatt.engine.run_directory import RunDirectory

CLIPS = 12


@pytest.fixture
def run(tmp_path):
    config = RunConfig(output=str(tmp_path / "demo <&>"), steps=50, data=DataConfig(test="t"), log=LogConfig(tensorboard=False))
    with RunDirectory(config) as directory:
        yield directory


def log_steps(run, last):
    run.start(0)
    for step in range(1, last + 1):
        line = {"step": step, "loss": 5 / step, "loss_video_audio": 4 / step, "loss_video_text": 3 / step}
        line["learning_rate"] = 1e-4
        speed = {"samples_per_s": 31.5, "tflops": 0.02, "mfu": 0.41, "data_wait": 0.125, "gradient_norm": 1.0}
        run.log(line | speed | {"skipped_steps": 3, "counts": {"substituted": 1234, "looped": 0}, "memory_bytes": 2**30})


def evaluate(run, captions=True):
    draw = np.random.default_rng(0)
    text = np.eye(CLIPS, dtype=np.float32)
    # The first clip's sentence finds another video; all others find their own.
    video = text + 0.01 * draw.random((CLIPS, CLIPS), dtype=np.float32)
    video[0] = -text[0]
    yes = np.ones(CLIPS, bool)
    frames = draw.integers(0, 255, (CLIPS, 3, 8, 8, 3), dtype=np.uint8)
    embeddings = Embeddings(video, video, video, text, yes, yes, yes if captions else ~yes, frames)
    clips = [Clip(f"id-{i}", "/x", None, None, None, (Caption(0, 1, f"<b>number {i}"),), (), "", i + 1) for i in range(CLIPS)]
    catalogue = Catalogue(run.path / "test.jsonl", clips)
    scores = {direction.name: score(direction, embeddings, catalogue) for direction in DIRECTIONS}
    counts = {"expected": CLIPS + 1, "found": CLIPS, "heard": CLIPS, "read": CLIPS}
    keep_for_report(run.path, run.config, catalogue, scores | {"windows": 4, "clips": counts, "catalogue": "t"}, embeddings)


class Balanced(HTMLParser):
    """Checks that tags nest, and gathers the addresses a browser would fetch."""

    VOID = ("meta", "img", "br", "link", "line", "circle", "polyline", "polygon")

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def read(path):
    page = path.read_text(encoding="utf-8")
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    return page, parser


def test_a_finished_run_on_one_page_that_fetches_nothing(run):
    log_steps(run, 50)
    evaluate(run)
    page, parser = read(write_report(run.path))
    assert parser.addresses and all(address.startswith("data:image/png;base64,") for address in parser.addresses)
    assert not re.search(r"url\(|@import|<script|<link", page)
    for title in ("Loss", "Learning rate", "Throughput", "Arithmetic", "Waiting for clips", "Model FLOPs utilisation"):
        assert f"<figcaption>{title}</figcaption><svg" in page
    for text in ("31.5 clips/s", "0.02 TFLOP/s", "41 %", "12.5 %", "12 of 13 clips found", "1,234", "1.00 GiB"):
        assert text in page, text
    assert "steps skipped (not finite)</th><td>3<" in page
    assert page.count('class="matrix"') == 2 and page.count('class="area') == 4
    assert "not finished" not in page and "no evaluation" not in page


def test_scores_stand_beside_chance_and_oracle(run):
    evaluate(run)
    page, _ = read(write_report(run.path))
    assert f"chance {chance(CLIPS)['R@1']:.1%} · oracle 100.0%" in page
    assert "<b>91.7%</b>" in page  # 11 of 12 sentences find their own video first


def test_strips_mark_the_true_clip_wherever_it_came(run):
    evaluate(run)
    page, _ = read(write_report(run.path))
    strips = re.findall(r"<article class='strip'>.*?</article>", page)
    assert len(strips) == 8
    assert "&lt;b&gt;number 0" in strips[0] and all(strip.count("✓ true clip") == 1 for strip in strips)
    assert strips[0].count("<img") == 6 and "<b>12.</b> id-0 " in strips[0]  # beyond the five found: shown with its rank
    assert strips[1].count("<img") == 5 and "<b>1.</b>" in strips[1].split("clip true")[1][:9000]


def test_names_cannot_break_out_of_the_page(run):
    evaluate(run)
    page, _ = read(write_report(run.path))
    assert "demo &lt;&amp;&gt;" in page and "demo <&>" not in page


def test_partial_runs_say_what_is_missing(run):
    page, parser = read(write_report(run.path))
    assert "No step has been logged yet." in page and "There is no evaluation:" in page and "svg" not in parser.tags
    log_steps(run, 20)
    with open(run.metrics, "ab") as file:
        file.write(b'{"step": 21, "lo')
    page, parser = read(write_report(run.path))
    assert "20 of 50 steps are logged" in page and parser.tags.count("svg") == 7


def test_an_evaluation_without_captions(run):
    evaluate(run, captions=False)
    page, _ = read(write_report(run.path))
    assert "no queries" in page and "Nothing to show." in page and "class='strip'" not in page


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match="not a run directory.*config.toml"):
        write_report(tmp_path)


def test_a_spoilt_evaluation_is_named(run):
    (run.path / "evaluation.json").write_text("{")
    with pytest.raises(ConfigError, match="evaluation.json.*delete it"):
        write_report(run.path)


# ---- charts ----------------------------------------------------------------------------------------------------------


def decode_png(uri: str) -> np.ndarray:
    data = b64decode(uri.removeprefix("data:image/png;base64,"))
    width, height = struct.unpack(">II", data[16:24])
    start = data.index(b"IDAT")
    size = struct.unpack(">I", data[start - 4 : start])[0]
    rows = np.frombuffer(zlib.decompress(data[start + 4 : start + 4 + size]), np.uint8).reshape(height, 1 + 3 * width)
    return rows[:, 1:].reshape(height, width, 3)


def test_png_holds_the_pixels():
    pixels = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(decode_png(png_uri(pixels)), pixels)


def test_heatmap_is_dark_where_values_are_high():
    uri = re.search(r'src="([^"]+)"', heatmap("m", np.array([[0.0, 1.0]]), ""))[1]
    low, high = decode_png(uri)[0].astype(int).sum(axis=-1)
    assert low > 600 > 200 > high


def test_lines_go_up_where_values_do_and_break_where_they_are_missing():
    page = line_chart("c", [("a", [(0, 1.0), (1, 2.0), (2, None), (3, 4.0), (4, 8.0)])])
    runs = [[tuple(map(float, p.split(","))) for p in run.split()] for run in re.findall(r'points="([^"]+)"', page)]
    assert [len(run) for run in runs] == [2, 2]
    heights = [y for run in runs for _, y in run]
    assert heights == sorted(heights, reverse=True)
    assert heights[0] - heights[1] == pytest.approx((heights[2] - heights[3]) / 4, abs=0.2)


def test_long_runs_are_drawn_as_means():
    points = thin([(x, float(x % 2)) for x in range(10_000)])
    assert len(points) <= 400 and all(abs(y - 0.5) < 0.03 for _, y in points)
    assert thin([(x, None) for x in range(10_000)])[0][1] is None


def test_ticks_and_numbers_are_round():
    assert ticks(0, 7, 4) == [0, 2, 4, 6, 8]
    assert ticks(3, 3, 4)[0] < 3 < ticks(3, 3, 4)[-1]
    assert [short(v) for v in (0, 0.0712345, 1234, 12345, 2.5e6, 1e-4)] == ["0", "0.07123", "1234", "12.3k", "2.5M", "0.0001"]


def test_evaluation_files_are_plain_json_and_arrays(run):
    evaluate(run)
    json.loads((run.path / "evaluation.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    with np.load(run.path / "evaluation.npz", allow_pickle=False) as arrays:
        assert arrays["similarity/text_to_video"].shape == (CLIPS, CLIPS)
