"""What each setting separates: one table, known to the last entry, and read without PyTorch."""

import subprocess
import sys
from collections.abc import Iterator

import hydra
import pytest
from omegaconf import OmegaConf

from vitkd.config.roles import (
    ABSENT,
    ROLES,
    Separates,
    first_difference,
    flatten,
    names_folder,
    relevant,
    separates,
)
from vitkd.config.run import CONF_DIR

CONFIG = {"paths": {"data": "data", "outputs": "outputs"}, "name": None, "alpha": 0.5, "loss": {"t": 1.0}}


def settings_of(*overrides: str) -> set[str]:
    """Every setting of a composed configuration, and every group that holds some."""
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = OmegaConf.to_container(hydra.compose("train", [*overrides]))
    return {name for full, _ in flatten(config) for name in with_groups(full)}


def with_groups(setting: str) -> Iterator[str]:
    parts = setting.split(".")
    return (".".join(parts[:length]) for length in range(1, len(parts) + 1))


@pytest.fixture(scope="module")
def known() -> set[str]:
    others = settings_of("dataset=tf_flowers", "student=timm") | settings_of("student=merged", "method=none")
    return settings_of() | others | {"sweep", "version"}


def test_every_entry_is_a_setting_or_a_group(known):
    assert {*ROLES} <= known


# What is not separated, for each question; all other settings are.
SHARED = {
    Separates.RUNS: {
        *("checkpoint_minutes", "name", "paths.data", "paths.outputs", "pictures_every_n_epochs", "resume"),
        *("sweep.rerun", "sweep", "paths", "version"),
        *("logger", "logger.tensorboard", "logger.tensorboard._target_"),
    },
    Separates.TEACHERS: {
        *("alpha", "cuda_graph", "compile", "log_every_n_steps", "trainer.accelerator", "trainer.strategy"),
        *("dataset.eval_batch_size", "dataset.resident_limit_gib", "dataset.workers", "dataset.download"),
        *(
            "kernels",
            "dataset.max_epochs",
            "dataset.root",
            "student.weights",
            "student.init_from",
            "student.seed",
        ),
    },
    Separates.STACKS: {
        *("alpha", "label_smoothing", "seed", "optimizer.lr", "optimizer.weight_decay", "schedule"),
        *("granularity", "loss", "method", "weighting", "version", "student.seed"),
        *("checkpoint_minutes", "name", "pictures_every_n_epochs", "resume", "sweep", "sweep.rerun"),
    },
    Separates.EXPERIMENTS: {
        *("alpha", "granularity", "loss", "method", "teacher", "weighting", "seed", "student.seed"),
    },
    Separates.ARMS: {
        *("seed", "student.seed", "cuda_graph", "kernels", "compile", "log_every_n_steps"),
        *("teacher.cache", "teacher.cache_gib"),
        *("trainer.accelerator", "trainer.deterministic", "trainer.strategy", "dataset.max_epochs"),
        *("dataset.eval_batch_size", "dataset.resident_limit_gib", "dataset.workers", "dataset.download"),
    },
}
WITHIN = {
    Separates.TEACHERS: {"granularity", "loss", "method", "teacher", "weighting"},
    Separates.STACKS: {"granularity", "loss", "method", "schedule", "weighting"},
    Separates.EXPERIMENTS: {"granularity", "loss", "method", "teacher", "weighting"},
}
"""Groups of which nothing is separated."""


@pytest.mark.parametrize("what", SHARED, ids=lambda what: what.name)
def test_what_is_shared_is_just_what_is_on_record(what, known):
    nowhere = SHARED[Separates.RUNS] if what != Separates.STACKS else set()
    same = SHARED[Separates.ARMS] if what == Separates.EXPERIMENTS else set()
    expected = {
        name
        for name in known
        if name in SHARED[what] | nowhere | same or name.partition(".")[0] in WITHIN.get(what, set())
    }

    assert {name for name in known if not separates(name, what)} == expected


@pytest.mark.parametrize(
    ("override", "is_named"),
    [
        *[(name, True) for name in ("alpha", "seed", "loss", "teacher.cache", "dataset.workers", "student")],
        *[(name, True) for name in ("trainer.precision", "optimizer@teacher.optimizer", "compile")],
        *[(name, False) for name in ("trainer", "trainer.accelerator", "experiment", "log_every_n_steps")],
        *[
            (name, False)
            for name in (
                "logger",
                "logger.wandb.mode",
                "name",
                "resume",
                "sweep",
                "sweep.rerun",
                "paths.outputs",
            )
        ],
        *[(name, False) for name in ("checkpoint_minutes", "pictures_every_n_epochs")],
    ],
)
def test_what_a_folders_name_tells(override, is_named):
    assert names_folder(override) == is_named


def test_a_setting_has_its_nearest_groups_entry_or_separates_everything():
    assert not separates("paths.data.deeper", Separates.RUNS)
    assert separates("optimizer.eps", Separates.STACKS)
    assert not separates("optimizer.lr", Separates.STACKS)
    assert separates("unheard.of", Separates.ALL)


def test_what_a_configuration_of_before_lacks_is_at_its_default():
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        methods = [hydra.compose("train", [f"method={name}"]) for name in ("attention", "together")]
    composed = dict(item for each in methods for item in flatten(OmegaConf.to_container(each)))

    assert {name: composed[name] for name in ABSENT} == ABSENT


def test_a_setting_that_is_absent_is_as_it_was_before():
    before, now, other = (CONFIG | {"student": {"depth": 2, **own}} for own in ({}, *RATES))

    assert first_difference(before, now) is None
    assert relevant(before, Separates.ALL) == relevant(now, Separates.ALL)
    for one in (before, now):
        assert first_difference(one, other) == first_difference(other, one) == "student.drop_path_rate"
    assert relevant(other, Separates.ALL)["student.drop_path_rate"] == 0.1


def test_a_group_that_is_absent_is_as_its_settings_were():
    neutral = {"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "prob": 1.0, "switch_prob": 0.5}
    mixed = neutral | {"mixup_alpha": 0.8}
    before, now, other = ({"dataset": {"name": "a", **own}} for own in ({}, {"mix": neutral}, {"mix": mixed}))

    assert first_difference(before, now) is first_difference(now, before) is None
    assert relevant(before, Separates.ALL) == relevant(now, Separates.ALL)
    for one in (before, now):
        assert first_difference(one, other) == first_difference(other, one) == "dataset.mix.mixup_alpha"


RATES = ({"drop_path_rate": 0.0}, {"drop_path_rate": 0.1})


def test_relevant_settings_are_flat():
    config = CONFIG | {"optimizer": {"lr": 0.1, "eps": 1e-8}, "teacher": {}}

    assert relevant(config, Separates.STACKS) == {
        **{"paths.data": "data", "paths.outputs": "outputs"},
        **{"optimizer.eps": 1e-8, "teacher": {}},
    }


def test_what_leaves_every_result_as_it_is_is_no_difference():
    other = CONFIG | {key: {"else": 1} for key in SHARED[Separates.RUNS] if "." not in key}

    assert first_difference(CONFIG, other) is None
    assert first_difference(other, CONFIG) is None


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"alpha": 0.25}, "alpha"),
        ({"alpha": "0.5"}, "alpha"),
        ({"loss": {"t": 2.0}}, "loss.t"),
        ({"loss": {"t": 1.0, "name": "x"}}, "loss.name"),
        ({"loss": {}}, "loss.t"),
        ({"loss": None}, "loss"),
        ({"new": 1}, "new"),
        ({"new": {"paths": 1}}, "new"),
        ({"loss": {"t": 1.0, "seed": [1, 2]}}, "loss.seed"),
    ],
    ids=repr,
)
def test_what_may_change_a_result_is_named(change, name):
    assert first_difference(CONFIG, CONFIG | change) == name
    assert first_difference(CONFIG | change, CONFIG) == name


def test_null_is_as_good_as_not_there():
    assert first_difference(CONFIG, CONFIG | {"new": None}) is None


def test_a_setting_of_a_group_is_material_whatever_it_is_called():
    assert first_difference({"dataset": {"name": "a"}}, {"dataset": {"name": "b"}}) == "dataset.name"


def test_it_is_read_without_pytorch():
    check = "import sys, vitkd.config.roles; print({'torch', 'omegaconf', 'hydra'} & {*sys.modules})"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)

    assert found.stdout == "set()\n"
