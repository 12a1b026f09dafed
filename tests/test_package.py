"""The installed wheel does what the checkout does, from any folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = [
    "method=none",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "log_every_n_steps=1",
    "name=run",
]

pytestmark = pytest.mark.slow


def python(*arguments: str, cwd: Path, path: Path) -> subprocess.CompletedProcess[str]:
    """Python with `path` before everything that is installed."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    line = [sys.executable, *arguments]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel that pip builds from this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    line = ["-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    built = python(*line, cwd=folder, path=folder)
    assert built.returncode == 0, built.stderr
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder of packages with the wheel's vitkd; what it depends on comes from this environment."""
    folder = tmp_path_factory.mktemp("installed")
    line = ["-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", str(folder), str(wheel)]
    done = python(*line, cwd=folder, path=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_wheel_holds_the_package_and_every_option(wheel):
    names = {*zipfile.ZipFile(wheel).namelist()}
    options = {f"vitkd/conf/{path.relative_to(ROOT / 'conf')}" for path in (ROOT / "conf").rglob("*.yaml")}
    rooms = (ROOT / "vitkd", ROOT / "hydra_plugins")
    files = {path for room in rooms for path in room.rglob("*.*") if path.is_file() and path.suffix != ".pyc"}

    assert options | {str(path.relative_to(ROOT)) for path in files} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"vitkd", "hydra_plugins"}
    assert "hydra_plugins/__init__.py" not in names, "other plugins lie there too"
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_commands_run_from_another_folder(installed, tmp_path):
    where = python("-c", "import vitkd.config.run as c; print(c.CONF_DIR)", cwd=tmp_path, path=installed)
    assert where.stdout.strip() == str(installed / "vitkd" / "conf")

    trained = python(str(installed / "bin" / "vitkd-train"), *TINY, cwd=tmp_path, path=installed)
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "outputs" / "digits" / "run" / "student.safetensors").is_file()

    evaluate = str(installed / "bin" / "vitkd-evaluate")
    measured = python(evaluate, "run=outputs/digits/run", cwd=tmp_path, path=installed)
    assert measured.returncode == 0, measured.stderr
    assert "differs" not in measured.stdout


def test_the_stacked_launcher_comes_with_it(installed, tmp_path):
    train = str(installed / "bin" / "vitkd-train")
    where = "import hydra_plugins.vitkd_stacked_launcher as plugin; print(plugin.__file__)"
    found = python("-c", where, cwd=tmp_path, path=installed)
    assert found.stdout.strip() == str(installed / "hydra_plugins" / "vitkd_stacked_launcher.py")

    settings = [setting for setting in TINY if not setting.startswith("name=")]
    swept = python(train, "-m", "hydra/launcher=stacked", "seed=0,1", *settings, cwd=tmp_path, path=installed)

    assert swept.returncode == 0, swept.stderr
    assert "jobs 0-1 train as one stack" in swept.stdout
    assert len([*(tmp_path / "outputs" / "digits").glob("*/student.safetensors")]) == 2


def test_its_errors_and_help_are_the_same(installed, tmp_path):
    train = str(installed / "bin" / "vitkd-train")

    refused = python(train, "alhpa=0.5", cwd=tmp_path, path=installed)
    helped = python(train, "--help", cwd=tmp_path, path=installed)

    assert refused.returncode == 2
    assert refused.stderr == "error: alhpa: no such setting; did you mean alpha?\n"
    assert helped.returncode == 0
    assert "granularity: block, encoder, head" in helped.stdout
    assert not [*tmp_path.iterdir()]


def test_the_checkout_runs_from_another_folder(tmp_path):
    trained = python("-m", "vitkd.train", *TINY, cwd=tmp_path, path=ROOT)

    assert trained.returncode == 0, trained.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    assert (tmp_path / "outputs" / "digits" / "run" / "student.safetensors").is_file()
