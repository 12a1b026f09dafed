"""The house rules: what may import what, and who may print."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import vitkd

PACKAGE = Path(vitkd.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "conf" not in path.relative_to(PACKAGE).parts)
ENTRY_POINTS = {"train", "train_stacked", "evaluate", "explain/__main__", "report/__main__"}

# Of vitkd, this room may import only these; entry points may import everything.
MAY_IMPORT = {
    "errors": set(),
    "data": {"errors"},
    "holm": set(),
    "models": {"errors"},
    "explain": {"errors", "holm", "models"},
    "report": {"errors", "holm", "runs"},
    "distill": {"errors", "models", "data"},
    "stacked": {"errors", "models", "data", "distill"},
    "runs": {"errors", "models", "data", "distill", "stacked", "explain"},
    "schema": {"errors"},
    "config": {"errors", "models", "data", "distill", "schema"},
    "finished": {"errors", "config", "models", "runs"},
    "messages": {"errors", "config"},
    "jobs": {"errors", "runs"},
    "cli": {"errors", "config", "messages", "distill", "jobs", "runs", "schema"},
    "stacking": {"cli", "config", "distill", "jobs", "models", "runs", "stacked", "train"},
}
HYDRA_AT_HOME = {"finished", "config", "schema", "cli", "messages", "jobs", "stacking"}
MAY_PRINT = {"cli", "runs/console", "runs/processes"}


def module_of(file: Path) -> str:
    """`runs/folder` for vitkd/runs/folder.py."""
    return file.relative_to(PACKAGE).with_suffix("").as_posix()


def room_of(file: Path) -> str:
    """The package or module directly below vitkd."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def is_entry_point(file: Path) -> bool:
    return module_of(file) in ENTRY_POINTS


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
def test_imports_go_one_way(file):
    room = room_of(file)
    if is_entry_point(file) or room == "__init__":
        return

    assert room in MAY_IMPORT, "say in MAY_IMPORT what this new room may import"
    assert rooms_imported(file) <= MAY_IMPORT[room]


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_only_the_front_of_the_house_knows_hydra(file):
    knows = {name.split(".")[0] for name in imported(file)} & {"hydra", "omegaconf"}

    assert not knows or is_entry_point(file) or module_of(file) in HYDRA_AT_HOME


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_only_the_console_prints(file):
    calls = (
        node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
    )
    prints = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]

    assert not prints or module_of(file) in MAY_PRINT, f"prints in lines {prints}; use the log"


def test_no_two_rooms_import_each_other():
    graph: dict[str, set[str]] = {}
    for file in FILES:
        # The entry point of a package may import what imports the package.
        room = module_of(file) if is_entry_point(file) else room_of(file)
        graph.setdefault(room, set()).update(rooms_imported(file))

    order = [*TopologicalSorter(graph).static_order()]

    assert order.index("models") < order.index("distill") < order.index("train")


@pytest.mark.parametrize("package", ["data", "models", "distill", "runs", "explain", "report"])
def test_no_cycle_within_a_package(package):
    graph: dict[str, set[str]] = {}
    for file in (file for file in FILES if room_of(file) == package and file.stem != "__init__"):
        names = {".".join(name.split(".")[:3]) for name in imported(file)}
        graph[f"vitkd.{package}.{file.stem}"] = {
            name for name in names if name.startswith(f"vitkd.{package}.")
        }

    assert [*TopologicalSorter(graph).static_order()]


def test_the_rules_would_notice(tmp_path):
    """The walk sees imports inside functions and under aliases."""
    file = tmp_path / "new.py"
    file.write_text("def f():\n    import hydra.utils as u\n    from vitkd.distill import losses\n")

    assert {*imported(file)} == {"hydra.utils", "vitkd.distill.losses"}
