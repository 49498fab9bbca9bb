"""Where the packages live: root folders install under `vatt.` (metadata and tool settings are in pyproject.toml).

`engine/` and `kernels/` have no `__init__.py` of their own: a root package called `kernels` would be imported in place of
the published one of that name by whoever runs Python from this folder.

The C++ of csrc/ is built on first use, for the machine it runs on. `VATT_BUILD_NATIVE=1 pip install --no-build-isolation .`
builds it ahead of time instead, against the torch that is installed, for any processor with AVX2; the wheel is then one
platform's.
"""

import os
import subprocess
import sys

from setuptools import Distribution, find_namespace_packages, setup
from setuptools.command.build_py import build_py

FOLDERS = {f"vatt.{name}": name for name in ("engine", "kernels", "csrc", "configs", "benchmarks")}
LEFT_OUT = {"results", "__pycache__"}  # measurements belong to the repository, not to an installation

packages = [
    package
    for name, folder in FOLDERS.items()
    for package in (name, *(f"{name}.{sub}" for sub in find_namespace_packages(folder)))
    if LEFT_OUT.isdisjoint(package.split("."))
]

AHEAD = os.environ.get("VATT_BUILD_NATIVE") == "1"


class BuildNative(build_py):
    """Copies the packages, then builds csrc/ inside the copy, with the copy's own code."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            sys.exit("error: VATT_BUILD_NATIVE=1 with --editable: leave it out, the C++ is then built on first use")
        path = os.pathsep.join([os.path.abspath(self.build_lib), os.environ.get("PYTHONPATH", "")])
        # -P: the root folders of a checkout must not be taken for the packages.
        command = [sys.executable, "-P", "-m", "vatt.kernels.native"]
        if subprocess.run(command, env=os.environ | {"PYTHONPATH": path}).returncode != 0:
            sys.exit(
                "error: VATT_BUILD_NATIVE=1: the C++ was not built (see above); pip needs --no-build-isolation to find torch"
            )


class OfThisPlatform(Distribution):
    """Its wheel holds machine code."""

    def has_ext_modules(self) -> bool:
        return True


if AHEAD:
    setup(packages=packages, package_dir=FOLDERS, cmdclass={"build_py": BuildNative}, distclass=OfThisPlatform)
else:
    setup(packages=packages, package_dir=FOLDERS)
