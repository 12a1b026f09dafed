"""`python -m vitkd.explain`: what it leaves for runs and for pictures, and one line for each mistake."""

import json
import os
import shutil
import sys
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from PIL import Image

from vitkd.config.run import CONF_DIR, parse
from vitkd.data import ImageDataModule
from vitkd.explain.gallery.cells import BOTH_RIGHT, CELLS, STUDENT_WRONG
from vitkd.explain.job import in_random_order
from vitkd.explain.maps.methods import METHODS
from vitkd.explain.maps.recording import own_layout
from vitkd.explain.sources import how_compared
from vitkd.models import Taps, ViTConfig, load_model, save_model
from vitkd.report.runs import read_run
from vitkd.runs.folder import RunFolder

BRIEFLY = [
    "teacher.max_epochs=1",
    "trainer.limit_train_batches=1",
    "teacher.trainer.limit_train_batches=1",
    "pictures_every_n_epochs=0",
]
LIGHT = ["images=3", "faithfulness_images=4", "methods=[attention,relevance]"]
ALWAYS = {"metrics.json", "index.html", "maps.npz"}
OF_TEACHER = {"figure_1.png", "fidelity.json", "gallery.png"}


@pytest.fixture(scope="module")
def explain(command):
    """The command, and what it has to say."""
    return lambda *arguments: command("explain", *arguments)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, command) -> Path:
    """A distilled student, and one that learned alone."""
    path = tmp_path_factory.mktemp("explained") / "outputs"
    of_runs = {
        "first": ["trainer.max_epochs=1", "granularity=block", "loss=kl", "alpha=0.5"],
        "alone": ["trainer.max_epochs=1", "method=none"],
    }
    for name, arguments in of_runs.items():
        ended = command("train", *BRIEFLY, f"paths.outputs={path}", f"name={name}", *arguments)
        assert ended.code == 0, ended.err
    return path


@pytest.fixture(scope="module")
def run(outputs) -> Path:
    return outputs / "digits" / "first"


@pytest.fixture(scope="module")
def explained(explain, run) -> Path:
    """The folder of the first run's explanation."""
    ended = explain(f"run={run}", *LIGHT)
    assert (ended.code, ended.err) == (0, "")
    assert str(run / "explain" / "index.html") in ended.out
    return run / "explain"


@pytest.fixture
def photo(tmp_path) -> Path:
    return a_photo(tmp_path / "photo.png")


def a_photo(path: Path) -> Path:
    """In colour, not square."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves out the drawing, which takes longer than all else; test_explanation has it."""
    monkeypatch.setattr("vitkd.explain.gallery.files.figure_rows", lambda *_, **__: Figure())


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def strict_json(path: Path):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def arrays_of(folder: Path):
    with np.load(folder / "maps.npz", allow_pickle=False) as found:
        return dict(found)


def everything_below(*folders: Path) -> dict[Path, bytes]:
    """What a command that fails must leave as it is."""
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files if path.suffix != ".lock"}


class TestOneRun:
    def test_leaves_every_file(self, explained):
        assert names_in(explained) >= ALWAYS | OF_TEACHER
        cells = {*arrays_of(explained)["cells"]}
        assert ("figure_2.png" in names_in(explained)) == (STUDENT_WRONG in cells)
        assert ("figure_3.png" in names_in(explained)) == bool(cells - {BOTH_RIGHT, STUDENT_WRONG})
        assert not [name for name in names_in(explained) if name.endswith(".tmp")]

    def test_counts_agree_with_what_the_run_measured(self, explained, run):
        metrics = json.loads((run / "metrics.json").read_text())
        cells = strict_json(explained / "metrics.json")["cells"]

        total = sum(cells.values())
        assert [*cells] == [*CELLS]
        assert (cells["both right"] + cells["teacher wrong"]) / total == metrics["test/acc_best"]
        assert (cells["both right"] + cells["student wrong"]) / total == metrics["teacher/test_acc"]

    def test_images_lie_in_the_cells_that_their_answers_say(self, explained):
        found = arrays_of(explained)

        right = {name: found[f"{name}/predicted"] == found["labels"] for name in ("teacher", "student")}
        answers = zip(right["teacher"], right["student"], strict=True)
        names = {(1, 1): CELLS[0], (1, 0): CELLS[1], (0, 1): CELLS[2], (0, 0): CELLS[3]}
        assert [names[each] for each in answers] == found["cells"].tolist()
        assert max(found["cells"].tolist().count(cell) for cell in CELLS) == 3

    def test_maps_are_those_of_the_images_at_their_positions(self, explained, run):
        config = parse(OmegaConf.create(RunFolder(run).read_config()))
        data = ImageDataModule(config.dataset, config.paths.data, 0)
        data.setup()
        (batch,) = data.loader("test", torch.device("cpu"), rank=0, world_size=1)
        found = arrays_of(explained)
        positions = torch.from_numpy(found["numbers"])
        place = {int(index): i for i, index in enumerate(batch.index)}
        images = batch.image[[place[int(each)] for each in positions]]

        with torch.no_grad():
            scores = load_model(run / "student.safetensors")(images, Taps(scores=(1,))).scores[1]
        rows = scores.softmax(-1)[:, :, 0, 1:].unflatten(-1, found["student/attention"].shape[-2:])
        np.testing.assert_allclose(found["student/attention"][:, 1], rows, rtol=1e-4)

    def test_every_method_is_held_against_random_order(self, explained):
        found = strict_json(explained / "metrics.json")["faithfulness"]

        assert found.keys() == {"teacher", "student"}
        for methods in found.values():
            assert methods.keys() == {"attention", "relevance", "random"}
            assert methods["random"]["positive"]["predicted"]["gap"] == 0

    def test_distilled_maps_are_reported(self, explained, run):
        rows = strict_json(explained / "fidelity.json")["rows"]
        (pair,) = json.loads((run / "pairs.json").read_text())

        distilled = [(row["student_block"], row["teacher_block"]) for row in rows if row["distilled"]]
        assert distilled == [(pair["student_block"], pair["teacher_block"])] * 4
        assert {row["student_block"] for row in rows if not row["distilled"]} == {0}

    def test_the_report_takes_up_the_fidelity(self, explained, run):
        summary = strict_json(explained / "fidelity.json")["summary"]

        assert read_run(run).fidelity == (summary["js_distilled"], "best")

    @pytest.mark.slow
    def test_the_same_command_gives_the_same_bytes(self, explained, explain, run, tmp_path):
        ended = explain(f"run={run}", *LIGHT, f"out={tmp_path / 'again'}")

        assert ended.code == 0, ended.err
        assert names_in(tmp_path / "again") == names_in(explained)
        for name in ("index.html", "metrics.json", "fidelity.json"):
            assert (tmp_path / "again" / name).read_bytes() == (explained / name).read_bytes()
        first, second = arrays_of(explained), arrays_of(tmp_path / "again")
        assert first.keys() == second.keys()
        assert all(first[name].tobytes() == second[name].tobytes() for name in first)

    @pytest.mark.slow
    def test_of_one_class_and_the_last_epoch(self, explained, explain, run, tmp_path):
        settings = ["of_class=3", "epoch=last", "faithfulness_images=0", *LIGHT[::2]]
        ended = explain(f"run={run}", *settings, f"out={tmp_path}")

        assert ended.code == 0, ended.err
        assert {*arrays_of(tmp_path)["labels"]} == {3}
        assert strict_json(tmp_path / "metrics.json")["faithfulness"] == {}
        assert "last epoch" in strict_json(tmp_path / "metrics.json")["source"]


class TestOtherRuns:
    def test_two_runs_beside_their_teacher(self, explain, run, outputs, tmp_path, undrawn):
        ended = explain(f"run=[{run},{outputs / 'digits' / 'alone'}]", *LIGHT, f"out={tmp_path}")

        assert (ended.code, ended.err) == (0, "")
        found = arrays_of(tmp_path)
        assert {name.partition("/")[0] for name in found if "/" in name} == {
            *("teacher", "student A", "student B")
        }
        # The second learned without the teacher, so it is the first's baseline.
        fidelity = strict_json(tmp_path / "fidelity.json")
        assert all(row["alone"] for row in fidelity["rows"])
        assert "js_distilled_alone" in fidelity["summary"]
        assert strict_json(tmp_path / "metrics.json")["correctness"].keys() == {"student A", "student B"}

    def test_two_runs_leave_what_the_first_run_alone_left(self, explained, explain, run, outputs, undrawn):
        before = everything_below(explained)

        ended = explain(f"run=[{run},{outputs / 'digits' / 'alone'}]", *LIGHT)

        assert ended.code == 0, ended.err
        assert everything_below(explained) == before
        assert {*ALWAYS} <= names_in(run / "explain_with_alone")
        shutil.rmtree(run / "explain_with_alone")

    def test_a_student_alone(self, explain, outputs, tmp_path, undrawn):
        ended = explain(f"run={outputs / 'digits' / 'alone'}", *LIGHT, f"out={tmp_path}")

        assert (ended.code, ended.err) == (0, "")
        assert names_in(tmp_path) == ALWAYS
        assert {*arrays_of(tmp_path)["cells"]} == {""}
        assert len(arrays_of(tmp_path)["labels"]) == 3

    def test_a_student_alone_beside_a_teacher_that_is_named(self, explain, outputs, run, tmp_path, undrawn):
        alone = outputs / "digits" / "alone"
        ended = explain(f"run={alone}", f"teacher.checkpoint={run}", *LIGHT, f"out={tmp_path}")

        assert ended.code == 0, ended.err
        assert names_in(tmp_path) >= OF_TEACHER
        assert "js_distilled" not in strict_json(tmp_path / "fidelity.json")["summary"]

    @pytest.mark.slow
    def test_a_teacher_of_other_patches(self, explain, command, tmp_path):
        settings = ["teacher.patch_size=4", "method.resize=bilinear", f"paths.outputs={tmp_path}", "name=r"]
        assert command("train", *BRIEFLY, "trainer.max_epochs=1", *settings).code == 0

        ended = explain(f"run={tmp_path / 'digits' / 'r'}", *LIGHT)

        assert ended.code == 0, ended.err
        folder = tmp_path / "digits" / "r" / "explain"
        assert "figure_1.png" in names_in(folder)
        assert strict_json(folder / "fidelity.json")["summary"].keys() >= {"js_all", "js_distilled"}
        said = "student has 4×4 patches and the teacher 2×2: the teacher's maps are resized to be compared."
        assert said in unescape((folder / "index.html").read_text())


@pytest.fixture(scope="module")
def convolutional(tmp_path_factory, command) -> Path:
    """A student with all switches on, whose distillation token learned from a residual network."""
    outputs = tmp_path_factory.mktemp("convolutional")
    teacher = ["method=token", "teacher=resnet", "teacher.stem=small"]
    student = ["student.attention=lsa", "student.tokenizer=spt"]
    settings = [*BRIEFLY, "trainer.max_epochs=1", f"paths.outputs={outputs}", "name=token"]
    assert command("train", *settings, *teacher, *student).code == 0
    return outputs / "digits" / "token"


class TestTeachersWithoutMaps:
    SAYS = "The teacher (resnet18, stem for small images) has no attention maps"

    def test_its_answers_make_the_cells_and_the_student_is_shown_alone(
        self, explain, convolutional, tmp_path, undrawn
    ):
        ended = explain(f"run={convolutional}", *LIGHT, f"out={tmp_path}")

        assert (ended.code, ended.err) == (0, "")
        assert self.SAYS in ended.out
        assert self.SAYS in (tmp_path / "index.html").read_text()
        assert names_in(tmp_path) >= ALWAYS | {"gallery.png"}
        assert not names_in(tmp_path) & {"figure_1.png", "fidelity.json"}
        metrics = json.loads((convolutional / "metrics.json").read_text())
        cells = strict_json(tmp_path / "metrics.json")["cells"]
        right = (cells["both right"] + cells["student wrong"]) / sum(cells.values())
        assert right == pytest.approx(metrics["teacher/test_acc"])
        found = arrays_of(tmp_path)
        assert {name for name in found if name.startswith("teacher/")} == {
            *("teacher/predicted", "teacher/confidence")
        }
        assert found["student/attention"].shape[1:] == (2, 4, 4, 4)

    @pytest.mark.slow
    def test_of_a_picture_too(self, explain, convolutional, photo, tmp_path, undrawn):
        out = tmp_path / "out"
        ended = explain(f"run={convolutional}", f"image={photo}", "methods=[attention]", f"out={out}")

        assert (ended.code, ended.err) == (0, "")
        assert names_in(out) == ALWAYS
        assert self.SAYS in (out / "index.html").read_text()

    def test_a_student_without_maps_is_one_line(self, explain, convolutional, photo):
        (store,) = (convolutional.parent.parent / "teachers" / "digits").glob("[0-9a-f]" * 12)
        for arguments in ([f"run={store}"], [f"model={store / 'student.safetensors'}", f"image={photo}"]):
            ended = explain(*arguments, "methods=[attention]")

            assert ended.code == 2
            (line,) = ended.err.splitlines()
            assert line.startswith("error: ")
            assert str(store) in line or "ResNet has no softmax attention" in line
            assert "attention maps" in line

    @pytest.mark.slow
    def test_unlike_runs_beside_a_teacher_with_maps(
        self, explain, convolutional, run, outputs, tmp_path, undrawn
    ):
        """A baseline is the same model; what the maps are compared without stands on the page."""
        alone = outputs / "digits" / "alone"
        ended = explain(
            f"run=[{convolutional},{alone}]", f"teacher.checkpoint={run}", *LIGHT, f"out={tmp_path}"
        )

        assert (ended.code, ended.err) == (0, "")
        assert all(row["alone"] is None for row in strict_json(tmp_path / "fidelity.json")["rows"])
        page = (tmp_path / "index.html").read_text()
        for words in (
            "student B is another model than student A",
            "Compared without the distillation token of student A, which teacher has not",
            "what tokens of teacher give to themselves, which those of student A may not",
            "attention weight of the classifying tokens",
        ):
            assert words in page


class TestPictures:
    def test_a_photo_for_a_run_on_grey_images(self, explain, run, photo, tmp_path):
        out = tmp_path / "out"
        ended = explain(f"run={run}", f"image={photo}", *LIGHT, f"out={out}")

        assert (ended.code, ended.err) == (0, "")
        assert names_in(out) == ALWAYS | {"figure_1.png"}
        found = arrays_of(out)
        assert found["pixels"].shape == (1, 1, 8, 8)
        assert found["labels"].tolist() == [-1]
        # In grey, its middle square.
        grey = np.asarray(Image.open(photo).convert("L"), float)[:, 10:50] / 255
        np.testing.assert_allclose(found["pixels"][0, 0].mean(), grey.mean(), atol=0.02)
        assert "photo.png" in (out / "index.html").read_text()

    def test_a_folder_of_pictures(self, explain, outputs, photo, tmp_path, undrawn):
        folder = tmp_path / "pictures"
        folder.mkdir()
        (folder / "notes.txt").write_text("no picture")
        (folder / "._a.png").write_bytes(b"what a file manager left")
        with Image.open(photo) as picture:
            picture.save(folder / "b.JPG")
            picture.convert("L").resize((8, 8)).save(folder / "a.png")

        ended = explain(
            f"run={outputs / 'digits' / 'alone'}", f"image={folder}", *LIGHT, f"out={tmp_path / 'out'}"
        )

        assert ended.code == 0, ended.err
        pixels = arrays_of(tmp_path / "out")["pixels"]
        assert pixels.shape == (2, 1, 8, 8)
        with Image.open(folder / "a.png") as first:
            np.testing.assert_allclose(pixels[0, 0], np.asarray(first) / 255, atol=1e-6)

    def test_a_model_alone(self, explain, run, photo, tmp_path, undrawn):
        out = tmp_path / "out"
        ended = explain(f"model={run / 'student.safetensors'}", f"image=[{photo}]", *LIGHT, f"out={out}")

        assert (ended.code, ended.err) == (0, "")
        assert names_in(out) == ALWAYS
        assert "warning" in ended.out  # it does not say how images are normalised
        assert arrays_of(out)["student/relevance"].shape[0] == 1

    def test_the_same_picture_gives_the_same_bytes(self, explain, run, photo, tmp_path, undrawn):
        for name in ("one", "two"):
            ended = explain(f"run={run}", f"image={photo}", "methods=[attention]", f"out={tmp_path / name}")
            assert ended.code == 0, ended.err

        one, two = (everything_below(tmp_path / name) for name in ("one", "two"))
        assert [*one.values()] == [*two.values()]

    @pytest.mark.slow
    def test_a_model_of_timm_twice(self, explain, photo, tmp_path):
        arguments = ["model=timm:vit_tiny_patch16_224", f"image={photo}", "methods=[attention,rollout]"]
        for name in ("one", "two"):
            ended = explain(*arguments, f"out={tmp_path / name}")
            assert (ended.code, ended.err) == (0, "")
            assert "warning: the weights of timm:vit_tiny_patch16_224 are random" in ended.out

        found = arrays_of(tmp_path / "one")
        assert names_in(tmp_path / "one") == ALWAYS
        assert found["vit_tiny_patch16_224/attention"].shape == (1, 12, 3, 14, 14)
        assert found["vit_tiny_patch16_224/rollout"].shape == (1, 14, 14)
        assert found["pixels"].shape == (1, 3, 224, 224)
        pages = [(tmp_path / name / "index.html").read_bytes() for name in ("one", "two")]
        assert pages[0] == pages[1]
        assert b"are random: it is not trained" in pages[0]


@pytest.fixture(scope="module")
def place(outputs, tmp_path_factory) -> Path:
    """A folder in which the mistakes below find what they name."""
    place = tmp_path_factory.mktemp("place")
    photo = a_photo(place / "photo.png")
    shutil.copytree(outputs, place / "outputs", ignore=shutil.ignore_patterns("explain"))
    digits = place / "outputs" / "digits"
    unborn = shutil.copytree(digits / "first", digits / "unborn")
    (unborn / "student.safetensors").unlink()
    shutil.rmtree(unborn / "checkpoints")
    (unborn / "status.json").write_text('{"state": "failed"}')
    shutil.copytree(digits / "first", place.parent / "orphan")
    other = shutil.copytree(digits / "alone", digits / "other")
    config = yaml.safe_load((other / "config.yaml").read_text())
    for group in ("dataset", "student", "teacher"):
        config[group]["image_size"] = 16
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    rival = shutil.copytree(digits / "first", digits / "rival")
    config = yaml.safe_load((rival / "config.yaml").read_text())
    config["teacher"]["trained"] = False
    (rival / "config.yaml").write_text(yaml.safe_dump(config))
    cut = shutil.copytree(digits / "alone", digits / "cut")
    (cut / "config.yaml").write_text("{")
    (place / "pictures").mkdir()
    (place / "pictures" / "notes.txt").write_text("no picture")
    (place / "torn.png").write_bytes(photo.read_bytes()[:2000])
    (place / "text.png").write_text("not a picture")
    os.mkfifo(place / "pipe.png")
    shape = {"image_size": 8, "channels": 1, "num_classes": 7, "patch_size": 2, "depth": 1}
    save_model(ViTConfig(**shape).build(), place / "seven.safetensors")
    (place / "file").write_text("")
    return place


@pytest.fixture
def broken(place, monkeypatch) -> Path:
    """That folder as the working one."""
    monkeypatch.chdir(place)
    return place


RUN = "run=outputs/digits/first"

# A command, and what its line says.
MISTAKES = [
    ("", "run=FOLDER", "model=timm:NAME"),
    (f"{RUN} model=timm:vit_tiny_patch16_224 image=photo.png", "either run=", "or model="),
    ("run=outputs", "run=outputs", "not a run folder"),
    ("run=outputs/digits/unborn", "outputs/digits/unborn", "no checkpoint of the best epoch", "failed"),
    ("run=[outputs/digits/first,outputs/digits/other]", "differ in image_size (8, 16)"),
    (f"{RUN} teacher=outputs", "teacher:", "teacher.checkpoint=VALUE"),
    (f"{RUN} epoch=middle", "epoch=middle", "best or last"),
    (f"{RUN} images=0", "images=0", "at least 1"),
    (f"{RUN} of_class=33", "33", "did you mean 3?"),
    (f"{RUN} methods=[rolout]", "methods=rolout", "did you mean rollout?"),
    (f"{RUN} image=text.png", "image=text.png", "cannot be read as an image"),
    (f"{RUN} image=pictures", "image=pictures", "no picture in it", ".png"),
    ("model=timm:resnet18 image=photo.png", "ResNet", "its attention maps cannot be had"),
    ("model=timm:vit_tinny_patch16_224 image=photo.png", "timm has no such model", "vit_tiny_patch16_224"),
]
FURTHER_MISTAKES = [
    (f"{RUN} teacher.checkpoint=nowhere", "nowhere: there is no such file"),
    (f"{RUN} teacher.checkpoint=seven.safetensors", "teacher.checkpoint=seven.safetensors", "num_classes=7"),
    ("run=[outputs/digits/first,outputs/digits/rival]", "learned from different teachers"),
    ("model=outputs/digits/first image=photo.png", "is a run", "run=outputs/digits/first"),
    ("run=nowhere", "run=nowhere", "not a run folder"),
    ("run=outputs/digits/cut", "cut/config.yaml", "cannot be read"),
    ("run=[]", "run=[]", "one run, or two"),
    (f"run=[{','.join(['outputs/digits/first'] * 3)}]", "one run, or two"),
    ("run=outputs/digits/unborn epoch=last", "no checkpoint of the last epoch"),
    ("run=../orphan", "run=../orphan", "its teacher", "teacher.checkpoint=PATH"),
    (f"{RUN} images=many", "images", "many"),
    (f"{RUN} faithfulness_images=-1", "faithfulness_images=-1", "at least 0"),
    (f"{RUN} regions=0", "regions=0", "at least 1"),
    (f"{RUN} seed=-1", "seed=-1"),
    (f"{RUN} of_class=seal", "seal", "0, 1, 2"),
    (f"{RUN} methods=[]", "methods=[]"),
    (f"{RUN} methods=rollout", "methods", "list"),
    (f"{RUN} image=nowhere.png", "image=nowhere.png", "no such file"),
    (f"{RUN} image=pipe.png", "image=pipe.png", "no such file"),
    (f"{RUN} image=torn.png", "image=torn.png", "cannot be read as an image"),
    (f"{RUN} image=[photo.png,text.png]", "image=text.png"),
    (f"{RUN} image=[]", "image=[]"),
    (f"{RUN} accelerator=abacus", "accelerator=abacus"),
    (f"{RUN} imges=3", "imges", "did you mean images?"),
    (f"{RUN} image=photo.png out=file methods=[attention]", "file", "out=DIR"),
    ("model=seven.safetensors", "model=seven.safetensors", "image=PATH"),
    ("model=nowhere.ckpt image=photo.png", "nowhere.ckpt", "no such file"),
]


@pytest.mark.parametrize(
    "mistake",
    [
        *MISTAKES,
        *(pytest.param(each, marks=pytest.mark.slow) for each in FURTHER_MISTAKES),
    ],
    ids=lambda mistake: mistake[0] or "nothing",
)
def test_a_mistake_is_one_line_and_leaves_nothing(mistake, broken, explain):
    arguments, *words = mistake
    before = everything_below(broken)

    ended = explain(*arguments.split())

    assert ended.code == 2, ended.err
    (line,) = ended.err.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert everything_below(broken) == before
    assert not [*broken.rglob("explain")]


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (f"{RUN} of_class=33", "did you mean 3?"),
        (f"{RUN} methods=[rolout]", "did you mean rollout?"),
        (f"{RUN} out=file", "file"),
        (f"{RUN} out=file/below", "file/below"),
        (f"{RUN} out=/proc/nowhere", "/proc/nowhere"),
        (f"{RUN} out=outputs/digits/first", "of its own"),
        (f"{RUN} out=page", "of its own"),
        (f"{RUN} of_class=3 image=photo.png", "leave out image"),
        (f"{RUN} methods=[integrated_gradients]", "vitkd[explain]"),
        (f"run=[outputs/digits/first,outputs/digits/alone] out={'x' * 300}", "x" * 300),
    ],
    ids=str,
)
def test_a_mistake_is_reported_before_the_work(mistake, says, explain, broken, monkeypatch):
    (broken / "page").mkdir(exist_ok=True)
    (broken / "page" / "index.html").write_text("somebody's")
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    for work in ("survey", "_look"):
        monkeypatch.delattr(f"vitkd.explain.job.{work}")
    before = everything_below(broken)

    ended = explain(*mistake.split())

    assert ended.code == 2, ended.err
    (line,) = ended.err.splitlines()
    assert says in line
    assert everything_below(broken) == before


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        ("run=[outputs/digits/first,nowhere]", "run=nowhere: not a run folder"),
        (f"{RUN} image=[photo.png,nowhere.png]", "image=nowhere.png: there is no such file"),
        (f"{RUN} image=pictures", "image=pictures: no picture in it"),
        (f"{RUN} teacher.checkpoint=nowhere.ckpt", "teacher.checkpoint=nowhere.ckpt: there is no such file"),
        (
            f"{RUN} teacher.checkpoint=pictures",
            "teacher.checkpoint=pictures/student.safetensors: there is no",
        ),
        ("model=nowhere.ckpt image=photo.png", "model=nowhere.ckpt: there is no such file"),
    ],
)
def test_a_missing_file_is_named_before_any_is_read(mistake, says, explain, broken, monkeypatch):
    monkeypatch.delattr("vitkd.explain.__main__.open_sources")
    before = everything_below(broken)

    ended = explain(*mistake.split())

    assert ended.code == 2, ended.err
    (line,) = ended.err.splitlines()
    assert line.startswith(f"error: {says}")
    assert everything_below(broken) == before


def test_a_folder_of_images_that_is_missing_is_named_before_the_weights_are_read(
    explain, broken, monkeypatch
):
    monkeypatch.delattr("vitkd.runs.load.load_student")

    ended = explain(RUN, "root=nowhere")

    assert ended.code == 2
    assert ended.err == "error: root=nowhere: there is no such folder; name the one with the run's images\n"


def test_an_extra_that_is_absent_is_named(explain, broken, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    assert "integrated_gradients" in METHODS

    ended = explain(RUN, "methods=[integrated_gradients]", "image=photo.png")

    assert ended.code == 2
    assert "vitkd[explain]" in ended.err
    assert len(ended.err.splitlines()) == 1


BOTH = {"distillation_token": True}


@pytest.mark.parametrize(
    ("ours", "theirs", "remark"),
    [
        ({}, {}, None),
        (BOTH, BOTH, "Class rows of student and teacher: the mean of class and distillation token."),
        (BOTH, {}, "the distillation token of student, which teacher has not"),
        ({}, {"attention": "lsa"}, "what tokens of student give to themselves"),
    ],
)
def test_what_the_tables_leave_out_is_said(ours, theirs, remark, tiny):
    is_possible, said = how_compared(
        "student", *(own_layout(tiny(**each).build()) for each in (ours, theirs))
    )

    assert is_possible
    assert len(said) == (remark is not None)
    assert remark is None or remark in said[0]


@pytest.mark.parametrize(
    ("ours", "theirs", "is_possible", "remarks"),
    [
        ({}, {}, True, ["the teacher's maps are resized to be compared."]),
        (BOTH, BOTH, True, ["are resized", "Compared without distillation tokens"]),
        ({"attention": "lsa"}, {}, True, ["are resized", "what tokens of teacher give to themselves"]),
        (
            {},
            {"attention": "lsa"},
            False,
            ["student has 2×2 patches and the teacher 4×4 of locality"],
        ),
    ],
)
def test_maps_of_other_patches_are_resized_where_that_can_be_done(ours, theirs, is_possible, remarks, tiny):
    layouts = (own_layout(tiny(**each).build()) for each in (ours, theirs | {"patch_size": 2}))

    can_be_compared, said = how_compared("student", *layouts)

    assert can_be_compared == is_possible
    for words, sentence in zip(remarks, said, strict=True):
        assert words in sentence


def test_the_test_split_is_gone_through_in_any_order():
    """The images of a folder lie class by class, and an image's neighbour is to be any other."""
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = parse(compose("train"))
    data = ImageDataModule(config.dataset, config.paths.data, 0)

    def numbers(seed):
        seen = [*in_random_order(data, seed, torch.device("cpu"))]
        for batch in seen:
            whole = data.loader("test", "cpu").first(10**6)
            assert torch.equal(batch.image, whole.image[batch.index])
            assert torch.equal(batch.label, whole.label[batch.index])
        return torch.cat([batch.index for batch in seen]).tolist()

    first = numbers(0)

    assert sorted(first) == [*range(len(first))] != first
    assert numbers(0) == first != numbers(1)
