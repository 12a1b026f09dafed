"""The house rules: what may import what, and who may print."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import vitkd

PACKAGE = Path(vitkd.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "conf" not in path.relative_to(PACKAGE).parts)
# Each room may import from those before it: science first, then what a run is, then the commands.
FLOORS = (
    *("errors", "statistics", "colours", "process"),
    *("models", "data", "optim", "methods"),
    *("config", "runs", "cli"),
    *("evaluate", "explain", "export", "train", "report"),
)
KNOW_HYDRA = (
    *("config/", "cli/", "runs/load"),
    *("train/job", "train/plan", "train/stacked/job", "train/stacked/candidates"),
)
ENTRY_POINTS = ("evaluate/__main__", "explain/__main__", "export/__main__", "report/__main__")
MAY_PRINT = {"cli/command", "cli/console", "process/distributed"}


def module_of(file: Path) -> str:
    """`runs/folder` for vitkd/runs/folder.py."""
    return file.relative_to(PACKAGE).with_suffix("").as_posix()


def room_of(file: Path) -> str:
    """The package or module directly below vitkd."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(file: Path) -> Iterator[str]:
    """The dotted name of everything that `file` imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide where things come from"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_imported(file: Path) -> set[str]:
    """The rooms of vitkd that `file` imports from, its own left out."""
    names = (name.split(".") for name in imported(file))
    rooms = {parts[1] for parts in names if parts[0] == "vitkd" and len(parts) > 1}
    return {room for room in rooms if (PACKAGE / room).is_dir() or (PACKAGE / f"{room}.py").is_file()} - {
        room_of(file)
    }


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_no_import_runs_back_up(file):
    room = room_of(file)
    if room == "__init__":
        return

    assert room in FLOORS, "give this new room its floor"
    above = {other for other in rooms_imported(file) if FLOORS.index(other) > FLOORS.index(room)}
    assert not above


def test_few_modules_lie_at_the_top():
    assert len([file for file in PACKAGE.glob("*.py") if file.stem != "__init__"]) <= 3


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_only_the_front_of_the_house_knows_hydra(file):
    knows = {name.split(".")[0] for name in imported(file)} & {"hydra", "omegaconf"}

    assert not knows or module_of(file).startswith((*KNOW_HYDRA, *ENTRY_POINTS))


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_only_the_console_prints(file):
    calls = (
        node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
    )
    prints = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]

    assert not prints or module_of(file) in MAY_PRINT, f"prints in lines {prints}; use the log"


@pytest.mark.parametrize("package", FLOORS[2:])
def test_no_cycle_within_a_package(package):
    files = {f"vitkd/{module_of(file)}".replace("/", "."): file for file in FILES if room_of(file) == package}
    graph = {
        module: {name.rpartition(".")[0] for name in imported(file)} & files.keys() - {module}
        for module, file in files.items()
        if file.stem != "__init__"
    }

    assert [*TopologicalSorter(graph).static_order()]


def test_nothing_but_the_command_imports_the_recipe():
    """What a job does after its plan is made stands on pieces that do not know the job."""
    importers = {
        module_of(file)
        for file in FILES
        for name in imported(file)
        if f"{name}.".startswith("vitkd.train.job.")
    }

    assert importers == {"train/__main__"}


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_no_architecture_is_named_outside_models(file):
    """A model says what it has: attention layouts, a distillation token, parameters that stack."""
    named = {name.rpartition(".")[2] for name in imported(file)} & {
        "ViT",
        "ViTConfig",
        "ResNet",
        "ResNetConfig",
    }

    assert room_of(file) == "models" or not named


def test_the_rules_would_notice(tmp_path):
    """The walk sees imports inside functions and under aliases."""
    file = tmp_path / "new.py"
    file.write_text("def f():\n    import hydra.utils as u\n    from vitkd.methods.maps import losses\n")

    assert {*imported(file)} == {"hydra.utils", "vitkd.methods.maps.losses"}
