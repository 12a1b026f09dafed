"""The models to explain, the runs and data that they come from, and which of their maps are compared."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor, nn

from vitkd.data import Dataset, ImageDataModule
from vitkd.data.decoding import decode
from vitkd.errors import ConfigError
from vitkd.explain.maps.recording import Layout, has_maps, own_layout, timm_model, why_no_maps
from vitkd.explain.maps.subjects import TEACHER
from vitkd.explain.measures.fidelity import MapPair
from vitkd.explain.measures.survey import Comparison
from vitkd.explain.settings import Settings
from vitkd.methods.maps.alignment import how_grids_differ, how_windows_differ
from vitkd.methods.maps.granularity import map_block
from vitkd.models import Model, TimmConfig, digest, read_header
from vitkd.models.output import shown
from vitkd.runs.checkpoints import load_any
from vitkd.runs.folder import RunFolder
from vitkd.runs.inputs import check_images, class_names
from vitkd.runs.load import Run, load_run

log = logging.getLogger("vitkd")

Pairs = Mapping[MapPair, bool]
"""a student map and its teacher maps → whether the student learned them"""

# Settings of a data set that change its test images, or how a model sees them.
SAME_IMAGES = ("source", "root", "image_size", "channels", "mean", "std", "num_classes", "split_seed")


@dataclass(frozen=True, eq=False)
class Sources:
    """What is explained."""

    models: Mapping[str, nn.Module]
    """name → model in eval mode on the device, the teacher first if there is one"""
    device: torch.device
    runs: Mapping[str, Run]
    """student's name → its run; none for a single model"""
    data: ImageDataModule | None
    """of the first run"""
    class_names: Sequence[str]
    """by label; empty if the models do not say"""

    @property
    def first(self) -> Run:
        """The first run."""
        return next(iter(self.runs.values()))

    @property
    def format(self) -> tuple[int, int, Sequence[float], Sequence[float]]:
        """Pixels a side, channels, mean and std of the models' images, as far as that is known."""
        if self.runs:
            data = self.first.config.dataset
            return data.image_size, data.channels, data.mean, data.std
        (model,) = self.models.values()
        if isinstance(c := getattr(model, "config", None), TimmConfig):
            return c.image_size, c.channels, c.mean, c.std
        stated = getattr(model, "pretrained_cfg", {})
        channels, _, size = stated.get("input_size", (3, 224, 224))
        if isinstance(model, Model):
            log.warning("warning: the model does not say how images are normalised; 0.5 ± 0.5 is assumed")
            channels, size = model.config.channels, model.config.image_size
        half = [0.5] * channels
        return size, channels, stated.get("mean", half), stated.get("std", half)

    @property
    def title(self) -> str:
        *others, last = [name for name, model in self.models.items() if has_maps(model)]
        return f"Where {', '.join(others)} and {last} look" if others else f"Where {last} looks"

    @property
    def shown_blocks(self) -> dict[str, int]:
        """Model → the last block that its run distilled; the teacher's is the first such run's."""
        pairs = {name: run.outer_pairs[-1] for name, run in self.runs.items() if run.outer_pairs}
        shown = {name: pair["student_block"] for name, pair in pairs.items()}
        return shown | ({TEACHER: next(iter(pairs.values()))["teacher_block"]} if pairs else {})

    def notes(self) -> list[str]:
        """What to know of maps that are not shown: a teacher's that has none, and inner ones."""
        notes = [
            f"The {name} learned the teacher's attention within patches; shown is that among patches."
            for name, run in self.runs.items()
            if len(run.outer_pairs) < len(run.pairs)
        ]
        teacher = self.models.get(TEACHER)
        if isinstance(teacher, Model) and not has_maps(teacher):
            notes.append(
                f"The teacher ({teacher.config}) {why_no_maps(teacher)}: only its predictions are shown."
            )
        for note in notes:
            log.info("%s", note)
        return notes


@contextmanager
def open_sources(settings: Settings, device: torch.device) -> Iterator[Sources]:
    """Load the models that `settings` name; ConfigError where that cannot be done."""
    if settings.model is not None:
        names = class_names(read_header(Path(settings.model)))
        yield Sources(_single_model(settings.model, settings.pretrained, device), device, {}, None, names)
        return
    runs = _load_runs(settings)
    config = runs[0].config
    names = ["student"] if len(runs) == 1 else ["student A", "student B"]
    teachers = [run.teacher for run in runs if run.teacher is not None]
    models = {TEACHER: teachers[0]} if teachers else {}
    models |= {name: run.student for name, run in zip(names, runs, strict=True)}
    models = {name: model.to(device).eval() for name, model in models.items()}
    with closing(ImageDataModule(config.dataset, config.paths.data, 0)) as data:
        for run in runs if settings.image is None else ():
            check_images(RunFolder(run.path), run.config, data)
        classes = class_names(RunFolder(runs[0].path).read_inputs()) or data.class_names
        yield Sources(models, device, dict(zip(names, runs, strict=True)), data, classes)


def _single_model(name: str, pretrained: bool, device: torch.device) -> dict[str, nn.Module]:
    if name.startswith("timm:"):
        return {name.removeprefix("timm:"): timm_model(name, pretrained).to(device)}
    if Path(name, "config.yaml").is_file():
        raise ConfigError(f"model={name}: is a run, which says how its images are made; write run={name}")
    return {"student": load_any(Path(name)).to(device).eval()}


def read_picture(path: Path, size: int, channels: int) -> Tensor:
    """A picture's middle square as [C, size, size] in 0..1; ConfigError if it cannot be read."""
    try:
        return decode(path, size, channels) / 255
    except ConfigError as error:
        raise ConfigError(f"image={error}") from error


def _load_runs(settings: Settings) -> list[Run]:
    """The runs, whose students have attention maps, the same test images and one teacher if any."""
    where = {"data": settings.paths.get("data"), "root": settings.root}
    teacher = settings.teacher.get("checkpoint")
    runs = [load_run(path, settings.epoch, teacher=teacher, **where) for path in settings.runs]
    for run in runs:
        if cause := why_no_maps(run.student):
            what = f"its student ({run.student.config}) {cause}"
            raise ConfigError(f"run={run.path}: {what}; name a run whose student is a ViT, a Swin or a TNT")
    check_same_images([run.config.dataset for run in runs], "run=[A,B]")
    if len({digest(run.teacher) for run in runs if run.teacher is not None}) > 1:
        raise ConfigError(
            "run=[A,B]: learned from different teachers; name the one to compare both with by "
            "teacher.checkpoint=PATH"
        )
    return runs


def check_same_images(datasets: Sequence[Dataset], setting: str) -> None:
    """ConfigError, of the `setting` that names them, unless all runs have the same test images."""
    first, *others = datasets
    for other in others:
        for name in SAME_IMAGES:
            mine, its = getattr(first, name, None), getattr(other, name, None)
            if type(first) is not type(other) or mine != its:
                what = f"{first.name} and {other.name} differ in {name} ({mine}, {its})"
                raise ConfigError(f"{setting}: {what}; compare runs on the same test images")


def comparisons(runs: Mapping[str, Run]) -> tuple[dict[str, Comparison], list[str]]:
    """Student → its comparison, where there can be one; and notes on what is compared, or why it is not."""
    teacher = next((run.teacher for run in runs.values() if run.teacher is not None), None)
    if teacher is None or not has_maps(teacher):
        return {}, []
    found, notes = {}, []
    for name, run in runs.items():
        pairs, remarks = comparable_pairs(name, run.student, teacher, _pairs(run, teacher))
        notes += remarks
        if pairs:
            alone, remarks = _student_alone(name, runs)
            notes += remarks
            patch_size = run.student.config.image_size / own_layout(run.student).grid[0]
            found[name] = Comparison(TEACHER, [*pairs], [*pairs.values()], patch_size, alone)
    return found, notes


def comparable_pairs(name: str, student: Model, teacher: Model, pairs: Pairs) -> tuple[Pairs, list[str]]:
    """Those of `pairs` whose maps can be compared, and what is left out or changed for that."""
    places = own_layout(student), own_layout(teacher)
    if not any(place.windows for place in places):
        is_possible, notes = how_compared(name, *places)
        return pairs if is_possible else {}, notes
    pairs, notes = _with_equal_windows(name, student, teacher, pairs)
    return pairs, [*notes, *(_reductions(name, *places) if pairs else [])]


def how_compared(name: str, student: Layout, teacher: Layout) -> tuple[bool, list[str]]:
    """Whether maps over all tokens can be compared, and what `survey.comparable` does for that."""
    if student.grid == teacher.grid:
        return True, _reductions(name, student, teacher)
    grids = f"{name} has {shown(student.grid)} patches and the teacher {shown(teacher.grid)}"
    if not teacher.sees_itself:
        # In resized maps a token's weight for itself could not be left out.
        return False, [f"{grids} of locality attention: their maps are shown, not compared."]
    resized = f"{grids}: the teacher's maps are resized to be compared."
    return True, [resized, *_reductions(name, student, teacher)]


def _with_equal_windows(name: str, student: Model, teacher: Model, pairs: Pairs) -> tuple[Pairs, list[str]]:
    """Those of blocks whose windows and patches are the same, as training pairs them; why others are not."""
    alike: dict[MapPair, bool] = {}
    apart: dict[str, dict[str, None]] = {}
    for pair, is_distilled in pairs.items():
        layouts = student.attention[pair.student_block], teacher.attention[pair.teacher_block]
        if reason := how_windows_differ(*layouts) or how_grids_differ(*layouts):
            apart.setdefault(reason, {})[f"{pair.student_block} and {pair.teacher_block}"] = None
        else:
            alike[pair] = is_distilled
    return alike, [
        f"Blocks {', '.join(blocks)} of {name} and teacher are shown, not compared: {reason}."
        for reason, blocks in apart.items()
    ]


def _reductions(name: str, student: Layout, teacher: Layout) -> list[str]:
    """What is averaged in, or left out of, maps that differ by design."""
    notes, left_out = [], []
    if student.prefix == teacher.prefix > 1 and student.grid == teacher.grid:
        notes.append(f"Class rows of {name} and teacher: the mean of class and distillation token.")
    elif student.prefix == teacher.prefix > 1:
        left_out.append("distillation tokens, as resized maps keep the class token only")
    for has, lacks, own, other in ((name, TEACHER, student, teacher), (TEACHER, name, teacher, student)):
        if own.prefix > other.prefix:
            tokens = "distillation token" if other.prefix else "class token"
            left_out.append(f"the {tokens} of {has}, which {lacks} has not")
        if own.sees_itself and not other.sees_itself:
            left_out.append(f"what tokens of {has} give to themselves, which those of {lacks} may not")
    if left_out:
        notes.append(f"Compared without {' and '.join(left_out)}; the rest of each row is scaled to sum 1.")
    return notes


def _student_alone(name: str, runs: Mapping[str, Run]) -> tuple[str | None, list[str]]:
    """The other run's student, if it learned without a teacher and is the same model: the baseline."""
    run = runs[name]
    alone = next((other for other in runs if other != name and runs[other].is_alone), None)
    if alone is None or run.is_alone:
        return None, []
    if runs[alone].student.config != run.student.config:
        return None, [f"{alone} is another model than {name}, so it is no baseline for its maps."]
    return alone, []


def _pairs(run: Run, teacher: Model) -> Pairs:
    """Every student map beside the teacher maps that it learned from, or would have by the default order."""
    learned = {
        (pair["student_block"], head): (pair["teacher_block"], tuple(heads), tuple(weights))
        for pair in run.outer_pairs
        for head, heads, weights in zip_longest(
            pair["student_heads"], pair["teacher_heads"], pair.get("weights") or (), fillvalue=()
        )
    }
    student_layouts, teacher_layouts = run.student.attention, teacher.attention
    pairs = {}
    for block, layout in enumerate(student_layouts):
        teacher_block = map_block(block, len(student_layouts), len(teacher_layouts))
        for head in range(layout.heads):
            default = (teacher_block, (head % teacher_layouts[teacher_block].heads,), ())
            chosen = learned.get((block, head), default)
            pairs[MapPair(block, head, *chosen)] = (block, head) in learned
    return pairs
