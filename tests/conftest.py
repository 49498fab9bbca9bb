"""What every test shares: the gpu mark, the golden arrays, and modest use of the machine."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Callable
from pathlib import Path

# Before torch is imported: several processes share few cores in the multi-rank tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see engine.cli.main

import numpy as np
import pytest
import torch

# Before Triton is imported. Where there is a GPU its kernels are compiled for it instead.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

GOLDEN = Path(__file__).parent / "golden"


# A shell that starts the suite in the background hands it SIGINT ignored, which every child would inherit; tests that send
# Ctrl-C to a child mean a child started the ordinary way.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        reason = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(reason)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """`golden("losses")`: the arrays of tests/golden/losses.npz. A missing file fails the test: parity must not go unseen."""
    loaded: dict[str, dict[str, np.ndarray]] = {}

    def load(name: str) -> dict[str, np.ndarray]:
        if name not in loaded:
            path = GOLDEN / f"{name}.npz"
            if not path.is_file():
                pytest.fail(f"golden file missing: {path}")
            with np.load(path, allow_pickle=False) as arrays:
                loaded[name] = dict(arrays)
        return loaded[name]

    return load


@pytest.fixture(scope="session")
def launch() -> Callable[..., list[str]]:
    """tests/launch.py's function; that file is neither a test nor in a package, so it is loaded by path."""
    spec = importlib.util.spec_from_file_location("launch", Path(__file__).parent / "launch.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.launch


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sample world of 24 training and 8 test clips: real mp4 files."""
    from vatt.engine.data.sample_world.make import make_sample_world

    folder = tmp_path_factory.mktemp("world")
    make_sample_world(folder, 24, 8, seed=0, container="mp4")
    return folder


@pytest.fixture(scope="session")
def small_run(small_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration that trains a very small model on the small world, with every dropout on."""
    path = tmp_path_factory.mktemp("run") / "small.toml"
    path.write_text(SMALL_RUN.format(world=small_world.as_posix(), output=(path.parent / "out").as_posix()))
    return path


@pytest.fixture(scope="session")
def micro_run(small_run: Path, small_world: Path) -> Path:
    """The small run cut down to milliseconds a step, for tests that train again and again: 4 of 6 clips a step."""
    from vatt.engine.config_file import load_run, to_toml

    rows = (small_world / "train.jsonl").read_text().splitlines(keepends=True)
    (small_world / "few.jsonl").write_text("".join(rows[:6]))
    path = small_run.with_name("micro.toml")
    path.write_text(to_toml(load_run(small_run, MICRO.split() + ["--data.train", str(small_world / "few.jsonl")])))
    return path


MICRO = """
--batch_size 4 --data.frames 2 --data.size 16 --data.audio_rate 2000 --data.words 6 --checkpoint.every 1000
--model.video.layers 1 --model.video.width 16 --model.video.hidden 32
--model.audio.layers 1 --model.audio.width 16 --model.audio.hidden 32
--model.text.width 16 --model.text.hidden 32 --model.heads.video_audio 16 --model.heads.video_text 8
"""

SMALL_RUN = """
output = "{output}"
steps = 20
batch_size = 16
seed = 3

[data]
train = "{world}/train.jsonl"
test = "{world}/test.jsonl"
frames = 4
fps = 2.5
size = 32
audio_rate = 4000
captions = 2
words = 8
workers = 0
cache = "memory"

[augment]
flip = 0.0

[model]
dropout = 0.1
attention_dropout = 0.1
[model.video]
size = "custom"
layers = 2
width = 32
heads = 2
hidden = 64
patch = [2, 8, 8]
[model.audio]
size = "custom"
layers = 2
width = 32
heads = 2
hidden = 64
patch = 128
[model.text]
size = "custom"
layers = 1
width = 32
heads = 2
hidden = 64
vocabulary = 128
word_width = 16
[model.heads]
video_audio = 32
video_text = 16

[optimizer]
learning_rate = 5e-4
final_learning_rate = 1e-4
warmup = 10

[backend]
name = "torch"
precision = "fp32"
threads = 1

[checkpoint]
every = 5

[log]
every = 1
tensorboard = false

[evaluate]
windows = 1
"""
