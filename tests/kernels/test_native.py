"""How csrc/ is built: once, whole or not at all, by one process; and what is said where it cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from vatt.kernels import native
from vatt.kernels.native import FLAGS, NATIVE, Build, NotBuilt, build, key, ninja_file, only_one

SMALL = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A csrc/ of one small source, and a cache of its own."""
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "cpu" / "small.cpp").write_text(SMALL)
    monkeypatch.setattr(native, "folder", lambda: tmp_path / "csrc")
    monkeypatch.setenv("VATT_NATIVE_DIR", str(tmp_path / "cache"))
    native.digest.cache_clear()
    yield tmp_path
    native.digest.cache_clear()


def child(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=os.environ | environment
    )


def test_the_shipped_sources_build_and_load() -> None:
    assert native.loaded(required=True)


def test_built_once_and_found_again(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = native.built()
    assert first.is_file() and "building C++ kernels (cpu)" in capfd.readouterr().err
    stamp = first.stat().st_mtime_ns
    assert native.built() == first and first.stat().st_mtime_ns == stamp and capfd.readouterr().err == ""
    assert sorted(p.name for p in first.parent.iterdir()) == ["build.ninja", first.name]


def test_another_source_flag_or_name_is_another_library(small: Path) -> None:
    compiler = native.cpu_compiler()
    plan = Build("cpu", compiler, FLAGS)
    keys = {key(plan), key(Build("cpu", compiler, (*FLAGS, "-g"))), key(Build("cuda", compiler, FLAGS))}
    (small / "csrc" / "cpu" / "small.cpp").write_text(SMALL + "// another\n")
    native.digest.cache_clear()
    keys.add(key(plan))
    (small / "csrc" / "cpu" / "small.cpp").rename(small / "csrc" / "cpu" / "other.cpp")
    native.digest.cache_clear()
    keys.add(key(plan))
    assert len(keys) == 5


def test_a_broken_source_leaves_nothing_and_says_the_first_error(small: Path) -> None:
    (small / "csrc" / "cpu" / "broken.cpp").write_text("int f( {\n")
    native.digest.cache_clear()
    with pytest.raises(NotBuilt, match=r"the build failed \(.*broken.cpp:1.*error.*\); install a C\+\+ compiler"):
        native.built()
    assert [p.suffix for p in (small / "cache").iterdir()] == [".lock"]


def test_a_killed_builder_holds_nobody_up(small: Path) -> None:
    home = small / "cache" / "x"
    code = f"""
    import time
    from pathlib import Path
    from vatt.kernels.native import only_one
    with only_one(Path({str(home)!r})):
        print("held", flush=True)
        time.sleep(600)
    """
    holder = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    entered = threading.Event()

    def wait() -> None:
        with only_one(home):
            entered.set()

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.2)
    assert not entered.is_set()
    holder.kill()
    holder.wait()
    thread.join(10)
    assert entered.is_set()


def test_a_library_that_is_there_already_is_kept(small: Path) -> None:
    """A process without the lock (another host on a shared folder) that finishes second changes nothing."""
    plan = Build("cpu", native.cpu_compiler(), FLAGS)
    home = small / "cache" / "x"
    build(plan, home)
    stamp = (home / plan.file).stat().st_mtime_ns
    build(plan, home)
    assert (home / plan.file).stat().st_mtime_ns == stamp
    assert [p.name for p in home.parent.iterdir()] == ["x"]


def test_names_with_blanks_and_dollars(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = small / "a b$c"
    (small / "csrc").rename(odd)
    monkeypatch.setattr(native, "folder", lambda: odd)
    native.digest.cache_clear()
    assert native.built().is_file()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PATH": "/nonexistent", "CXX": ""}, "no C++ compiler was found; install a C++ compiler and ninja"),
        ({"CXX": "/bin/false"}, "the build failed"),
    ],
)
def test_without_a_compiler_one_line_and_pytorch(tmp_path: Path, environment: dict[str, str], message: str) -> None:
    code = """
    import warnings, torch
    from vatt.kernels import native
    from vatt.kernels.dropout import keep_mask
    from vatt.kernels.implementation import KernelError
    arguments = torch.Size((2, 9)), 0.5, torch.tensor(1), torch.tensor(2), torch.tensor([3, 4]), 5
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        masks = [keep_mask(*arguments) for _ in range(3)]
    print(len(said), said[0].message)
    print(masks[0].tolist())
    try:
        native.loaded(required=True)
    except KernelError as error:
        print(error)
    """
    done = child(code, VATT_NATIVE_DIR=str(tmp_path), **environment)
    assert done.returncode == 0, done.stderr
    said, mask, error = done.stdout.splitlines()
    assert said.startswith("1 C++ kernels are not used, PyTorch's functions are: ") and message in said
    assert error.startswith("native: ") and message in error
    import torch

    from vatt.kernels.dropout import keep_mask

    arguments = torch.Size((2, 9)), 0.5, torch.tensor(1), torch.tensor(2), torch.tensor([3, 4]), 5
    assert json.loads(mask.replace("True", "true").replace("False", "false")) == keep_mask(*arguments).tolist()


def test_turned_off_is_silent() -> None:
    done = child("from vatt.kernels import native; print(native.loaded())", VATT_NATIVE="0")
    assert done.stdout == "False\n" and done.stderr == ""


def test_a_prebuilt_library_is_used_where_it_fits(small: Path) -> None:
    assert native.prebuilt() is None
    library = native.build_ahead()
    assert native.prebuilt() == library
    record = library.with_name("build.json")
    made = json.loads(record.read_text())
    for field in ("sources", "torch", "machine"):
        record.write_text(json.dumps(made | {field: "another"}))
        assert native.prebuilt() is None, field


def test_a_prebuilt_library_is_not_for_an_older_processor(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native.build_ahead()
    monkeypatch.setattr(native, "features", lambda: {"sse2", "avx"})
    assert native.prebuilt() is None or not native.PORTABLE


def test_no_openmp_of_its_own() -> None:
    assert "-fopenmp" not in ninja_file(Build("cpu", "g++", (*FLAGS, *NATIVE)))
    linked = subprocess.run(["readelf", "-d", str(native.built())], capture_output=True, text=True).stdout
    assert "NEEDED" in linked and "gomp" not in linked and "libpython" not in linked
