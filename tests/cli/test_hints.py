"""Typing what a hint says leads on, and a line names what was wrong in the words that were typed."""

from contextlib import closing
from pathlib import Path

import pytest
import yaml
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from tests.cli.test_bad_input import BRIEFLY, folder, is_one_line  # noqa: F401, a fixture
from tests.config.test_run import compose
from tests.photos import noise_photos
from vitkd.cli.messages import explain
from vitkd.config.run import parse
from vitkd.errors import ConfigError
from vitkd.train.plan import SET_BY_VITKD, check_settings
from vitkd.train.student import check_shares, load_data

GROUPS = ("teacher", "method", "dataset", "trainer", "optimizer@teacher.optimizer", "sweep")
NAMES = ("null", "''", "5", "nan", "[1]", "[[1,2]]", "${alpha}", "~/x")
CHOICES = [*(("weighting", name) for name in NAMES), *((group, "null") for group in GROUPS)]


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_a_group_takes_the_name_of_an_option(group, name, command, folder):  # noqa: F811
    is_one_line(command("train", *BRIEFLY, f"{group}={name}"), f"{group.partition('@')[0]}=", "choose one of")
    assert [*folder.iterdir()] == []


@pytest.mark.parametrize(
    ("line", "fragments"),
    [
        ("paths=[1]", ["paths", "write paths.KEY=VALUE"]),
        ("paths=word", ["paths=word", "write paths.KEY=VALUE"]),
        ("teacher.optimizer=null", ["teacher.optimizer", "missing"]),
        ("student.num_classes=3", ["student.num_classes=3", "digits has 10", "leave it out"]),
        ("teacher.channels=3", ["teacher.channels=3", "digits has 1"]),
        ("student.image_size=16", ["student.image_size=16", "digits has 8"]),
        ("method=logit student.num_classes=20", ["student.num_classes=20", "digits has 10"]),
        ("granularity.blocks=[[1,2]]", ["granularity.blocks=[[1, 2]]", "whole number"]),
        ("trainer.limit_train_batches=50%", ["trainer.limit_train_batches", "50%", "a number"]),
        ("trainer.limit_train_batches=0.01", ["20 batches; set trainer.limit_train_batches=1"]),
        ("teacher.trainer.limit_val_batches=0.5", ["teacher.trainer.limit_val_batches=0.5", "1 batches"]),
        ("dataset.mean=[[0.5],0.5,0.5]", ["dataset.mean", "a number"]),
        ("dataset.image_size=10000000001", ["dataset.image_size=10000000001", "at most 65,536"]),
        ("student.num_heads=99999999999999999999", ["student.num_heads=99999999999999999999", "at most"]),
        ("student.depth=10000 student.mlp_dim=1000000000", ["student=", "this machine has"]),
        (
            "student.attention=lsa dataset.patch_size=1 dataset.image_size=65536",
            ["student=", "this machine has"],
        ),
        ("trainer.devices=10000000001 trainer=cpu", ["trainer.devices=10000000001", "no machine"]),
        (f"seed={'9' * 5000}", ["seed=", "too many digits"]),
        (f"name={'x' * 300}", ["name=", "too long"]),
        ("paths.outputs=${paths.outputs}", ["paths.outputs"]),
        ("paths.data='a\0b'", ["paths.data", "control characters"]),
        ("name='a\udcffb'", ["name=", "UTF-8"]),
        ("alpha=[", ["alpha=[", "cannot be parsed; write KEY=VALUE"]),
        (f"-m {'x' * 300}=1,2", ["xxx…", "too long"]),
        ("trainer.limit_train_batches=1.5", ["trainer.limit_train_batches=1.5: must be", "share"]),
        ("+trainer.limit_val_batches=-0.5", ["trainer.limit_val_batches=-0.5: must be", "share"]),
    ],
    ids=lambda value: value[:60].encode("unicode_escape").decode() if isinstance(value, str) else "",
)
def test_train_refuses(line, fragments, command, folder):  # noqa: F811
    ended = command("train", *BRIEFLY, *line.split())

    is_one_line(ended, *fragments)
    assert "Exception" not in ended.err
    assert [*folder.iterdir()] == []


def test_the_swept_option_that_lacks_a_setting_is_named(command, folder):  # noqa: F811
    ended = command("train", *BRIEFLY, "-m", "loss=mse,kl", "loss.temperature=2")

    is_one_line(ended, "loss.temperature: is no setting of loss=mse; leave out one of the two")


def test_a_share_is_one_of_the_batches_of_each_process(tmp_path):
    composed = compose("trainer.limit_train_batches=0.06", f"paths.data={tmp_path}")
    del composed.__dict__["_content"]["hydra"]
    config = parse(composed)
    with closing(load_data(config)) as data:
        check_shares(config, data, processes=1)
        with pytest.raises(ConfigError, match=r"limit_train_batches=0\.06: is not one of 10 batches"):
            check_shares(config, data, processes=2)


@pytest.fixture
def launched(monkeypatch) -> list[list[str]]:
    """The jobs of a multirun, as they would be launched."""
    jobs: list[list[str]] = []

    class Launcher:
        def launch(self, overrides, initial_job_idx):
            jobs.extend(overrides)
            return []

    monkeypatch.setattr(Plugins, "instantiate_launcher", lambda self, **_: Launcher())
    return jobs


@pytest.mark.parametrize("value", ["2", "0.5", "3.5"])
def test_a_setting_of_swept_options_is_set_in_all_jobs(value, command, folder, launched):  # noqa: F811
    ended = command("train", "-m", "method=logit,token", f"method.temperature={value}", "seed=1")

    assert ended.code == 0, ended.err
    jobs = [{*job} for job in launched]
    assert jobs == [{f"method={m}", f"method.temperature={value}", "seed=1"} for m in ("logit", "token")]


def test_a_list_stays_one_value_beside_swept_options(command, folder, launched):  # noqa: F811
    ended = command("train", "-m", "granularity=block,head", "granularity.blocks=[0,1]")

    assert ended.code == 0, ended.err
    assert [job[1] for job in launched] == ["granularity.blocks=[0,1]"] * 2


@pytest.mark.parametrize("key", ["trainer", "teacher.trainer"])
@pytest.mark.parametrize("name", SET_BY_VITKD)
def test_what_vitkd_sets_has_a_setting_instead(name, key):
    """The settings that the line names are there."""
    with pytest.raises(ConfigError, match=f"{key}.{name}: is set by vitkd") as error:
        check_settings({name: 1}, key)

    for setting in str(error.value).partition("; set ")[2].partition(";")[0].split():
        assert OmegaConf.select(compose(), setting.partition("=")[0], default="absent") != "absent"


@pytest.mark.parametrize("key", ["trainer", "teacher.trainer"])
def test_what_to_set_instead_reaches_the_user(key, command, folder):  # noqa: F811
    ended = command("train", *BRIEFLY, f"+{key}.overfit_batches=1")

    is_one_line(ended, f"{key}.overfit_batches", "set debug=overfit")
    assert command("train", *BRIEFLY, "debug=overfit", "alpha=2").err.startswith("error: alpha=2")


@pytest.mark.parametrize("written", ["paths.outputs=~/x", 'paths.outputs="~/x"'])
def test_a_tilde_is_the_home_folder(written, command, folder, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    ended = command("train", *BRIEFLY, "method=none", "-m", "seed=1", written, "name=run")

    assert ended.code == 0, ended.err
    assert [*folder.iterdir()] == []
    assert {path.name for path in (tmp_path / "home" / "x").iterdir()} == {"digits", "sweeps"}
    run = "run=~/x/digits/run"
    assert command("evaluate", run).code == 0


def test_settings_are_recorded_with_their_types(command, folder):  # noqa: F811
    typed = ['seed="2"', 'alpha="0.5"', "label_smoothing=0", 'method.temperature="2"', "teacher.cache=off"]
    ended = command("train", *BRIEFLY, "method=logit", "teacher.trained=false", "name=run", *typed)

    assert ended.code == 0, ended.err
    written = yaml.safe_load((folder / "outputs/digits/run/config.yaml").read_text())
    recorded = [
        written["seed"],
        written["alpha"],
        written["label_smoothing"],
        written["method"]["temperature"],
    ]
    assert [(type(value), value) for value in recorded] == [(int, 2), (float, 0.5), (float, 0), (float, 2)]
    assert written["teacher"]["cache"] == "off"


def test_photos_that_have_moved_are_found_as_the_line_says(command, folder, tmp_path):  # noqa: F811
    (tmp_path / "photos").mkdir()
    photos = noise_photos(tmp_path / "photos", of_each_class=8, size=8)
    size = ["dataset.image_size=8", "dataset.patch_size=4", "student=small", "method=none"]
    ended = command("train", *BRIEFLY, "dataset=image_folder", f"dataset.root={photos}", *size, "name=run")
    assert ended.code == 0, ended.err
    run, moved = "run=outputs/image_folder/run", tmp_path / "moved"
    photos.rename(moved)

    refused = command("evaluate", run)

    is_one_line(refused, "set root to")
    assert "dataset.root" not in refused.err
    assert command("evaluate", run, f"root={moved}").code == 0
    is_one_line(command("evaluate", run, f"dataset.root={moved}"), "did you mean root?")


def test_explain_names_a_list_in_a_list(command, finished: Path, folder):  # noqa: F811
    is_one_line(command("explain", f"run={finished}", "methods=[[attention]]"), "methods=[['attention']]")


def test_a_path_that_holds_the_name_of_a_setting_is_printed_as_it_is():
    place = "run=outputs/image_folder/dataset.image_size-16_dataset.root-photos"
    line = explain(ConfigError(f"{place}: is not one; set dataset.root=DIR"), "evaluate", [])
    assert line == f"{place}: is not one; set root=DIR"
