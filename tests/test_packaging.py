"""What is installed, under which names, and who may import what."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("engine", "kernels", "csrc", "configs", "benchmarks")
SOURCES = sorted(p for folder in ("engine", "kernels", "benchmarks") for p in (ROOT / folder).rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Imported lazily, each by the files of one place.
OPTIONAL = {
    "deepspeed": "engine/backend/",
    "triton": "kernels/gpu/",
    "nvidia.dali": "engine/data/",
    "flash_attn": "kernels/",
    "apex": "engine/adam_kernels.py",
    "wandb": "engine/",
    "tensorboard": "engine/",
    "matplotlib": "engine/",
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST) -> list[str]:
    """Dotted names of everything a tree imports, at any depth."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def is_of(name: str, package: str) -> bool:
    aliases = {"tensorboard": ("tensorboard", "torch.utils.tensorboard")}.get(package, (package,))
    return any(name == alias or name.startswith(alias + ".") for alias in aliases)


# ---- names -----------------------------------------------------------------------------------------------------------


def test_the_root_folders_are_no_packages():
    # A root package called `kernels` would shadow the published one for whoever runs Python from the checkout.
    assert not [folder for folder in FOLDERS if (ROOT / folder / "__init__.py").exists()]
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_the_installed_names_lead_here_from_anywhere(tmp_path):
    code = "import vatt.engine.config as c, vatt.kernels, vatt.configs, vatt.csrc, vatt.benchmarks; print(c.__file__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / "engine" / "config.py"


def test_the_command_is_installed():
    (script,) = entry_points(group="console_scripts", name="vatt")
    assert script.value == "vatt.engine.cli:main"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_keep_their_place(path):
    name = name_of(path)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    used = imports(tree)
    assert not [n for n in used if n.split(".")[0] in FOLDERS], "import vatt.engine, vatt.kernels"
    if name.startswith("kernels/"):
        assert not [n for n in used if n.startswith("vatt.engine")], "kernels never import the engine"
    # What runs when the module is imported: everything outside functions, and not under `if TYPE_CHECKING`.
    eager = ast.Module([n for n in tree.body if not isinstance(n, ast.If) or "TYPE_CHECKING" not in ast.unparse(n.test)], [])
    for node in ast.walk(eager):
        if isinstance(node, ast.FunctionDef):
            node.body = []
    for package, place in OPTIONAL.items():
        if name.startswith("benchmarks/"):
            continue
        if [n for n in used if is_of(n, package)]:
            assert name.startswith(place), f"{package} is imported under {place} only"
        if not name.startswith("kernels/gpu/"):
            assert not [n for n in imports(eager) if is_of(n, package)], f"{package} is imported lazily"


@pytest.mark.parametrize("package", [p for p in OPTIONAL if p != "triton"])
def test_an_optional_package_enters_in_one_file(package):
    inside = [p for p in SOURCES if not name_of(p).startswith("benchmarks/")]
    files = [name_of(p) for p in inside if any(is_of(n, package) for n in imports(ast.parse(p.read_text(encoding="utf-8"))))]
    assert len(files) <= 1, files


def test_importing_everything_loads_nothing_optional():
    modules = [
        "vatt." + name_of(p).removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        for p in SOURCES
        if not name_of(p).startswith(("kernels/gpu/", "benchmarks/"))
    ]
    assert "vatt.engine.model" in modules and "vatt.kernels.counter" in modules
    code = f"""
import importlib, json, sys
import torch, torch.distributed
before = set(sys.modules)
for module in {modules!r}:
    importlib.import_module(module)
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert not [n for n in loaded for package in OPTIONAL if is_of(n, package)]


# ---- size ------------------------------------------------------------------------------------------------------------


def test_files_stay_small():
    files = [p for folder in ("engine", "kernels", "csrc") for p in (ROOT / folder).rglob("*") if p.is_file()]
    lengths = {name_of(p): len(p.read_bytes().splitlines()) for p in files if "__pycache__" not in p.parts}
    assert not {name: length for name, length in lengths.items() if length > 400}
    assert not [name for name in lengths if Path(name).stem in ("utils", "util", "helpers", "misc")]


def test_a_training_step_fits_on_a_screen():
    tree = ast.parse((ROOT / "engine" / "train.py").read_text(encoding="utf-8"))
    (step,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train_step"]
    assert step.end_lineno is not None and step.end_lineno - step.lineno + 1 <= 30


# ---- what ships ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a copy: building in place would leave, and reuse, a `build` folder here."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in (*FOLDERS, "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("golden"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    (copy / "benchmarks" / "results" / "machine").mkdir(parents=True, exist_ok=True)
    (copy / "benchmarks" / "results" / "machine" / "step.py").write_text("")
    (copy / "csrc" / "probe.cpp").write_text("// a source ships\n")
    (copy / "engine" / "__pycache__").mkdir(exist_ok=True)
    (copy / "engine" / "__pycache__" / "stale.py").write_text("")
    code = f"import setuptools.build_meta as b; b.build_wheel({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = out.glob("*.whl")
    return zipfile.ZipFile(file)


def test_the_wheel_holds_the_code_the_recipes_and_the_sources(wheel):
    names = set(wheel.namelist())
    recipes = (ROOT / "configs").rglob("*.toml")
    code = [p for p in SOURCES if "results" not in p.parts]
    assert {f"vatt/{name_of(p)}" for p in [*code, *recipes]} <= names
    assert "vatt/csrc/probe.cpp" in names


def test_the_wheel_holds_nothing_else(wheel):
    names = wheel.namelist()
    outside = [n for n in names if not n.startswith("vatt/") and not re.match(r"vatt_engine-[^/]+\.dist-info/", n)]
    assert outside == []
    assert {n.split("/")[1] for n in names if n.startswith("vatt/")} <= set(FOLDERS)
    assert not [n for n in names if "results" in n or "__pycache__" in n or "test" in n.split("/")[-1]]
    assert "vatt/engine/__init__.py" not in names and "vatt/kernels/__init__.py" not in names


def test_the_wheel_states_licence_script_and_ranges(wheel):
    (metadata,) = [wheel.read(n).decode() for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
    assert "License-Expression: Apache-2.0\n" in metadata
    assert any(n.endswith("licenses/LICENSE") for n in wheel.namelist())
    needed = {Requirement(r).name for r in re.findall(r"^Requires-Dist: (.+)$", metadata, re.M) if "extra ==" not in r}
    assert needed == {"torch", "numpy", "av", "safetensors"}
    (script,) = [wheel.read(n).decode() for n in wheel.namelist() if n.endswith("entry_points.txt")]
    assert "vatt = vatt.engine.cli:main" in script


def test_the_pins_cover_what_the_environment_needs():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if line and not line.startswith("#"))
    extras = PROJECT["optional-dependencies"]
    wanted = [Requirement(r) for r in [*PROJECT["dependencies"], *extras["dev"]]]
    (own,) = [r for r in wanted if r.name == PROJECT["name"]]
    wanted += [Requirement(r) for extra in own.extras for r in extras[extra]]
    for requirement in wanted:
        if requirement.name != PROJECT["name"]:
            assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


# ---- the suite itself ------------------------------------------------------------------------------------------------


def test_a_missing_golden_file_fails(golden):
    with pytest.raises(pytest.fail.Exception, match="golden file missing: .*no_such_arrays.npz"):
        golden("no_such_arrays")
    assert golden("losses")


def test_test_files_have_unique_names():
    names = [p.name for p in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)
