"""What a run is made of is part of what it is: other images or another teacher make another run."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hydra import compose, initialize_config_dir

from tests.photos import noise_photos
from vitkd.config.run import CONF_DIR, Config, parse
from vitkd.data import ImageDataModule
from vitkd.errors import ConfigError
from vitkd.models import digest, load_model, read_header, save_model
from vitkd.runs.files import write_atomically
from vitkd.runs.folder import RunFolder
from vitkd.runs.inputs import HASHES, check_images, contents_of
from vitkd.runs.load import load_run

SIZES = ["dataset.image_size=8", "dataset.patch_size=4", "dataset.batch_size=8"]
TINY = [
    *("trainer.max_epochs=1", "trainer.limit_train_batches=1", "pictures_every_n_epochs=0"),
    *("teacher.max_epochs=1", "teacher.trainer.limit_train_batches=1", "teacher=small", "student=small"),
]


class Trained(NamedTuple):
    """A run on photos, and the command that made it."""

    photos: Path
    outputs: Path
    command: Callable[..., Any]

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.outputs / "image_folder" / "run")

    @property
    def settings(self) -> list[str]:
        place = [f"dataset.root={self.photos}", f"paths.outputs={self.outputs}"]
        return ["dataset=image_folder", *place, *SIZES, *TINY, "name=run"]

    def train(self, *more: str) -> Any:
        return self.command("train", *self.settings, *more)

    def config(self) -> Config:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            return parse(compose("train", self.settings))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, command) -> Trained:
    place = tmp_path_factory.mktemp("inputs")
    (place / "photos").mkdir()
    photos = noise_photos(place / "photos", of_each_class=12, size=8)
    for file in photos.rglob("*.png"):
        file.rename(file.with_suffix(".bmp"))
    trained = Trained(photos, place / "outputs", command)
    ended = trained.train()
    assert ended.code == 0, ended.err
    return trained


@pytest.fixture
def trained(whole, tmp_path) -> Iterator[Trained]:
    """As `whole`, for changes, which are undone at the end: a run's images have their place."""
    for name in ("photos", "outputs"):
        shutil.copytree(whole.photos.with_name(name), tmp_path / name)
    yield whole
    for name in ("photos", "outputs"):
        shutil.rmtree(whole.photos.with_name(name))
        shutil.copytree(tmp_path / name, whole.photos.with_name(name))


@pytest.fixture
def planned(trained, monkeypatch) -> Callable[..., str]:
    """planned("resume=auto") is what the command says until it would train; nothing is trained."""

    def stop(config: Config) -> None:
        raise ConfigError("it would train now")

    def run(*more: str) -> str:
        with monkeypatch.context() as patch:
            patch.setattr("vitkd.train.job.load_data", stop)
            return str(trained.train(*more).out)

    return run


def change_a_pixel(photos: Path) -> None:
    """Of one photo; neither its name nor its size nor its time of modification changes."""
    file = min(photos.rglob("*.bmp"))
    content, before = file.read_bytes(), file.stat()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 255]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def add_a_photo(photos: Path) -> None:
    file = min(photos.rglob("*.bmp"))
    shutil.copy(file, file.with_name("one_more.bmp"))


def rename_a_class(photos: Path) -> None:
    (photos / "cat").rename(photos / "zebra")


def replace_the_teacher(outputs: Path) -> None:
    """By one of other weights, under the same name."""
    (file,) = (outputs / "teachers" / "image_folder").glob("*/student.safetensors")
    model = load_model(file)
    with torch.no_grad():
        model.head.bias += 1
    save_model(model, file)


def test_a_run_says_what_it_was_made_of(whole):
    (teacher,) = (path for path in (whole.outputs / "teachers" / "image_folder").iterdir() if path.is_dir())
    recorded = json.loads((whole.run.path / "inputs.json").read_text())

    assert recorded == {
        "contents": contents_of(whole.config()),
        **{"images/train": 20, "images/val": 2, "images/test": 2},
        "class_names": ["cat", "dog"],
        "teacher/weights": digest(load_model(teacher)),
        "teacher/fingerprint": teacher.name,
    }
    of_teacher = RunFolder(teacher).read_inputs()
    assert of_teacher == recorded | {"teacher/weights": None, "teacher/fingerprint": None}


def test_a_model_says_which_classes_and_images_it_was_trained_on(whole):
    header = read_header(whole.run.student)

    assert header["class_names"] == ["cat", "dog"]
    assert header["contents"] == whole.run.read_inputs()["contents"]


def test_it_is_known_as_soon_as_there_is_something_to_resume(tmp_path, monkeypatch):
    """A folder without config.yaml is no run, and nothing is trained before there is one."""
    folder, seen = RunFolder(tmp_path), []
    write = write_atomically

    def note(path: Path, content: str) -> None:
        seen.append(path.name)
        write(path, content)

    monkeypatch.setattr("vitkd.runs.folder.write_atomically", note)

    with folder.running({}, {"contents": "a"}):
        assert folder.read_inputs() == {"contents": "a"}
    assert seen[:2] == ["inputs.json", "config.yaml"]


@pytest.mark.parametrize(
    ("state", "change"),
    [
        *(("done", change) for change in (change_a_pixel, add_a_photo, rename_a_class)),
        ("stopped", add_a_photo),
    ],
    ids=lambda each: getattr(each, "__name__", each),
)
def test_a_run_on_other_images_is_neither_resumed_nor_done_before(change, state, trained, planned):
    trained.run.status.write_text(json.dumps({"state": state}))
    change(trained.photos)

    said = planned("resume=auto")

    assert f"{trained.run.path} was made from other images: starting a new run in a folder beside it" in said
    assert "already done" not in said


@pytest.mark.parametrize("state", ["done", "stopped"])
def test_nor_is_one_that_learned_from_other_weights(state, trained, planned):
    trained.run.status.write_text(json.dumps({"state": state}))
    replace_the_teacher(trained.outputs)

    difference = f"{trained.run.path} learned from a teacher of other weights"
    assert f"{difference}: starting a new run in a folder beside it" in planned("resume=auto")


def test_nor_one_whose_given_teacher_was_replaced(trained, planned):
    given = trained.outputs / "given.safetensors"
    shutil.copy(trained.run.student, given)
    settings = ["resume=auto", f"teacher.checkpoint={given}", "name=given"]
    assert trained.train(*settings).code == 0
    assert "already done" in planned(*settings)

    model = load_model(given)
    with torch.no_grad():
        model.head.bias += 1
    save_model(model, given)

    assert "learned from a teacher of other weights: starting a new run" in planned(*settings)


def test_a_sweep_does_not_take_it_for_done_either(trained, planned):
    assert "already done" in planned("-m", "seed=0")

    add_a_photo(trained.photos)

    said = planned("-m", "seed=0")
    assert "was made from other images: starting a new run in a folder beside it" in said
    assert "already done" not in said
    stacked = planned("-m", "seed=0", "hydra/launcher=stacked")
    assert "was made from other images: starting a new run in a folder beside it" in stacked


def test_a_run_whose_teacher_is_gone_is_done_all_the_same(trained, planned):
    shutil.rmtree(trained.outputs / "teachers")

    assert "already done" in planned("resume=auto")


def test_a_teacher_that_is_trained_again_to_other_weights_is_seen_before_the_run_resumes(
    trained, monkeypatch
):
    trained.run.status.write_text(json.dumps({"state": "stopped"}))
    model = load_model(trained.run.student)
    seen: list[Path] = []

    def train(config: Config, teacher: Any, data: Any, device: Any, folder: RunFolder, inputs: Any) -> None:
        seen.append(folder.path)
        raise ConfigError("that is enough")

    monkeypatch.setattr("vitkd.train.job.obtain_teacher", lambda *_: model)
    monkeypatch.setattr("vitkd.train.job.train_student", train)
    shutil.rmtree(trained.outputs / "teachers")

    said = trained.train("resume=auto").out

    assert [path.name for path in seen] == ["run-2"]
    assert "learned from a teacher of other weights" in said


@pytest.mark.parametrize("text", ["", "{", "[3]", '{"class_names": [1], "teacher/fingerprint": "../../x"}'])
def test_a_record_that_cannot_be_read_keeps_nobody_from_anything(text, trained):
    inputs = trained.run.read_inputs()
    trained.run.inputs.write_text(text)

    assert trained.run.difference(trained.run.read_config(), inputs) is None
    found = load_run(trained.run.path, "best")
    assert digest(found.teacher) == inputs["teacher/weights"]
    with closing(ImageDataModule(found.config.dataset, trained.photos, seed=0)) as data:
        assert check_images(trained.run, found.config, data)


class TestHashes:
    def test_are_kept_and_only_what_changed_is_read_again(self, trained, monkeypatch):
        config, read = trained.config(), []
        before = contents_of(config)
        monkeypatch.setattr("vitkd.data.contents.hashlib.file_digest", lambda file, _: read.append(file.name))
        assert contents_of(config) == before
        assert read == []
        monkeypatch.undo()

        change_a_pixel(trained.photos)

        assert contents_of(config) != before

    @pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "a folder"])
    def test_that_are_damaged_are_computed_again(self, damage, trained):
        config = trained.config()
        before, place = contents_of(config), trained.outputs / HASHES
        whole = place.read_bytes()
        if damage == "a folder":
            place.unlink()
            place.mkdir()
        # The last digit of some file's hash.
        at = whole.rindex(b'"]') - 1
        flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
        written = {"cut": whole[:-20], "emptied": b"", "flipped": flipped}
        if damage in written:
            place.write_bytes(written[damage])

        assert contents_of(config) == before
        assert place.is_dir() or place.read_bytes() == whole

    def test_that_cannot_be_written_are_no_error(self, trained, monkeypatch):
        def full(place: Path, content: str) -> None:
            raise OSError(28, "no space left")

        (trained.outputs / HASHES).unlink(missing_ok=True)
        monkeypatch.setattr("vitkd.runs.inputs.write_atomically", full)

        assert len(contents_of(trained.config())) == 12
        assert not (trained.outputs / HASHES).exists()

    def test_make_no_folder_of_outputs(self, trained):
        config = trained.config()
        config.paths.outputs = str(trained.outputs / "not_yet")

        assert contents_of(config) == trained.run.read_inputs()["contents"]
        assert not (trained.outputs / "not_yet").exists()


class TestLoadedAgain:
    LIGHT = ("images=1", "faithfulness_images=0", "methods=[attention]")

    def evaluate(self, trained: Trained) -> Any:
        return trained.command("evaluate", f"run={trained.run.path}")

    def explain(self, trained: Trained, *more: str) -> Any:
        return trained.command("explain", f"run={trained.run.path}", *self.LIGHT, *more)

    def test_on_the_same_images_nothing_is_said(self, trained):
        for ended in (self.evaluate(trained), self.explain(trained)):
            assert (ended.code, ended.err) == (0, "")
            assert "warning" not in ended.out

    def test_on_other_images_one_line_says_so_and_the_teacher_is_found(self, trained):
        add_a_photo(trained.photos)

        for ended in (self.evaluate(trained), self.explain(trained)):
            lines = [line for line in ended.out.splitlines() if "warning" in line]
            assert lines == [
                f"warning: {trained.run.path} was made from other images: 20 train, 2 val, 2 test then,"
                f" 21 train, 2 val, 2 test in {trained.photos}"
            ]
            assert ended.err == ""

    def test_on_classes_of_other_names_its_labels_are_not_taken_for_theirs(self, trained):
        rename_a_class(trained.photos)

        for ended in (self.evaluate(trained), self.explain(trained)):
            (line,) = ended.err.splitlines()
            assert ended.code == 2
            assert f"in {trained.photos} class 0 is 'dog' and not 'cat'; name the images" in line

    def test_of_a_picture_the_classes_are_called_as_the_model_was_taught(self, trained, tmp_path):
        rename_a_class(trained.photos)
        picture = min((trained.photos / "zebra").glob("*.bmp"))

        by_run = self.explain(trained, f"image={picture}", f"out={tmp_path / 'run'}")
        model = f"model={trained.run.student}"
        by_model = trained.command(
            "explain", model, *self.LIGHT, f"image={picture}", f"out={tmp_path / 'file'}"
        )

        for ended, folder in ((by_run, "run"), (by_model, "file")):
            assert ended.code == 0, ended.err
            page = (tmp_path / folder / "index.html").read_text()
            assert "cat" in page
            assert "zebra" not in page
            assert "class 0" not in page

    def test_a_teacher_of_other_classes_is_told(self, trained, monkeypatch):
        rename_a_class(trained.photos)
        monkeypatch.setattr("vitkd.train.job.obtain_teacher", pytest.fail)

        ended = trained.train("name=other", f"teacher.checkpoint={trained.run.path}")

        given = f"teacher.checkpoint={trained.run.path}"
        assert f"warning: {given}: in image_folder class 0 is 'dog' and not 'cat'" in ended.out
