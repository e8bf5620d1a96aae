"""A folder of wheels for pip's --find-links: empty ones in the versions of the lock, and what builds our package."""

import importlib.metadata
import re
import zipfile
from pathlib import Path

from packaging.requirements import Requirement

METADATA = "Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: stand-in\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def empty_wheel(folder: Path, name: str, version: str, *requirements: str) -> None:
    escaped = re.sub(r"[-_.]+", "_", name)
    info = f"{escaped}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {requirement}\n" for requirement in requirements)
    with zipfile.ZipFile(folder / f"{escaped}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", METADATA.format(name=name, version=version) + needs)
        wheel.writestr(f"{info}/WHEEL", WHEEL)
        wheel.writestr(f"{info}/RECORD", "")


def repacked_wheel(folder: Path, name: str) -> None:
    """A working wheel of a package that is installed here."""
    found = importlib.metadata.distribution(name)
    escaped = re.sub(r"[-_.]+", "_", name)
    with zipfile.ZipFile(folder / f"{escaped}-{found.version}-py3-none-any.whl", "w") as wheel:
        for file in found.files or []:
            if ".." not in file.parts and file.suffix != ".pyc":
                wheel.write(str(found.locate_file(file)), str(file))


def needed_by(name: str) -> set[str]:
    """The package and all that it requires here, without extras."""
    known, waiting = set(), [name]
    while waiting:
        package = waiting.pop()
        if package not in known:
            known.add(package)
            requirements = map(Requirement, importlib.metadata.requires(package) or [])
            waiting += [
                need.name for need in requirements if need.marker is None or need.marker.evaluate({"extra": ""})
            ]
    return known


def index(folder: Path, lock: list[str], torch_triton: str) -> Path:
    """Every pin of the lock, torch without a suffix and in need of its own version of triton, as on PyPI."""
    folder.mkdir()
    builders = needed_by("hatchling")
    for pin in lock:
        name, version = pin.split("==")
        if name == "torch":
            empty_wheel(folder, name, version, f"triton=={torch_triton}")
        elif name.lower().replace("_", "-") not in builders:
            empty_wheel(folder, name, version)
    empty_wheel(folder, "triton", torch_triton)
    empty_wheel(folder, "editables", "0.5")  # hatchling asks for it and, with dev-mode-dirs, does without
    for name in builders:
        repacked_wheel(folder, name)
    return folder
