"""An installed package adds options; CONTRIBUTING's example is built, installed and trained with."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vitkd.config.schema import allowed_class, build
from vitkd.errors import ConfigError
from vitkd.methods.maps.losses import KL, AttentionLoss
from vitkd.process import plugins

ROOT = Path(__file__).parents[1]
_, _, SECTION = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## A package of your own")
SECTION, _, _ = SECTION.partition("\n## ")
FILES = dict(re.findall(r"`([\w./]+)`[^`\n]*:\n\n```\w+\n(.*?)```", SECTION, flags=re.DOTALL))
COMMANDS = re.findall(r"^python (-m vitkd\.train .*)$", SECTION, flags=re.MULTILINE)
BRIEFLY = [
    *("trainer.max_epochs=2", "teacher.max_epochs=1", "teacher.trainer.limit_train_batches=2"),
    *("trainer=cpu", "teacher.depth=1", "name=run"),
]


def python(*arguments: str, cwd: Path, path: Path) -> subprocess.CompletedProcess[str]:
    """Python in which the packages in `path` are installed, with this checkout."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), str(ROOT)])}
    line = [sys.executable, *arguments]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder of packages with the example's."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name, content in FILES.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(content)
    line = ["-m", "pip", "install", "--no-deps", "--no-index", "--no-build-isolation", "--quiet"]
    done = python(*line, "--target", str(folder), str(source), cwd=source, path=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def place(tmp_path) -> Path:
    """A working folder with the example's options."""
    for name, content in FILES.items():
        if name.startswith("conf/"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
    return tmp_path


def test_the_example_is_whole():
    groups = {name.split("/")[1] for name in FILES if name.startswith("conf/")}

    assert {"pyproject.toml", "vitkd_example.py"} < FILES.keys()
    assert groups == {"loss", "method", "student", "dataset"}
    assert len(COMMANDS) == 2


@pytest.mark.slow
@pytest.mark.parametrize("line", COMMANDS)
def test_what_the_example_adds_is_trained_and_measured_again(line, installed, place):
    trained = python(*line.split(), *BRIEFLY, cwd=place, path=installed)
    run = place / "outputs" / "stripes" / "run"
    again = python("-m", "vitkd.evaluate", f"run={run}", cwd=place, path=installed)
    resumed = python(*line.split(), *BRIEFLY, "resume=auto", cwd=place, path=installed)

    assert trained.returncode == 0, trained.stderr
    assert (run / "student.safetensors").exists()
    assert again.returncode == 0, again.stderr + again.stdout
    assert "already done" in resumed.stdout, resumed.stderr


@pytest.mark.slow
def test_what_is_not_installed_is_refused_in_one_line(place):
    (place / "vitkd_example.py").write_text('open("went off", "w").write("x")')

    ended = python(*COMMANDS[0].split(), *BRIEFLY, cwd=place, path=place)

    assert ended.returncode == 2, ended
    (line,) = ended.stderr.splitlines()
    assert "_target_=vitkd_example." in line
    assert "vitkd.plugins" in line
    assert not (place / "went off").exists()
    assert not (place / "outputs").exists()


@pytest.fixture
def plugin(tmp_path, monkeypatch) -> Path:
    """A package that names its module `theirs.losses` as a plugin, by the metadata that pip would write."""
    about = tmp_path / "theirs-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[vitkd.plugins]\ntheirs = theirs.losses\n")
    package = tmp_path / "theirs"
    package.mkdir()
    (package / "__init__.py").write_text("")
    loss = (
        "from vitkd.methods.maps.losses import KL\nfrom theirs.other import Other\nclass Own(KL):\n    pass\n"
    )
    (package / "losses.py").write_text(loss)
    (package / "other.py").write_text(
        "from vitkd.methods.maps.losses import KL\nclass Other(KL):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    plugins.plugin_modules.cache_clear()
    yield package
    plugins.plugin_modules.cache_clear()
    for module in [name for name in sys.modules if name.partition(".")[0] == "theirs"]:
        del sys.modules[module]


def test_a_class_of_a_plugins_module_is_an_option(plugin):
    node = {"_target_": "theirs.losses.Own", "reduction": "mean", "temperature": 2.0}

    built = build("loss", node, AttentionLoss)

    assert isinstance(built, KL)
    assert (type(built).__module__, built.temperature) == ("theirs.losses", 2.0)


@pytest.mark.parametrize("name", ["other.Other", "Own", "losses.Other", "losses.nothing"])
def test_what_no_entry_point_names_is_refused(name, plugin):
    """Nor a module beside the named one, nor what that has merely imported from there."""
    with pytest.raises(ConfigError, match=re.escape("vitkd.plugins")):
        allowed_class("loss", f"theirs.{name}", AttentionLoss)


def test_a_module_beside_the_named_one_is_not_imported(plugin):
    (plugin / "other.py").write_text("raise SystemExit")

    with pytest.raises(ConfigError, match="only vitkd's own"):
        allowed_class("loss", "theirs.other.Other", AttentionLoss)


def test_a_plugin_that_cannot_be_imported_is_one_line(plugin):
    (plugin / "losses.py").write_text("import no_such_package")

    with pytest.raises(
        ConfigError, match=r"^loss\._target_=theirs\.losses: cannot be imported \(.*no_such_package"
    ):
        allowed_class("loss", "theirs.losses.Own", AttentionLoss)


def test_the_metadata_is_read_once(monkeypatch):
    """It takes milliseconds for each of a hundred packages."""
    calls = []
    monkeypatch.setattr(
        plugins, "entry_points", lambda group: calls.append(group) or [SimpleNamespace(value="m")]
    )
    plugins.plugin_modules.cache_clear()

    assert plugins.is_plugin("m.sub")
    assert not plugins.is_plugin("mm")
    assert calls == ["vitkd.plugins"]
    plugins.plugin_modules.cache_clear()
