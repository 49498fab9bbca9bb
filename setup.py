"""Where the packages live: root folders install under `vatt.` (metadata and tool settings are in pyproject.toml)."""

from setuptools import find_namespace_packages, setup

FOLDERS = {f"vatt.{name}": name for name in ("engine", "kernels", "csrc", "configs", "benchmarks")}

packages = [
    package
    for name, folder in FOLDERS.items()
    for package in (name, *(f"{name}.{sub}" for sub in find_namespace_packages(folder)))
    if "results" not in package.split(".")
]

setup(packages=packages, package_dir=FOLDERS)
