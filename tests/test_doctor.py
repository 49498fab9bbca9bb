"""vatt doctor: a broken package is a "no" with its reason, whatever it does when it is imported."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from vatt.engine import cli, doctor
from vatt.engine.doctor import PROBES, NotUsable, Probe, healthy, show


def pretend(monkeypatch: pytest.MonkeyPatch, folder: Path, files: dict[str, str]) -> None:
    """Put packages in front of the installed ones, here and in the interpreters that doctor starts."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(str(folder))


def row(probe: Probe) -> dict[str, object]:
    return doctor._row(probe)


def test_every_probe_has_a_name_and_a_remedy():
    names = [probe.name for probe in PROBES]
    assert len(set(names)) == len(names)
    assert all(probe.remedy for probe in PROBES)
    wanted = {
        "Python",
        "torch",
        "CUDA devices",
        "Triton",
        "C++ compiler",
        "C++ kernels",
        "ninja",
        "nvcc",
        "DeepSpeed",
        "DALI",
        "NVDEC",
        "PyAV",
    }
    wanted |= {"codec H.264", "codec AAC", "codec VP9", "codec Opus", "flash-attn", "apex (NVIDIA's)", "TensorBoard"}
    assert wanted | {"Weights & Biases", "matplotlib", "numpy", "safetensors"} == set(names)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            "raise ImportError('libx.so: undefined symbol: y\\nand a long story')",
            "ImportError: libx.so: undefined symbol: y; try this",
        ),
        ("raise SystemExit(3)", "SystemExit: 3; try this"),
        ("import os; os._exit(7)", "importing it ended the interpreter (exit code 7); try this"),
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
            "importing it ended the interpreter (exit code -11); try this",
        ),
    ],
    ids=["import error", "exit", "vanishes", "segmentation fault"],
)
def test_a_broken_package_is_a_no_with_its_reason(source, reason, tmp_path, monkeypatch):
    pretend(monkeypatch, tmp_path, {"brokenpack/__init__.py": source})
    found = row(Probe("broken", doctor._package("brokenpack"), "try this"))
    assert found == {"name": "broken", "usable": False, "required": False, "version": "", "note": reason}


def test_a_package_that_hangs_is_a_no(tmp_path, monkeypatch):
    pretend(monkeypatch, tmp_path, {"slowpack.py": "import time; time.sleep(60)"})
    monkeypatch.setattr(doctor, "SECONDS", 1)
    assert row(Probe("slow", doctor._package("slowpack"), "try this"))["note"] == "did not answer within 1 s; try this"


def test_a_package_that_talks_is_still_read(tmp_path, monkeypatch):
    pretend(monkeypatch, tmp_path, {"chatty.py": "print('hello'); print('world', end=''); __version__ = '1.2'"})
    assert row(Probe("chatty", doctor._package("chatty"), "try this"))["version"] == "1.2"


def test_an_absent_package_says_so():
    assert (
        row(Probe("absent", doctor._package("no_such_package_here"), "pip install it"))["note"]
        == "not installed; pip install it"
    )


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"apex/__init__.py": ""}, "the installed `apex` is not NVIDIA's"),
        ({"apex/__init__.py": "", "apex/normalization.py": ""}, "without its CUDA extensions"),
    ],
)
def test_another_project_called_apex_is_not_nvidias(files, reason, tmp_path, monkeypatch):
    pretend(monkeypatch, tmp_path, files)
    with pytest.raises(NotUsable, match=reason):
        doctor._apex()


def test_nvidias_apex_is_recognised_by_its_modules(tmp_path, monkeypatch):
    files = {"apex/__init__.py": "", "apex/normalization.py": "__version__ = '0.1'", "fused_layer_norm_cuda.py": ""}
    pretend(monkeypatch, tmp_path, files)
    assert doctor._apex()[0] == "0.1"


def test_a_tool_is_found_and_its_version_read(tmp_path, monkeypatch):
    tool = tmp_path / "compiler"
    tool.write_text("#!/bin/sh\necho 'compiler (Some Linux 12.3.4-1) 12.3.4'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("MY_TOOL", str(tool))
    assert doctor._tool("no-such-tool", variable="MY_TOOL")() == ("12.3.4", str(tool))
    monkeypatch.delenv("MY_TOOL")
    with pytest.raises(NotUsable, match="no no-such-tool or neither-this found"):
        doctor._tool("no-such-tool", "neither-this")()


@pytest.mark.parametrize("name", ["H.264", "AAC", "VP9", "Opus"])
def test_codecs_are_tried_for_real(name):
    assert doctor.round_trip(name) >= 3


def test_an_encoder_that_does_not_exist_is_a_no(monkeypatch):
    monkeypatch.setitem(doctor._CODECS, "H.264", ("mp4", "no_such_encoder"))
    with pytest.raises(Exception, match="no_such_encoder"):
        doctor.round_trip("H.264")


def test_the_command_prints_a_table_and_writes_rows(tmp_path, capsys):
    code = cli.main(["doctor", "--json", str(tmp_path / "doctor.json")])
    rows = json.loads((tmp_path / "doctor.json").read_text())["rows"]
    printed = capsys.readouterr().out.splitlines()
    assert [r["name"] for r in rows] == [p.name for p in PROBES]
    assert all(line.startswith(r["name"]) for line, r in zip(printed[1:], rows, strict=True))
    by_name = {r["name"]: r for r in rows}
    assert by_name["Python"]["version"] == sys.version.split()[0]
    assert by_name["torch"]["usable"] and by_name["PyAV"]["usable"] and by_name["codec H.264"]["usable"]
    assert code == 0


def test_a_missing_necessity_fails_the_command(monkeypatch, capsys):
    def absent() -> tuple[str, str]:
        raise NotUsable("not installed")

    monkeypatch.setattr(
        doctor, "PROBES", (Probe("torch", absent, "pip install torch", required=True), Probe("extra", absent, "later"))
    )
    assert cli.main(["doctor"]) == cli.FAILED
    out = capsys.readouterr().out
    assert "NO" in out and "not installed; pip install torch" in out
    assert not healthy(doctor.examine())
    assert "no " in show(doctor.examine()).splitlines()[2]
