"""Where the packages live: root folders install under `vatt.` (metadata and tool settings are in pyproject.toml).

`engine/` and `kernels/` have no `__init__.py` of their own: a root package called `kernels` would be imported in place of
the published one of that name by whoever runs Python from this folder.
"""

from setuptools import find_namespace_packages, setup

FOLDERS = {f"vatt.{name}": name for name in ("engine", "kernels", "csrc", "configs", "benchmarks")}
LEFT_OUT = {"results", "__pycache__"}  # measurements belong to the repository, not to an installation

packages = [
    package
    for name, folder in FOLDERS.items()
    for package in (name, *(f"{name}.{sub}" for sub in find_namespace_packages(folder)))
    if LEFT_OUT.isdisjoint(package.split("."))
]

setup(packages=packages, package_dir=FOLDERS)
