"""Checkpoints under fire: killed at every write, flipped, cut, out of room; and what retention keeps."""

import errno
import json
import os
import random
import re
import shutil
import signal
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vatt.engine import checkpoint, durable
from vatt.engine.checkpoint import CheckpointError, find_damage, load_checkpoint, newest_checkpoint, save_checkpoint
from vatt.engine.cli import explain


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """Hundreds of saves: the calls are made and counted, but nobody waits for a disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def state(value: float) -> dict[str, torch.Tensor]:
    return {
        "model/a.weight": torch.full((3, 5), value),
        "model/half": torch.full((3,), value, dtype=torch.bfloat16),
        "model/count": torch.tensor(int(value)),
        "model/empty": torch.zeros(0, 4),
        "adam/m/a.weight": torch.full((3, 5), value / 2),
        "adam/step": torch.tensor(int(value), dtype=torch.int64),
    }


def save(run: Path, step: int, keep: int = 2, value: float | None = None) -> Path:
    return save_checkpoint(run, step, state(step if value is None else value), {"seed": 7}, keep=keep)


def steps(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def value_of(path: Path) -> float:
    return load_checkpoint(path)[0]["model/a.weight"][0, 0].item()


# ---- what is saved ---------------------------------------------------------------------------------------------------


def test_state_and_record_come_back_exactly(tmp_path):
    path = save(tmp_path, 10)
    loaded, record = load_checkpoint(path)
    assert record == {"step": 10, "seed": 7}
    assert loaded.keys() == state(10).keys()
    for name, tensor in state(10).items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name


def test_any_safetensors_reader_opens_the_files_under_the_modules_own_names(tmp_path):
    path = save(tmp_path, 1)
    assert set(load_file(path / "model.safetensors")) == {"a.weight", "half", "count", "empty"}
    assert set(load_file(path / "optimizer.safetensors")) == {"m/a.weight", "step"}
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert {name: entry["bytes"] for name, entry in files.items()} == {
        p.name: p.stat().st_size for p in path.iterdir() if p.name != "manifest.json"
    }


def test_a_transposed_view_is_saved_by_value(tmp_path):
    tensor = torch.arange(6.0).reshape(2, 3).T
    path = save_checkpoint(tmp_path, 1, {"model/w": tensor}, {}, keep=1)
    assert torch.equal(load_checkpoint(path)[0]["model/w"], tensor)


def test_the_pointer_names_the_newest_and_old_ones_go(tmp_path):
    for step in (5, 10, 100):
        save(tmp_path, step, keep=2)
    assert steps(tmp_path) == ["latest", "step-10", "step-100"]
    assert (tmp_path / "checkpoints/latest").read_text() == "step-100\n"
    assert newest_checkpoint(tmp_path).name == "step-100"  # by number, not by letter


def test_no_checkpoint_yet(tmp_path):
    assert newest_checkpoint(tmp_path) is None


def test_names_that_no_file_is_for_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(CheckpointError, match="sgd/momentum.*model/.*adam/"):
        save_checkpoint(tmp_path, 1, {"sgd/momentum": torch.zeros(1)}, {}, keep=1)
    assert not (tmp_path / "checkpoints").exists()


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    events = []
    rename = os.rename

    def short(path) -> str:
        name = Path(path).relative_to(tmp_path).as_posix()
        return re.sub(r"latest\..*", "latest", re.sub(r"step-1\.[^/]*", "attempt", name))

    def fsync(descriptor: int) -> None:
        events.append("sync " + short(os.readlink(f"/proc/self/fd/{descriptor}")))

    def recorded_rename(old, new) -> None:
        events.append(f"rename {short(old)} {short(new)}")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    save(tmp_path, 1)
    folder = "checkpoints/attempt"
    assert set(events[:3]) == {
        f"sync {folder}/{name}" for name in ("model.safetensors", "optimizer.safetensors", "record.json")
    }
    assert events[3:] == [
        f"sync {folder}",
        f"sync {folder}/manifest.json",
        f"sync {folder}",
        f"rename {folder} checkpoints/step-1",
        "sync checkpoints",
        "sync checkpoints/latest",
        "rename checkpoints/latest checkpoints/latest",
        "sync checkpoints",
    ]


# ---- kill -9 at every write, fsync and rename ------------------------------------------------------------------------


def save_and_die(run: Path, step: int, keep: int, nth: int) -> int | None:
    """Save in a child that kills itself at its nth write, fsync, rename, mkdir, unlink or rmdir; its exit code, or None."""
    child = os.fork()
    if child == 0:
        calls = 0

        def dying(real):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == nth:
                    if real is write:  # a torn write: part of it reaches the disk
                        real(args[0], bytes(args[1])[: len(args[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return call

        write = os.write
        for name in ("write", "fsync", "rename", "mkdir", "unlink", "rmdir"):
            setattr(os, name, dying(getattr(os, name)))
        try:
            save(run, step, keep)
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("existing", "step", "keep"), [((1, 2), 3, 2), ((3,), 3, 1), ((1,), 2, 1)], ids=["new", "again", "only one"]
)
def test_killed_at_every_call_a_verified_checkpoint_remains(tmp_path, existing, step, keep):
    template = tmp_path / "template"
    for done in existing:
        save(template, done, keep=4)
    for nth in range(1, 200):
        run = tmp_path / f"killed-at-{nth}"
        shutil.copytree(template, run)
        code = save_and_die(run, step, keep, nth)
        newest = newest_checkpoint(run)
        assert newest is not None, f"nothing usable after a kill at call {nth}"
        number = int(newest.name.split(".")[0].removeprefix("step-"))
        assert number in (*existing, step) and number >= max(existing) and value_of(newest) == number
        pointed = (run / "checkpoints/latest").read_text()
        assert pointed in {f"step-{n}\n" for n in (*existing, step)}
        # The run goes on: the same save now works, and leaves nothing behind.
        save(run, step, keep)
        assert newest_checkpoint(run).name == f"step-{step}"
        verified = sorted({*existing, step})[-keep:]
        assert steps(run) == ["latest", *(f"step-{n}" for n in verified)], f"after a kill at call {nth}"
        if code == 0:
            assert nth > 15
            return
        assert code == -signal.SIGKILL
    pytest.fail("the save never finished")


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "record.json", "manifest.json"])
def test_every_flipped_bit_and_every_cut_is_refused_and_stepped_over(tmp_path, caplog, name):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    file = path / name
    good = file.read_bytes()
    draw = random.Random(3)
    places = range(len(good)) if len(good) < 700 else sorted(draw.sample(range(len(good)), 150))
    for place in places:
        file.write_bytes(good[:place] + bytes([good[place] ^ (1 << draw.randrange(8))]) + good[place + 1 :])
        assert find_damage(path) is not None, f"bit flipped in byte {place}"
    for length in (0, 1, len(good) // 2, len(good) - 1):
        file.write_bytes(good[:length])
        assert find_damage(path) is not None, f"cut to {length} bytes"
    caplog.clear()
    assert newest_checkpoint(tmp_path).name == "step-1"
    assert len(caplog.records) == 1 and "step-2" in caplog.text and name in caplog.text
    with pytest.raises(CheckpointError, match=f"step-2.*{name}"):
        load_checkpoint(path)
    file.unlink()
    assert newest_checkpoint(tmp_path).name == "step-1"
    file.write_bytes(good)
    assert newest_checkpoint(tmp_path).name == "step-2"


def test_a_manifest_that_leaves_out_the_record_is_refused(tmp_path):
    path = save(tmp_path, 1)
    written = {"model.safetensors": durable.hash_file(path / "model.safetensors")}
    (path / "manifest.json").write_bytes(checkpoint.manifest_bytes(written))
    assert find_damage(path) is not None


@pytest.mark.parametrize("content", [None, b"", b"step-99\n", b"\xff\x00nonsense"])
def test_the_pointer_is_not_trusted_and_is_mended_by_the_next_save(tmp_path, content):
    save(tmp_path, 1)
    pointer = tmp_path / "checkpoints/latest"
    pointer.unlink()
    if content is not None:
        pointer.write_bytes(content)
    assert newest_checkpoint(tmp_path).name == "step-1"
    save(tmp_path, 2)
    assert pointer.read_text() == "step-2\n"


def test_damaged_ones_are_neither_counted_nor_deleted(tmp_path):
    save(tmp_path, 1, keep=9)
    save(tmp_path, 2, keep=9)
    damaged = save(tmp_path, 3, keep=9)
    (damaged / "record.json").write_bytes(b"{}")
    save(tmp_path, 4, keep=2)
    assert steps(tmp_path) == ["latest", "step-2", "step-3", "step-4"]


def test_saving_over_a_damaged_checkpoint_keeps_it_as_evidence(tmp_path):
    path = save(tmp_path, 3)
    (path / "record.json").write_bytes(b"{}")
    assert newest_checkpoint(tmp_path) is None
    save(tmp_path, 3)
    assert newest_checkpoint(tmp_path) == path
    evidence = [p for p in (tmp_path / "checkpoints").glob("step-3.damaged-*")]
    assert len(evidence) == 1 and (evidence[0] / "record.json").read_bytes() == b"{}"


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 3, value=3)
    save(tmp_path, 3, value=8)
    assert value_of(newest_checkpoint(tmp_path)) == 8
    assert steps(tmp_path) == ["latest", "step-3"]


# ---- a disk that refuses ---------------------------------------------------------------------------------------------


def test_no_room_is_said_with_both_numbers_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path, 1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    message = r"step 2 needs 1,0\d\d,\d\d\d bytes and 1,000 are free.*checkpoint.keep"
    with pytest.raises(CheckpointError, match=message) as refused:
        save(tmp_path, 2)
    assert explain(refused.value)[1] == 1, "the run failed; the user's input was fine"
    assert steps(tmp_path) == ["latest", "step-1"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("name", ["write", "fsync", "rename"])
def test_an_error_of_the_disk_at_any_call_leaves_the_earlier_checkpoint_and_no_attempt(tmp_path, monkeypatch, name, number):
    real, failed = getattr(os, name), 0
    for nth in range(1, 50):
        run = tmp_path / f"{nth}"
        save(run, 1)
        calls = 0

        def refusing(*args, nth=nth):
            nonlocal calls
            calls += 1
            if calls == nth:
                raise OSError(number, os.strerror(number))
            return real(*args)

        monkeypatch.setattr(os, name, refusing)
        try:
            save(run, 2, keep=2)
        except CheckpointError as problem:
            failed += 1
            assert "step-2" in str(problem) and "\n" not in str(problem)
            assert explain(problem)[1] == 1
            assert ("checkpoint.keep" in str(problem)) == (number == errno.ENOSPC)
        finally:
            monkeypatch.setattr(os, name, real)
        assert not [entry for entry in steps(run) if entry.endswith(".tmp")]
        assert value_of(run / "checkpoints/step-1") == 1
        if calls < nth:
            break
        assert (run / "checkpoints/latest").read_text() in ("step-1\n", "step-2\n")
    assert failed >= 2


def test_a_checkpoints_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(tmp_path, 1)


# ---- attempts left behind --------------------------------------------------------------------------------------------


def test_only_attempts_of_dead_processes_of_this_host_are_removed(tmp_path):
    def attempt(host_and_process: str) -> Path:
        path = tmp_path / f"step-1.{host_and_process}.abcd1234.tmp"
        path.mkdir()
        return path

    host = durable.attempt_path(tmp_path / "x").name.split(".")[1]
    dead = os.fork() or os._exit(0)
    os.waitpid(dead, 0)
    gone, living, elsewhere = attempt(f"{host}.{dead}"), attempt(f"{host}.{os.getppid()}"), attempt(f"another-host.{dead}")
    (tmp_path / "mine.tmp").write_text("not an attempt")
    assert durable.remove_dead_attempts(tmp_path) == [gone.name]
    assert living.exists() and elsewhere.exists() and (tmp_path / "mine.tmp").exists()
