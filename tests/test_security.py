"""A file that somebody gave you is read as settings and numbers; nothing in it ever runs."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import vitkd.data.spec
from tests.bombs import Bomb
from vitkd.config.schema import allowed_class, build
from vitkd.data import Dataset, Digits, ImageFolder
from vitkd.errors import ConfigError
from vitkd.methods.base import Method
from vitkd.methods.maps.losses import KL, AttentionLoss
from vitkd.models import ViTConfig
from vitkd.runs.checkpoints import load_any

# Should a command not be refused after all, it soon ends.
BRIEFLY = [
    "trainer.max_epochs=1",
    "teacher.max_epochs=1",
    "trainer.limit_train_batches=1",
    "teacher.trainer.limit_train_batches=1",
]


@pytest.fixture
def bomb(tmp_path: Path) -> Bomb:
    return Bomb(tmp_path / "went off")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An empty working folder, in which nothing has appeared at the end."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield
    assert [*(tmp_path / "here").iterdir()] == []
    assert not (tmp_path / "went off").exists()


def is_refused(ended, *fragments: str) -> None:
    assert ended.code == 2, ended
    (line,) = ended.err.splitlines()
    assert line.startswith("error: ")
    for fragment in fragments:
        assert fragment in line


# What a node could name to have something run or written, all with a trace: `went_off` in the working folder.
HOSTILE = {
    "os.system": {"_target_": "os.system", "command": "touch went_off"},
    "os.mkdir": {"_target_": "os.mkdir", "_args_": ["went_off"]},
    "builtins.open": {"_target_": "builtins.open", "_args_": ["went_off", "w"]},
    "subprocess.Popen": {"_target_": "subprocess.Popen", "args": ["touch", "went_off"]},
    "pathlib.Path.touch": {"_target_": "pathlib.Path.touch", "_args_": ["went_off"]},
    "torch.load": {"_target_": "torch.load", "f": "BOMB", "weights_only": False},
    "vitkd.train.job.torch.load": {
        "_target_": "vitkd.train.job.torch.load",
        "f": "BOMB",
        "weights_only": False,
    },
    "vitkd.cli.os.system": {"_target_": "vitkd.cli.os.system", "command": "touch went_off"},
    "vitkd.train.job.Path": {"_target_": "vitkd.train.job.Path", "_args_": ["went_off"]},
    "hydra.utils.instantiate": {
        "_target_": "hydra.utils.instantiate",
        "_args_": [{"_target_": "os.mkdir", "_args_": ["went_off"]}],
    },
}
LIKELIEST = {"os.system", "builtins.open", "subprocess.Popen", "torch.load", "vitkd.train.job.torch.load"}
# Where it could stand: the places below a group where Hydra's instantiate would look, and the groups.
NESTED = ["teacher.optimizer", "dataset.augment", "trainer.strategy", "trainer.logger", "loss.temperature"]
GROUPS = [
    *("dataset", "student", "teacher", "method", "granularity", "loss", "optimizer", "schedule"),
    *("teacher.schedule", "trainer.callbacks", "trainer.plugins", "trainer.profiler"),
]


@pytest.fixture
def hostile(tmp_path: Path, bomb: Bomb) -> Callable[[str], dict]:
    torch.save(bomb, tmp_path / "bomb")

    def hostile(name: str) -> dict:
        node = dict(HOSTILE[name])
        return node | ({"f": str(tmp_path / "bomb")} if "f" in node else {})

    return hostile


def on_the_line(place: str, node: dict) -> list[str]:
    """The overrides that set `node` at `place`, each by its own kind of override."""
    return [
        f"++{place}.{key}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}"
        for key, value in node.items()
    ]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_target_on_the_command_line(name, hostile, command):
    is_refused(command("train", *BRIEFLY, *on_the_line("loss", hostile(name))), "loss", name)


@pytest.mark.slow
@pytest.mark.parametrize("place", NESTED + GROUPS)
def test_a_target_in_any_place_of_the_command_line(place, hostile, command):
    value = yaml.safe_dump(hostile("os.mkdir"), default_flow_style=True, width=1000).strip()
    is_refused(command("train", *BRIEFLY, f"++{place}={value}"), place.split(".")[0])


def in_a_file(tmp_path: Path, place: str, node: dict) -> list[str]:
    """An experiment in a folder of its own that sets `node` at `place`, and the arguments that choose it."""
    for key in reversed(place.split(".")):
        node = {key: node}
    (tmp_path / "theirs" / "experiment").mkdir(parents=True)
    text = "# @package _global_\n" + yaml.safe_dump(node)
    (tmp_path / "theirs" / "experiment" / "evil.yaml").write_text(text)
    return ["--config-dir", str(tmp_path / "theirs"), "experiment=evil"]


@pytest.mark.parametrize(
    "name", [name if name in LIKELIEST else pytest.param(name, marks=pytest.mark.slow) for name in HOSTILE]
)
def test_a_target_in_somebody_elses_experiment(name, hostile, command, tmp_path):
    ended = command("train", *in_a_file(tmp_path, "method", hostile(name)), *BRIEFLY)
    is_refused(ended, f"method._target_={name}")


@pytest.mark.parametrize(
    "place", [*NESTED, *(pytest.param(group, marks=pytest.mark.slow) for group in GROUPS)]
)
def test_a_target_in_any_place_of_somebody_elses_experiment(place, hostile, command, tmp_path):
    ended = command("train", *in_a_file(tmp_path, place, hostile("os.mkdir")), *BRIEFLY)
    is_refused(ended, place.split(".")[0])


@pytest.mark.parametrize("name", ["os.system", "vitkd.train.job.torch.load"])
def test_a_target_in_somebody_elses_group(name, hostile, command, tmp_path):
    (tmp_path / "theirs" / "loss").mkdir(parents=True)
    (tmp_path / "theirs" / "loss" / "evil.yaml").write_text(yaml.safe_dump(hostile(name)))
    ended = command("train", "--config-dir", str(tmp_path / "theirs"), "loss=evil", *BRIEFLY)
    is_refused(ended, f"loss._target_={name}")


@pytest.mark.parametrize("key", ["_args_", "_partial_", "_recursive_", "_convert_"])
def test_hydras_other_keys_are_settings_that_no_class_has(key, command):
    is_refused(command("train", *BRIEFLY, f"+loss.{key}=[1]"), f"loss.{key}: no such setting")


@pytest.mark.parametrize(
    "target",
    [
        *(
            "",
            ".",
            "vitkd",
            "vitkd.",
            "vitkd..data.Digits",
            ".vitkd.data.Digits",
            "vitkd.data",
            "vitkd.nowhere.X",
        ),
        *("vitkd.da\0ta.Digits", "vitkd.data.Nothing", "vitkd.data.__name__", "vitkd.data.Digits.__init__"),
        *("vitkd.data.spec.Path", "vitkd.data.module.L.LightningDataModule", "vitkd.data.ImageDataModule"),
        *("vitkd.data.Dataset", "vitkd.data.spec.Dataset", "vitkd.data.spec.ABC", "vitkd.data.split.Split"),
        *(
            "vitkd.config.schema.build",
            "vitkd.data.split.hold_out",
            "vitkd.models.ViTConfig",
            "vitkd_evil.data.Digits",
        ),
        *("os.system", "None", "['vitkd.data.Digits']", "vitkd.data.Digits; import os", "VITKD.data.Digits"),
    ],
)
def test_only_whole_datasets_of_vitkds_are_datasets(target):
    with pytest.raises(ConfigError, match="only vitkd's own Dataset classes") as error:
        allowed_class("dataset", target, Dataset)
    assert "\n" not in str(error.value)
    assert "entry points in the group vitkd.plugins" in str(error.value)


@pytest.mark.parametrize("base", [AttentionLoss, Dataset, Method])
def test_an_abstract_class_is_no_option(base):
    with pytest.raises(ConfigError, match="only vitkd's own"):
        allowed_class("group", f"{base.__module__}.{base.__name__}", base)


def test_a_class_that_was_merely_imported_is_not_vitkds(monkeypatch):
    class Theirs(Digits):
        pass

    monkeypatch.setattr(vitkd.data.spec, "Theirs", Theirs, raising=False)
    with pytest.raises(ConfigError, match="only vitkd's own"):
        allowed_class("dataset", "vitkd.data.spec.Theirs", Dataset)
    monkeypatch.setattr(vitkd.data.spec, "Ours", ImageFolder, raising=False)
    assert allowed_class("dataset", "vitkd.data.spec.Ours", Dataset) is ImageFolder


@pytest.mark.parametrize("target", [None, 5, ["vitkd.methods.maps.losses.KL"], {"_target_": "os.system"}])
def test_a_target_that_is_no_text(target):
    with pytest.raises(ConfigError, match="only vitkd's own"):
        build("loss", {"_target_": target}, AttentionLoss)


def test_what_is_allowed():
    assert allowed_class("loss", "vitkd.methods.maps.losses.KL", AttentionLoss) is KL
    assert allowed_class("student", "vitkd.models.ViTConfig", ViTConfig) is ViTConfig


def test_the_bomb_would_go_off(bomb, tmp_path):
    pickle.loads(pickle.dumps(bomb))
    (tmp_path / "went off").rmdir()


@pytest.mark.parametrize("name", ["x.ckpt", "x.pt", "x.safetensors", "x", "student.safetensors"])
@pytest.mark.parametrize("kind", ["pickle", "zip", "old zip"])
def test_a_pickle_is_no_model(name, kind, bomb, tmp_path):
    file = hidden(bomb, kind, tmp_path / name)
    with pytest.raises(ConfigError, match=str(file)) as error:
        load_any(tmp_path if name == "student.safetensors" else file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["x.ckpt", "x.safetensors"])
def test_a_pickle_is_no_teacher(name, bomb, command, tmp_path):
    file = hidden(bomb, "zip", tmp_path / name)
    is_refused(command("train", *BRIEFLY, f"teacher.checkpoint={file}"), str(file))


def hidden(bomb: Bomb, kind: str, file: Path) -> Path:
    """A file in which the bomb lies."""
    if kind == "pickle":
        file.write_bytes(pickle.dumps(bomb))
    else:
        content = {"model": bomb, "state_dict": {}, "epoch": 0}
        torch.save(content, file, _use_new_zipfile_serialization=kind == "zip")
    return file


def damaged(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "damaged"))


@pytest.mark.parametrize("kind", ["array of objects", "pickle"])
def test_predictions_are_numbers(kind, bomb, finished, command, tmp_path):
    run = damaged(finished, tmp_path)
    if kind == "pickle":
        (run / "test_predictions.npz").write_bytes(pickle.dumps(bomb))
    else:
        np.savez(run / "test_predictions.npz", teacher=np.array([bomb], dtype=object))
    is_refused(command("evaluate", f"run={run}"), "test_predictions.npz: cannot be read")


@pytest.mark.parametrize("file", ["student.safetensors", "checkpoints/last.ckpt"])
def test_a_finished_runs_models_are_weights(file, bomb, finished, command, tmp_path):
    run = damaged(finished, tmp_path)
    (run / file).write_bytes(pickle.dumps(bomb))
    is_refused(command("evaluate", f"run={run}"), file)


@pytest.mark.parametrize("group", ["dataset", "loss", "method", "weighting"])
def test_a_finished_runs_config_names_no_code(group, hostile, finished, command, tmp_path):
    run = damaged(finished, tmp_path)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config[group] = hostile("os.mkdir")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    is_refused(command("evaluate", f"run={run}"), f"{group}._target_=os.mkdir")


# Hydra's own node names code as well: what it instantiates, and what logging does.
HYDRA_NODES = {
    "callback": {"callbacks": {"mine": {"_target_": "pathlib.Path.touch", "self": "went_off"}}},
    "launcher": {"launcher": {"_target_": "os.mkdir"}},
    "sweeper": {"sweeper": {"_target_": "os.mkdir"}},
    "hidden callback": {"callbacks": {"mine": {"_target_": "${oc.env:HOSTILE,pathlib.Path.touch}"}}},
    "log handler": {"job_logging": {"handlers": {"x": {"()": "os.mkdir", "path": "went_off"}}}},
    "log handler's class": {"hydra_logging": {"handlers": {"x": {"class": "os.mkdir", "path": "went_off"}}}},
    "log stream": {"hydra_logging": {"handlers": {"console": {"stream": "ext://os.environ"}}}},
}


@pytest.mark.parametrize("multirun", [[], ["-m"]], ids=["one job", "multirun"])
@pytest.mark.parametrize("name", HYDRA_NODES)
def test_hydras_own_node_names_no_code(name, multirun, command, tmp_path):
    experiments = tmp_path / "conf" / "experiment"
    experiments.mkdir(parents=True)
    text = yaml.safe_dump({"hydra": HYDRA_NODES[name]})
    (experiments / "given.yaml").write_text(f"# @package _global_\n{text}")

    ended = command("train", "--config-dir", str(experiments.parent), *multirun, "experiment=given", *BRIEFLY)

    is_refused(ended, "hydra.", "allowed" if "stream" not in name else "choose")


@pytest.mark.parametrize("option", ["--experimental-rerun", "--exp"])
def test_a_pickle_is_no_job_to_run_again(option, bomb, command, tmp_path):
    """Hydra's own option, and short for it, unpickles a file."""
    (tmp_path / "job.pickle").write_bytes(pickle.dumps(bomb))

    for arguments in ([option, str(tmp_path / "job.pickle")], [f"{option}={tmp_path / 'job.pickle'}"]):
        is_refused(command("train", *arguments, *BRIEFLY), option, "no such option")


@pytest.mark.parametrize("multirun", [[], ["-m"]], ids=["one job", "multirun"])
def test_a_file_sets_no_environment_variables(multirun, command, tmp_path):
    """PYTHONPATH or LD_PRELOAD would run code in the next process that the job starts."""
    given = in_a_file(tmp_path, "hydra", {"job": {"env_set": {"PYTHONPATH": str(tmp_path)}}})

    is_refused(command("train", *given, *multirun, *BRIEFLY), "hydra.job.env_set.PYTHONPATH=", "shell")


def test_somebody_elses_yaml_makes_no_python_objects(command, tmp_path):
    experiments = tmp_path / "conf" / "experiment"
    experiments.mkdir(parents=True)
    text = "# @package _global_\nname: !!python/object/apply:os.mkdir [went_off]\n"
    (experiments / "given.yaml").write_text(text)

    is_refused(command("train", "--config-dir", str(experiments.parent), "experiment=given"), "given.yaml")
