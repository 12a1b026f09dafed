"""A teacher is found again if and only if everything that determines it is the same, and is trained once."""

import threading
import time
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

import vitkd
from vitkd.config.run import CONF_DIR, Config, parse, teacher_run
from vitkd.errors import ConfigError
from vitkd.models import ResNetConfig, save_model
from vitkd.runs.folder import RunFolder
from vitkd.runs.teacher_store import determining, fingerprint, given_teacher, stored_teacher, what_is_new


def mark(*settings: str, contents: str | None = None) -> str:
    """The fingerprint of the teacher that `python -m vitkd.train SETTINGS` would train."""
    return fingerprint(own_run(*settings), contents)


def own_run(*settings: str) -> Config:
    """The teacher's own run of `python -m vitkd.train SETTINGS`."""
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return teacher_run(parse(compose("train", [*settings])))


@pytest.mark.parametrize(
    "setting",
    [
        "teacher.depth=5",
        "teacher.dropout=0.1",
        "teacher.drop_path_rate=0.1",
        "teacher.patch_norm=true",
        "teacher.seed=1",
        "teacher.max_epochs=21",
        "teacher.train_fraction=0.5",
        "teacher.optimizer.lr=0.002",
        "teacher.schedule.warmup=0.2",
        "schedule@teacher.schedule=constant",
        "dataset.batch_size=32",
        "dataset.val_fraction=0.2",
        "dataset.split_seed=1",
        "dataset.augment.flip=true",
        "dataset.augment.then=[rand_augment]",
        "teacher.trainer.precision=bf16-mixed",
        "teacher.trainer.limit_train_batches=3",
        "teacher.trainer.gradient_clip_val=1",
        "+teacher.trainer.gradient_clip_algorithm=value",
        "trainer.devices=2",
        "trainer.deterministic=true",
        "matmul_precision=high",
    ],
)
def test_what_determines_the_teacher_changes_its_name(setting):
    assert mark(setting) != mark()


@pytest.mark.parametrize(
    "setting",
    [
        "alpha=0.1",
        "seed=3",
        "dataset.augment.then=[]",
        "dataset.augment.rand_augment.magnitude=5",
        "loss.temperature=2.0",
        "optimizer.lr=0.002",
        "student.depth=1",
        "granularity=encoder",
        "teacher.dropout=0",
        "paths.data=elsewhere",
        "paths.outputs=elsewhere",
        "name=mine",
        "trainer.accelerator=cpu",
        "trainer.max_epochs=3",
        "trainer.precision=bf16-mixed",
        "trainer.limit_train_batches=3",
        "trainer.gradient_clip_val=1",
        "trainer.accumulate_grad_batches=2",
        "label_smoothing=0.1",
        "ema_decay=0.9",
        "cuda_graph=off",
        "kernels=off",
        "log_every_n_steps=3",
        "dataset.eval_batch_size=64",
        "dataset.train_fraction=0.5",
        "teacher.cache=off",
        "teacher.cache_gib=0.5",
        "matmul_precision=auto",
        "compile=true",
    ],
)
def test_what_does_not_determine_it_does_not(setting):
    assert mark(setting) == mark()


@pytest.mark.parametrize(
    ("devices", "count"), [("[3]", 1), ("'3,'", 1), ("[0,2]", 2), ("'0, 2'", 2), ("2", 2)]
)
def test_the_number_of_devices_counts_and_not_which_they_are(devices, count):
    assert mark(f"trainer.devices={devices}") == mark(f"trainer.devices={count}")


def test_a_teacher_of_before_a_setting_is_that_of_its_default():
    run = own_run()
    now = dict(run.resolved, student=dict(run.resolved["student"]))
    before = dict(now, student={k: v for k, v in now["student"].items() if k != "drop_path_rate"})

    assert before["student"] != now["student"]
    assert determining(before) == determining(now)
    assert what_is_new(own_run("teacher.drop_path_rate=0.1").resolved, [before]) == (
        " with teacher.drop_path_rate=0.1 (the nearest stored one has 0)"
    )


def test_another_version_trains_another_teacher(monkeypatch):
    ours = mark()
    monkeypatch.setattr(vitkd, "__version__", "0.0.9")

    assert mark() != ours


def test_every_architecture_is_another_teacher():
    changes = ["tokenizer=spt", "attention=lsa", "distillation_token=true"]
    names = [mark(f"teacher.{change}") for change in changes]
    names += [mark("teacher=resnet", *more) for more in ([], ["teacher.stem=small"])]

    assert len({*names, mark()}) == 6


def test_the_students_architecture_and_what_it_learns_by_are_of_no_account():
    plain = ["teacher.tokenizer=patch", "teacher.attention=msa", "teacher.distillation_token=false"]

    assert mark(*plain, "student.tokenizer=spt", "student.attention=lsa", "method=token") == mark()


def test_other_images_under_the_same_name_make_another_teacher():
    assert mark(contents="a") != mark(contents="b")


STORED = [(), ("teacher.depth=2", "teacher.seed=1", "dataset.batch_size=32")]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["teacher.optimizer.lr=0.002"],
         " with teacher.optimizer.lr=0.002 (the nearest stored one has 0.001)"),
        (["teacher.train_fraction=0.5", "dataset.train_fraction=0.1"],
         " with teacher.train_fraction=0.5 (the nearest stored one has 1)"),
        (["teacher.max_epochs=3"], " with teacher.max_epochs=3 (the nearest stored one has 20)"),
        (["teacher.trainer.gradient_clip_val=1"],
         " with teacher.trainer.gradient_clip_val=1 (the nearest stored one has null)"),
        (["trainer.devices=2"], " with trainer.devices=2 (the nearest stored one has 1)"),
        (["trainer.devices=[0,1]"], " with trainer.devices=2 (the nearest stored one has 1)"),
        (["matmul_precision=high"], " with matmul_precision=high (the nearest stored one has auto)"),
        (["schedule@teacher.schedule=constant", "teacher.patch_norm=true"],
         " with teacher.patch_norm=true, teacher.schedule=Constant"
         " (the nearest stored one has false, WarmupCosine)"),
        ([*(f"teacher.{name}=3" for name in ("depth", "num_heads", "head_dim", "mlp_dim"))],
         " with teacher.depth=3, teacher.num_heads=3, teacher.head_dim=3 and 1 more"
         " (the nearest stored one has 4, 4, 16)"),
        (["teacher.depth=2", "teacher.seed=2", "dataset.batch_size=32"],
         " with teacher.seed=2 (the nearest stored one has 1)"),
        (["seed=3", "trainer.precision=bf16-mixed"], " for these images"),
    ],
    ids=str,
)  # fmt: skip
def test_the_settings_that_make_a_teacher_new_are_named(settings, says):
    stored = [own_run(*others).resolved for others in STORED]

    assert what_is_new(own_run(*settings).resolved, stored) == says


def test_the_first_teacher_is_new_in_everything():
    assert what_is_new(own_run().resolved, []) == ""


def test_a_teacher_of_another_version_is_said_to_be_the_reason(train, tmp_path, monkeypatch, caplog):
    def stored_by(version: str) -> str:
        monkeypatch.setattr(vitkd, "__version__", version)
        caplog.clear()

        def train_recorded(folder: RunFolder) -> None:
            with folder.running(run.resolved):
                train(folder)

        stored_teacher(tmp_path / fingerprint(run, None), run.resolved, train_recorded)
        return caplog.text

    run = own_run()
    caplog.set_level("INFO", "vitkd")

    assert "no teacher yet: training it first" in stored_by("7.0")
    assert "reusing" in stored_by("7.0")
    assert "no teacher yet of vitkd 7.1: training it first" in stored_by("7.1")


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

    first, second = stored_teacher(store, {}, train), stored_teacher(store, {}, train)

    assert len(train.folders) == 1
    assert first.config == second.config
    assert not first.training


def test_a_teacher_is_trained_once_by_many_at_once(train, tmp_path):
    store = tmp_path / "abc"
    threads = [threading.Thread(target=stored_teacher, args=(store, {}, train)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(train.folders) == 1


def test_it_has_its_name_only_when_it_is_complete(train, tmp_path):
    store = tmp_path / "abc"

    stored_teacher(store, {}, lambda folder: (train(folder), not store.exists() or pytest.fail("too early")))

    assert (store / "student.safetensors").is_file()
    assert train.folders[0] != store
    assert not train.folders[0].exists()


def test_an_interrupted_training_never_passes_for_a_teacher(train, tmp_path):
    def interrupted(folder: RunFolder) -> None:
        train(folder)
        raise KeyboardInterrupt

    store = tmp_path / "abc"
    with pytest.raises(KeyboardInterrupt):
        stored_teacher(store, {}, interrupted)
    assert not store.exists()

    stored_teacher(store, {}, train)
    assert len(train.folders) == 2


def test_a_run_of_another_student_resumes_an_interrupted_training(train, tmp_path):
    def interrupted(folder: RunFolder) -> None:
        with folder.running(first.resolved):
            (folder.path / "checkpoint").touch()
            raise KeyboardInterrupt

    first, other = own_run("loss=kl"), own_run("loss=mse", "granularity=head", "alpha=0.1", "compile=true")
    store = tmp_path / fingerprint(first, None)
    assert fingerprint(other, None) == store.name
    with pytest.raises(KeyboardInterrupt):
        stored_teacher(store, first.resolved, interrupted)

    stored_teacher(store, other.resolved, train)

    assert (store / "checkpoint").exists()
    assert len([*tmp_path.glob(f"{store.name}*/")]) == 1


def test_a_damaged_teacher_is_one_clear_line(train, tmp_path):
    store = tmp_path / "abc"
    stored_teacher(store, {}, train)
    (store / "student.safetensors").write_bytes(b"damaged")

    with pytest.raises(ConfigError, match="abc"):
        stored_teacher(store, {}, train)


class Digits:
    """As much of a data set as a teacher has to fit."""

    name, num_classes, image_size, channels = "digits", 5, 8, 3


def test_no_checkpoint_is_no_teacher():
    assert given_teacher(None, Digits()) is None


def test_a_fitting_teacher_is_taken(tiny, tmp_path):
    save_model(tiny().build(), tmp_path / "student.safetensors")

    for path in (tmp_path, tmp_path / "student.safetensors"):
        assert given_teacher(str(path), Digits()).config == tiny()


def test_a_convolutional_teacher_is_stored_and_taken_whole(tmp_path):
    """Its running statistics are part of what it says."""
    made = ResNetConfig(8, 3, 5).build()
    for _ in range(3):
        made(torch.randn(4, 3, 8, 8))

    loaded = stored_teacher(tmp_path / "abc", {}, lambda folder: save_model(made, folder.student))
    given = given_teacher(str(tmp_path / "abc"), Digits())

    images = torch.randn(6, 3, 8, 8)
    for found in (loaded, given):
        assert torch.equal(found(images).logits, made.eval()(images).logits)


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
