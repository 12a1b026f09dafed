"""pyproject.toml declares what is imported, and requirements.lock pins what pyproject.toml asks for."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = SETTINGS["project"]
EXTRAS = [text for extra in PROJECT["optional-dependencies"].values() for text in extra]
IMPORTED = [
    text for extra in ("timm", "wandb", "mlflow", "onnx") for text in PROJECT["optional-dependencies"][extra]
]
"""what extras bring that vitkd itself imports, where somebody asks for it"""
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
OWN = {"vitkd", "hydra_plugins", "benchmarks", "tests"}
# CUDA builds of PyTorch bring Triton; what uses it first looks whether it is there.
OPTIONAL = {"triton"}


def modules_of(file: Path) -> Iterator[str]:
    """The module of every absolute import in `file`, inside functions as well."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def third_party(folder: str) -> set[str]:
    """The top-level modules that the files in `folder` import, less the standard library's and ours."""
    names = {name.split(".")[0] for file in (ROOT / folder).rglob("*.py") for name in modules_of(file)}
    return names - sys.stdlib_module_names - OWN - OPTIONAL


def test_what_an_extra_brings_is_imported_by_one_room():
    """Which nothing imports before it has said what to install where that is missing."""
    room = ROOT / "vitkd" / "models" / "timm"
    others = [file for file in (ROOT / "vitkd").rglob("*.py") if room not in file.parents]

    assert not [file for file in others for name in modules_of(file) if name.split(".")[0] == "timm"]
    assert "timm" not in {name.split(".")[0] for name in modules_of(room / "model.py")}


def names_of(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def asked_for() -> list[Requirement]:
    """What `make install` must bring: dependencies, every extra, and what builds vitkd."""
    texts = [*PROJECT["dependencies"], *EXTRAS, *SETTINGS["build-system"]["requires"]]
    return [requirement for requirement in map(Requirement, texts) if requirement.name != PROJECT["name"]]


def locked(python: str, machine: dict[str, str]) -> dict[str, str]:
    """Each package's version in the lock for this Python on this machine."""
    environment = {"python_version": python, "python_full_version": f"{python}.0", **machine}
    lines = (line.partition("#")[0].strip() for line in LOCK.splitlines())
    versions: dict[str, str] = {}
    for requirement in map(Requirement, filter(None, lines)):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (pin,) = requirement.specifier
            assert pin.operator == "=="
            assert versions.setdefault(canonicalize_name(requirement.name), pin.version) == pin.version
    return versions


@pytest.mark.parametrize(
    ("folder", "declared"),
    [
        ("vitkd", [*PROJECT["dependencies"], *IMPORTED]),
        ("hydra_plugins", PROJECT["dependencies"]),
        ("benchmarks", [*PROJECT["dependencies"], *EXTRAS]),
        ("tests", [*PROJECT["dependencies"], *EXTRAS]),
    ],
)
def test_what_is_imported_is_declared(folder, declared):
    distributions = packages_distributions()
    modules = third_party(folder)

    assert "torch" in modules or folder == "hydra_plugins"
    for module in modules:
        providers = {canonicalize_name(name) for name in distributions.get(module, [])}
        assert providers & names_of(declared), f"{module} comes with {providers}: name it in pyproject.toml"


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize(
    "machine",
    [
        {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"},
        {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "aarch64"},
        {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"},
    ],
    ids=lambda machine: "-".join(machine.values()),
)
def test_the_lock_pins_what_pyproject_asks_for(python, machine):
    versions = locked(python, machine)

    for requirement in asked_for():
        version = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"run make lock: {requirement}, locked {version}"


def test_every_requirement_has_a_lowest_version():
    for requirement in asked_for():
        operators = {pin.operator for pin in requirement.specifier}
        assert operators & {">=", "=="}, f"{requirement} has no lower bound to test"


def test_the_lock_names_no_place():
    """Neither an index nor a folder: it installs from whichever index pip is set up for."""
    assert "://" not in LOCK
    assert " @ " not in LOCK
    assert not [line for line in LOCK.splitlines() if line.startswith(("-", "/", "."))]
