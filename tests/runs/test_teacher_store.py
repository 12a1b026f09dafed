"""A teacher is found again if and only if everything that determines it is the same, and is trained once."""

import copy
import threading
import time
from pathlib import Path

import pytest

from vitkd.errors import ConfigError
from vitkd.models import save_model
from vitkd.runs.folder import RunFolder
from vitkd.runs.teacher_store import fingerprint, given_teacher, stored_teacher

SETTINGS = {
    "student": {"_target_": "vitkd.models.ViTConfig", "depth": 4, "dropout": 0.0},
    "dataset": {
        "name": "digits",
        "batch_size": 64,
        "val_fraction": 0.1,
        "split_seed": 0,
        "augment": {"flip": False},
        "eval_batch_size": 512,
        "resident_limit_gib": 8.0,
        "workers": 2,
        "download": True,
        "max_epochs": 20,
    },
    "optimizer": {"lr": 1e-3},
    "schedule": {"warmup": 0.1},
    "trainer": {
        "max_epochs": 20,
        "precision": "32-true",
        "limit_train_batches": None,
        "accelerator": "auto",
        "devices": 1,
        "num_nodes": 1,
        "strategy": "auto",
    },
    "seed": 0,
    "alpha": 0.5,
    "loss": {"temperature": 1.0},
    "paths": {"data": "data", "outputs": "outputs"},
    "name": None,
}


def changed(key: str, value: object) -> dict:
    """SETTINGS with a dotted key set to another value."""
    settings = copy.deepcopy(SETTINGS)
    *path, last = key.split(".")
    node = settings
    for part in path:
        node = node[part]
    node[last] = value
    return settings


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("student.depth", 5),
        ("student.dropout", 0.1),
        ("dataset.name", "mnist"),
        ("dataset.batch_size", 32),
        ("dataset.val_fraction", 0.2),
        ("dataset.split_seed", 1),
        ("dataset.augment.flip", True),
        ("optimizer.lr", 2e-3),
        ("schedule.warmup", 0.2),
        ("trainer.max_epochs", 21),
        ("trainer.precision", "16-mixed"),
        ("trainer.limit_train_batches", 3),
        ("seed", 1),
    ],
)
def test_what_determines_the_teacher_changes_its_name(key, value):
    assert fingerprint(changed(key, value)) != fingerprint(SETTINGS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alpha", 0.1),
        ("loss.temperature", 2.0),
        ("paths.data", "elsewhere"),
        ("paths.outputs", "elsewhere"),
        ("name", "mine"),
        ("trainer.accelerator", "gpu"),
        ("trainer.devices", 8),
        ("trainer.num_nodes", 2),
        ("trainer.strategy", "ddp"),
        ("dataset.eval_batch_size", 64),
        ("dataset.resident_limit_gib", 1.0),
        ("dataset.workers", 0),
        ("dataset.download", False),
        ("dataset.max_epochs", 3),
    ],
)
def test_what_does_not_determine_it_does_not(key, value):
    assert fingerprint(changed(key, value)) == fingerprint(SETTINGS)


def test_the_order_of_settings_is_no_matter():
    assert fingerprint(dict(reversed(SETTINGS.items()))) == fingerprint(SETTINGS)


@pytest.fixture
def train(tiny):
    """Puts a teacher into its folder, as a run would, and counts how often."""

    def train(folder: RunFolder) -> None:
        train.folders.append(folder.path)
        time.sleep(0.05)
        save_model(tiny(depth=2).build(), folder.student)

    train.folders = []
    return train


def test_a_teacher_is_trained_once(train, tmp_path):
    store = tmp_path / "teachers" / "digits" / "abc"

    first, second = stored_teacher(store, train), stored_teacher(store, train)

    assert len(train.folders) == 1
    assert first.config == second.config
    assert not first.training


def test_a_teacher_is_trained_once_by_many_at_once(train, tmp_path):
    store = tmp_path / "abc"
    threads = [threading.Thread(target=stored_teacher, args=(store, train)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(train.folders) == 1


def test_it_has_its_name_only_when_it_is_complete(train, tmp_path):
    store = tmp_path / "abc"

    stored_teacher(store, lambda folder: (train(folder), not store.exists() or pytest.fail("too early")))

    assert (store / "student.safetensors").is_file()
    assert train.folders[0] != store
    assert not train.folders[0].exists()


def test_an_interrupted_training_never_passes_for_a_teacher(train, tmp_path):
    def interrupted(folder: RunFolder) -> None:
        train(folder)
        raise KeyboardInterrupt

    store = tmp_path / "abc"
    with pytest.raises(KeyboardInterrupt):
        stored_teacher(store, interrupted)
    assert not store.exists()

    stored_teacher(store, train)
    assert len(train.folders) == 2


def test_a_damaged_teacher_is_one_clear_line(train, tmp_path):
    store = tmp_path / "abc"
    stored_teacher(store, train)
    (store / "student.safetensors").write_bytes(b"damaged")

    with pytest.raises(ConfigError, match="abc"):
        stored_teacher(store, train)


class Digits:
    """As much of a data set as a teacher has to fit."""

    name, num_classes, image_size, channels = "digits", 5, 8, 3


def test_no_checkpoint_is_no_teacher():
    assert given_teacher(None, Digits()) is None


def test_a_fitting_teacher_is_taken(tiny, tmp_path):
    save_model(tiny().build(), tmp_path / "student.safetensors")

    for path in (tmp_path, tmp_path / "student.safetensors"):
        assert given_teacher(str(path), Digits()).config == tiny()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_classes": 7}, "num_classes=7, digits has 5"),
        ({"image_size": 16}, "image_size=16, digits has 8"),
        ({"channels": 1}, "channels=1, digits has 3"),
    ],
)
def test_a_teacher_of_other_images_is_refused(change, says, tiny, tmp_path):
    file: Path = tmp_path / "teacher.safetensors"
    save_model(tiny(**change).build(), file)

    with pytest.raises(ConfigError, match=says):
        given_teacher(str(file), Digits())
