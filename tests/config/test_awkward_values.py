"""Whatever a setting is set to, a run is either as asked for, or refused in one line before anything happens.

Each setting of each option in conf/ is set to each of AWKWARD. That goes through the commands' own path from
Hydra's parser to the loaded data, in one process, and stops where a teacher or a run folder would be made.
"""

import itertools
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from tests.merged import saved_students
from tests.photos import noise_photos
from vitkd.cli.command import check_arguments, check_composed, with_home
from vitkd.cli.console import Job
from vitkd.cli.messages import LONGEST_LINE, explain
from vitkd.config.roles import flatten
from vitkd.config.run import CONF_DIR, GROUPS
from vitkd.errors import ConfigError
from vitkd.process.isolation import isolated
from vitkd.train import job, student
from vitkd.train.plan import Plan

AWKWARD = [
    *("word", "''", "null", "true", "~/x", "50%", "'2'", "x" * 300, "x" * 10_000),
    *("-1", "0", "1", "1.5", "1e-300", "1e400", "nan", "inf", "-inf"),
    *("10000000001", "99999999999999999999", "1" + "0" * 400, "9" * 5000),
    *(
        "[]",
        "{}",
        "{a:1}",
        "[[1,2]]",
        "[[a,[b]],{c:[]}]",
        "[[0.5],0.5,0.5]",
        "[nan]",
        "[-1]",
        "[10000000001]",
    ),
    *("'\udcff\udcfe'", "'a\x00b'", "'a\nb'", "'\x1b[31m'"),
    *("${no.such}", "${KEY}", "${oc.env:NO_SUCH}", "${alpha}"),
]
SECONDS = 10
GIB = 2**30
OPTIONS = [f"{group}={path.stem}" for group in GROUPS for path in sorted((CONF_DIR / group).glob("*.yaml"))]
# With one of these every option is of a run that works on this machine.
COMPANIONS = (
    [],
    ["method=logit"],
    ["method=none"],
    ["teacher=resnet56"],
    ["trainer.accelerator=cpu"],
    ["logger.wandb.mode=offline"],
)


class ValidError(Exception):
    """A run would begin now."""


def begin(*_: Any, **__: Any) -> None:
    raise ValidError


@contextmanager
def limited() -> Iterator[None]:
    """What hangs, or asks for much more memory than there is, raises an error that no code expects."""

    def stop(*_: Any) -> None:
        raise AssertionError("hangs")

    before, limits = signal.signal(signal.SIGALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * GIB, limits[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture
def outcome(tmp_path, monkeypatch) -> Iterator[Callable[[DictConfig, str], str | None]]:
    """outcome(composed, "alpha=2"): the line that refuses it, or None if a run would begin."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(job, "joined", lambda *_: nullcontext())
    monkeypatch.setattr(Plan, "claim_folder", begin)
    for name in ("stored_teacher", "first_weights"):
        monkeypatch.setattr(student, name, begin)

    def run(composed: DictConfig, argument: str) -> str | None:
        try:
            check_arguments([argument := with_home(argument)])
            overrides = OverridesParser.create().parse_overrides([argument])
            own = composed.copy()
            ConfigLoaderImpl._apply_overrides_to_config(overrides, own)
            check_composed(own)
            with open_dict(own):
                del own["hydra"]
            signal.alarm(SECONDS)
            job.run_job(own, Job(0, {}))
        except ValidError:
            return None
        except (HydraException, OmegaConfBaseException, ConfigError) as error:
            return explain(error, "train", [argument])
        finally:
            signal.alarm(0)
        raise AssertionError("neither begun nor refused")

    with limited(), isolated():
        yield run
    GlobalHydra.instance().clear()


def compose(*overrides: str) -> DictConfig:
    GlobalHydra.instance().clear()
    hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3")
    return hydra.compose("train", [*overrides], return_hydra_config=True)


def working(option: str, photos: Path, outcome) -> DictConfig:
    """The configuration of a run with this option that works."""
    of_folder = [f"dataset.root={photos}"] if "image_folder" in option or "flowers" in option else []
    of_folder += ["dataset.num_classes=null"] if "flowers" in option else []
    of_folder += [saved_students(photos)] if "merged" in option else []
    for companion in COMPANIONS:
        composed = compose(option, *of_folder, *companion)
        HydraConfig.instance().set_config(composed)
        if outcome(composed, "name=null") is None:
            return composed
    raise AssertionError(f"{option}: add what it needs to COMPANIONS")


def settings_of(composed: DictConfig, option: str) -> list[str]:
    """What an option sets, groups within it too; of dataset=digits also the settings of no option."""
    plain = OmegaConf.to_container(composed, resolve=False)
    del plain["hydra"]
    names = {name for name, _ in flatten(plain) if "_target_" not in name}
    names |= {name.rpartition(".")[0] for name in names if name.count(".") > 1}
    group = option.partition("=")[0]
    groups = {group} if option != "dataset=digits" else {group, "teacher", *plain.keys() - {*GROUPS}}
    return sorted(name for name in names if name.partition(".")[0] in groups)


def assert_refused_well(line: str, name: str) -> None:
    assert len(line) <= LONGEST_LINE + 10
    assert line.isprintable() or "\udcff" in line, line
    assert name.rpartition(".")[2] in line or name.partition(".")[0] in line, line


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return noise_photos(tmp_path_factory.mktemp("photos"), of_each_class=8, size=8)


def check_all(option: str, values: list[str], each: int, photos: Path, outcome) -> None:
    """Set every setting to `each` of the values, another few each time."""
    composed, values = working(option, photos, outcome), itertools.cycle(values)
    for name in settings_of(composed, option):
        for value in itertools.islice(values, each):
            line = outcome(composed, f"{name}={value.replace('KEY', name)}")
            if line is not None:
                assert_refused_well(line, name)
            assert not any(Path().iterdir()), (name, value)


NOT_HERE = ("cifar", "mnist", "dataset=tiny_imagenet", "gpu", "fsdp")
HERE = [option for option in OPTIONS if not any(word in option for word in NOT_HERE) or "student" in option]


@pytest.mark.parametrize("option", HERE)
def test_settings_are_as_asked_for_or_refused(option, photos, outcome):
    """Values in turn: all of them for every setting take minutes."""
    check_all(option, AWKWARD, 3 if option == "dataset=digits" else 1, photos, outcome)


@pytest.mark.slow
@pytest.mark.parametrize("option", HERE)
def test_every_setting_takes_or_refuses_awkward_values(option, photos, outcome):
    check_all(option, AWKWARD, len(AWKWARD) if option == "dataset=digits" else 6, photos, outcome)


COMMANDS = {
    "evaluate": ("run", "root", "paths.data", "paths", "accelerator"),
    "explain": (
        "images",
        "of_class",
        "seed",
        "methods",
        "regions",
        "out",
        "epoch",
        "image",
        "teacher",
        "model",
        "by_data_size",
    ),
}


@pytest.mark.parametrize("value", AWKWARD)
def test_a_finished_run_is_not_read_with_it(value, command, finished, tmp_path, monkeypatch):
    """In turn one of each command's settings."""
    monkeypatch.chdir(tmp_path)
    turn = AWKWARD.index(value)
    for name, settings in COMMANDS.items():
        setting = settings[turn % len(settings)]
        argument = f"{setting}={value.replace('KEY', setting)}"
        # The last is refused at once, so that nothing is explained.
        others = [f"run={finished}"] * (setting != "run") + ["faithfulness_images=-1"] * (name == "explain")

        ended = command(name, *others, argument)

        assert "Traceback" not in ended.err, ended.err
        assert ended.code in (0, 2), ended.err
        if ended.code:
            (line,) = ended.err.splitlines()
            assert line.startswith("error: ")
            assert setting.rpartition(".")[2] in line or "faithfulness_images" in line, line
        assert not any(tmp_path.iterdir())
