"""Where a student looks, and whether it learnt that: `python -m vitkd.explain run=outputs/…`."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from vitkd.cli.command import run_command
from vitkd.cli.console import Job, start_logging
from vitkd.config import Config
from vitkd.config.schema import instantiate
from vitkd.data import ImageDataModule
from vitkd.data.order import EpochOrder
from vitkd.errors import ConfigError
from vitkd.evaluate.__main__ import device_of
from vitkd.explain.gallery.album import FILES, Album, files_of
from vitkd.explain.gallery.cells import Answers, Cell, EmptyCell, cells, choose, over_represented
from vitkd.explain.gallery.page import Subject
from vitkd.explain.gallery.panel import denormalise
from vitkd.explain.gallery.pictures import Format, format_of, normalise, read_picture
from vitkd.explain.gallery.subjects import maps_of, regions_of, subject_of, without_maps
from vitkd.explain.maps.methods import CLASS_SPECIFIC
from vitkd.explain.maps.recording import has_maps, timm_model
from vitkd.explain.measures.correctness import Correlation, correctness_correlation
from vitkd.explain.measures.faithfulness import MapsOfClasses, faithfulness
from vitkd.explain.measures.fidelity import MapPair
from vitkd.explain.measures.survey import Comparison, Survey, survey
from vitkd.explain.settings import Settings
from vitkd.methods.maps.pairing import map_block
from vitkd.models import Model, ViTConfig, digest
from vitkd.runs.checkpoints import load_any
from vitkd.runs.files import write_atomically
from vitkd.runs.load import Run, load_run

log = logging.getLogger("vitkd")

TEACHER = "teacher"
# Settings of a data set that change its test images, or what a model is given of them.
SAME_IMAGES = ("source", "root", "image_size", "channels", "mean", "std", "num_classes", "split_seed")


def main() -> None:
    """Explain what the command line names."""
    run_command("explain", explain_job)


def explain_job(composed: DictConfig, job: Job) -> None:
    """Look into the models, and write figures, arrays, numbers and the page into one folder."""
    start_logging()
    plain = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(plain, dict)
    settings = instantiate("", Settings, {str(key): value for key, value in plain.items()})
    device = device_of(settings.accelerator)
    out = Path(settings.out) if settings.out else _place(settings)
    if settings.run is None:
        album = of_pictures(settings, _models(settings, [], device), device)
    else:
        runs = [
            load_run(
                path,
                settings.epoch,
                teacher=settings.teacher.get("checkpoint"),
                data=settings.paths.get("data"),
                root=settings.root,
            )
            for path in settings.runs
        ]
        _check_maps(runs)
        _check_comparable(runs)
        with closing(ImageDataModule(runs[0].config.dataset, runs[0].config.paths.data, 0)) as data:
            data.setup()
            models = _models(settings, runs, device)
            if settings.image is None:
                album = of_test_split(settings, runs, models, data, device)
            else:
                known = runs[0].config, data.class_names
                album = of_pictures(settings, models, device, known, _shown_blocks(runs))
    job.folder = str(out)
    write(files_of(album), out)


def shape_of(model: Model) -> ViTConfig:
    """The configuration of a model that has attention maps."""
    assert isinstance(model.config, ViTConfig)
    return model.config


def write(files: Mapping[str, bytes], out: Path) -> None:
    """Write every file, each whole or not at all."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out}: no folder can be made there ({error.strerror}); set out=DIR") from error
    for name, content in files.items():
        write_atomically(out / name, content)
    for name in FILES - files.keys():
        (out / name).unlink(missing_ok=True)  # of an earlier explanation, which had more to show
    log.info("pictures  %s", ", ".join(sorted(name for name in files if name.endswith(".png"))))
    log.info("arrays    %s", out / "maps.npz")
    log.info("page      %s", out / "index.html")


def _check_maps(runs: Sequence[Run]) -> None:
    """ConfigError if a student has no attention maps; a teacher may have none."""
    for run in runs:
        if not has_maps(run.student):
            what = f"its student ({run.student.config}) has no attention maps"
            raise ConfigError(f"run={run.path}: {what}; name a run whose student is a ViT")


def _on_teacher(models: Mapping[str, nn.Module]) -> list[str]:
    """What there is to say of a teacher that has no attention maps."""
    teacher = models.get(TEACHER)
    if teacher is None or has_maps(teacher):
        return []
    remark = f"The teacher ({teacher.config}) has no attention maps: of it there are only its answers."
    log.info("%s", remark)
    return [remark]


def _check_comparable(runs: Sequence[Run]) -> None:
    """ConfigError unless all runs have the same test images, and one teacher if any."""
    first, *others = (run.config.dataset for run in runs)
    for other in others:
        for name in SAME_IMAGES:
            mine, its = getattr(first, name, None), getattr(other, name, None)
            if type(first) is not type(other) or mine != its:
                what = f"{first.name} and {other.name} differ in {name} ({mine}, {its})"
                raise ConfigError(f"run=[A,B]: {what}; compare runs on the same test images")
    if len({digest(run.teacher) for run in runs if run.teacher is not None}) > 1:
        raise ConfigError(
            "run=[A,B]: learned from different teachers; name the one to hold both against by "
            "teacher.checkpoint=PATH"
        )


def _models(settings: Settings, runs: Sequence[Run], device: torch.device) -> dict[str, nn.Module]:
    """Name → model on the device, the teacher first."""
    if settings.model is not None:
        name = settings.model
        if Path(name, "config.yaml").is_file():
            raise ConfigError(f"model={name}: is a run, which says how its images are made; write run={name}")
        found = timm_model(name, settings.pretrained) if name.startswith("timm:") else load_any(Path(name))
        return {
            name.removeprefix("timm:") if name.startswith("timm:") else "student": found.to(device).eval()
        }
    teachers = [run.teacher for run in runs if run.teacher is not None]
    models: dict[str, nn.Module] = {TEACHER: teachers[0]} if teachers else {}
    models |= {name: run.student for name, run in zip(_names(runs), runs, strict=True)}
    return {name: model.to(device).eval() for name, model in models.items()}


def _on_weights(settings: Settings) -> list[str]:
    """What has to be known of a model that nobody has trained."""
    if settings.model is None or not settings.model.startswith("timm:") or settings.pretrained:
        return []
    note = f"The weights of {settings.model} are random: it has learnt nothing; pretrained=true fetches some."
    log.warning("warning: %s%s", note[0].lower(), note[1:])
    return [note]


def _on_patches(subjects: Sequence[Subject]) -> list[str]:
    """Whose patches cannot be asked what they attend to."""
    left_out = [each.name for each in subjects if each.maps and each.patches is None]
    if not left_out:
        return []
    whose = " and ".join(left_out)
    return [f"What single patches of {whose} attend to is left out, for it is much: choose fewer images."]


def _names(runs: Sequence[Run]) -> list[str]:
    return ["student"] if len(runs) == 1 else ["student A", "student B"]


def of_test_split(
    settings: Settings,
    runs: Sequence[Run],
    models: Mapping[str, nn.Module],
    data: ImageDataModule,
    device: torch.device,
) -> Album:
    """Everything about the runs' models on the test split."""
    config, names = runs[0].config, _names(runs)
    student = names[0]
    notes = [f"{name}: {run.path}" for name, run in zip(names, runs, strict=True)] if len(runs) > 1 else []
    if len(runs) > 1 and TEACHER in models:
        notes.append(f"Right and wrong in the table and the cells are those of {student}.")
    comparisons, remarks = _comparisons(runs, names)
    notes += _on_teacher(models) + remarks
    log.info("asking %s about the test split", ", ".join(models))
    seen = survey(models, _in_any_order(data, settings.seed, device), comparisons)
    answers = _answers(seen, student, data.class_names)
    found = cells(answers)
    chosen, remarks = _chosen(settings, answers, found if TEACHER in models else None)
    notes += remarks
    positions = [position for position, _ in chosen]
    images = _images(data, seen.numbers[positions], device)
    mean, std = config.dataset.mean, config.dataset.std
    log.info("explaining %d images by %s", len(images), ", ".join(settings.methods))
    subjects, regions = _look(settings, models, images, _shown_blocks(runs))
    return Album(
        title=_title(models),
        source=_source(runs),
        epoch=settings.epoch,
        pixels=denormalise(images.cpu(), mean, std),
        labels=[int(seen.labels[i]) for i in positions],
        cells=[cell for _, cell in chosen],
        numbers=[int(seen.numbers[i]) for i in positions],
        class_names=data.class_names,
        subjects=subjects,
        regions=regions,
        other_block=_other_block(runs[0]),
        counts={name: cell.count for name, cell in found.items()} if TEACHER in models else {},
        # One chance in twenty of any false finding, over all cells.
        over_represented={n: over_represented(cell, 0.05 / len(found)) for n, cell in found.items()}
        if TEACHER in models
        else {},
        alikeness=seen.alikeness,
        correlations={name: _correlations(seen, name) for name in seen.alikeness},
        reach=seen.reach,
        faithfulness=_faithfulness(settings, models, seen, data, device, (mean, std)),
        notes=notes + _on_patches(subjects),
    )


def _chosen(
    settings: Settings, answers: Answers, found: Mapping[str, Cell] | None
) -> tuple[list[tuple[int, str]], list[str]]:
    """Positions of images to show, each with its cell, and what there is to say; without cells any images."""
    if found is None:
        picked = {"": choose_any(answers, settings)}
    else:
        picked = {
            name: choose(cell, settings.images, settings.seed, of_class=settings.of_class)
            for name, cell in found.items()
        }
    empty = [f"There is {each.message}." for each in picked.values() if isinstance(each, EmptyCell)]
    chosen = [
        (int(i), name) for name, each in picked.items() if not isinstance(each, EmptyCell) for i in each
    ]
    if not chosen:
        raise ConfigError(f"of_class={settings.of_class}: no image of that class is in the test split")
    return chosen, empty


def of_pictures(
    settings: Settings,
    models: Mapping[str, nn.Module],
    device: torch.device,
    known: tuple[Config, list[str]] | None = None,
    blocks: Mapping[str, int] | None = None,
) -> Album:
    """A person's own pictures.

    Args:
        known: the run's configuration and class names, if there is a run.
        blocks: model → the block shown first, if not the last.
    """
    paths = settings.pictures
    if known is None:
        given, names = format_of(next(iter(models.values()))), list[str]()
    else:
        data, names = known[0].dataset, known[1]
        given = Format(data.image_size, data.channels, data.mean, data.std)
    pixels = torch.stack([read_picture(path, given.size, given.channels) for path in paths])
    images = normalise(pixels, given.mean, given.std).to(device)
    subjects, regions = _look(settings, models, images, blocks)
    classes = 1 + max(max(subject.predicted) for subject in subjects)
    return Album(
        title=_title(models),
        source=", ".join(path.name for path in paths[:3]) + (" …" if len(paths) > 3 else ""),
        pixels=pixels,
        labels=[-1] * len(paths),
        cells=[""] * len(paths),
        numbers=[*range(len(paths))],
        class_names=names or [f"class {number}" for number in range(classes)],
        subjects=subjects,
        regions=regions,
        notes=_on_teacher(models) + _on_weights(settings) + _on_patches(subjects),
    )


def choose_any(answers: Answers, settings: Settings) -> Any:
    """Images of a run without a teacher, whoever is right."""
    everything = Answers(
        answers.labels,
        answers.labels,
        answers.labels,
        answers.student_confidence,
        answers.student_confidence,
        answers.class_names,
    )
    return choose(cells(everything)["both right"], settings.images, settings.seed, of_class=settings.of_class)


def _comparisons(runs: Sequence[Run], names: Sequence[str]) -> tuple[dict[str, Comparison], list[str]]:
    """Student → what to hold its maps against; and what there is to say of that, or why it cannot be."""
    teacher = next((run.teacher for run in runs if run.teacher is not None), None)
    if teacher is None or not has_maps(teacher):
        return {}, []
    found, remarks = {}, []
    for name, run in zip(names, runs, strict=True):
        ours, theirs = shape_of(run.student), shape_of(teacher)
        if ours.grid != theirs.grid:
            grids = f"{name} has {ours.grid}×{ours.grid} patches and the teacher {theirs.grid}×{theirs.grid}"
            if theirs.attention == "lsa":
                # Where its tokens may not look at themselves is no longer to be told.
                remarks.append(f"{grids} of locality attention: their maps are shown, not compared.")
                continue
            remarks.append(f"{grids}: the teacher's maps are resized to be compared.")
        remarks += _how_compared(name, ours, theirs)
        others = [n for n, other in zip(names, runs, strict=True) if other is not run and other.is_alone]
        alone = others[0] if others and not run.is_alone else None
        if alone is not None and runs[names.index(alone)].student.config != ours:
            remarks.append(f"{alone} is another model than {name}, so it is no baseline for its maps.")
            alone = None
        found[name] = Comparison(TEACHER, *_pairs(run, teacher), ours.patch_size, alone)
    return found, remarks


def _how_compared(name: str, ours: ViTConfig, theirs: ViTConfig) -> list[str]:
    """What the tables leave out of maps that differ by design, as `survey.comparable` has it, and read."""
    remarks, found = [], []
    if ours.prefix == theirs.prefix > 1 and ours.grid == theirs.grid:
        remarks.append(f"Class rows of {name} and teacher: the mean of class and distillation token.")
    elif ours.prefix == theirs.prefix > 1:
        found.append("distillation tokens, for of resized patches the class token alone is kept beside")
    for has, lacks, mine, its in ((name, TEACHER, ours, theirs), (TEACHER, name, theirs, ours)):
        if mine.prefix > its.prefix:
            found.append(f"the distillation token of {has}, which {lacks} has not")
        if mine.attention != "lsa" and its.attention == "lsa":
            found.append(f"what tokens of {has} give to themselves, which those of {lacks} may not")
    if found:
        remarks.append(f"Compared without {' and '.join(found)}; the rest of each row is scaled to sum 1.")
    return remarks


def _pairs(run: Run, teacher: Model) -> tuple[list[MapPair], list[bool]]:
    """Every student map beside the teacher maps that it learned from, or would have by the usual order."""
    learnt = {
        (pair["student_block"], head): (pair["teacher_block"], tuple(heads))
        for pair in run.pairs
        for head, heads in zip(pair["student_heads"], pair["teacher_heads"], strict=True)
    }
    ours, theirs = shape_of(run.student), shape_of(teacher)
    pairs, flags = [], []
    for block in range(ours.depth):
        for head in range(ours.num_heads):
            usual = (map_block(block, ours.depth, theirs.depth), (head % theirs.num_heads,))
            pairs.append(MapPair(block, head, *learnt.get((block, head), usual)))
            flags.append((block, head) in learnt)
    return pairs, flags


def _look(
    settings: Settings, models: Mapping[str, nn.Module], images: Tensor, blocks: Mapping[str, int] | None
) -> tuple[list[Subject], dict[str, Any]]:
    """Every model before the images, and its regions in them; of a teacher without maps the answers."""
    subjects, regions = [], {}
    for name, model in models.items():
        role: Literal["teacher", "student"] = "teacher" if name == TEACHER else "student"
        if name == TEACHER and not has_maps(model):
            subjects.append(without_maps(name, role, model, images))
            continue
        block = (blocks or {}).get(name, -1)
        subject, features = subject_of(name, role, model, images, settings.methods, block)
        subjects.append(subject)
        regions[name] = regions_of(features, settings.regions, subject)
    return subjects, regions


def _shown_blocks(runs: Sequence[Run]) -> dict[str, int]:
    """Model → the block of the last pair that its run distilled; the teacher's is the first such run's."""
    named = [(name, run.pairs[-1]) for name, run in zip(_names(runs), runs, strict=True) if run.pairs]
    shown = {name: pair["student_block"] for name, pair in named}
    return shown | ({TEACHER: named[0][1]["teacher_block"]} if named else {})


def _other_block(run: Run) -> int | None:
    """The last student block that was not distilled, if some were and some not."""
    learnt = {pair["student_block"] for pair in run.pairs}
    others = [block for block in range(shape_of(run.student).depth) if block not in learnt]
    return others[-1] if learnt and others else None


def _answers(seen: Survey, student: str, class_names: Sequence[str]) -> Answers:
    teacher = TEACHER if TEACHER in seen.predicted else student
    return Answers(
        seen.labels.numpy(),
        seen.predicted[teacher].numpy(),
        seen.predicted[student].numpy(),
        seen.confidence[teacher].numpy(),
        seen.confidence[student].numpy(),
        class_names,
    )


def _correlations(seen: Survey, student: str) -> dict[str, Correlation]:
    right = seen.predicted[student] == seen.labels
    teacher_right = seen.predicted[TEACHER] == seen.labels
    divergence = seen.alikeness[student].divergence
    return {
        "all test images": correctness_correlation(divergence, right),
        "those that the teacher has right": correctness_correlation(divergence, right, among=teacher_right),
    }


def _faithfulness(
    settings: Settings,
    models: Mapping[str, nn.Module],
    seen: Survey,
    data: ImageDataModule,
    device: torch.device,
    scale: tuple[Sequence[float], Sequence[float]],
) -> dict[str, Any]:
    """Model → what `faithfulness` found on images drawn by the seed."""
    if settings.faithfulness_images == 0:
        return {}
    drawn = np.random.default_rng(settings.seed).permutation(len(seen.labels))[: settings.faithfulness_images]
    images, labels = _images(data, seen.numbers[drawn], device), seen.labels[drawn].to(device)
    pixels = denormalise(images, *scale)
    log.info("removing pixels of %d images, step by step", len(images))
    found = {}
    for name, model in ((name, model) for name, model in models.items() if has_maps(model)):
        predicted = seen.predicted[name][drawn].to(device)
        maps = {
            method: MapsOfClasses(*(maps_of(method, model, images, each) for each in (predicted, labels)))
            if method in CLASS_SPECIFIC
            else maps_of(method, model, images, predicted)
            for method in settings.methods
        }
        found[name] = faithfulness(
            model, pixels, lambda x: normalise(x, *scale), maps, predicted, labels, seed=settings.seed
        )
    return found


def _in_any_order(
    data: ImageDataModule, seed: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The test split's images, labels and positions in batches; a folder's images lie class by class."""
    loader = data.loader("test", device, rank=0, world_size=1)
    order = loader.sampler
    lots = np.random.default_rng(seed).permutation(len(order.index))
    loader.sampler = EpochOrder(order.index[torch.from_numpy(lots).to(order.index.device)], order.batch_size)
    return ((batch.image, batch.label, batch.index) for batch in loader)


def _images(data: ImageDataModule, numbers: Tensor, device: torch.device) -> Tensor:
    """The normalised test images [N, C, H, W] at these positions of their split, in this order."""
    wanted = {int(number): place for place, number in enumerate(numbers)}
    found: dict[int, Tensor] = {}
    for batch in data.loader("test", device, rank=0, world_size=1):
        for image, number in zip(batch.image, batch.index.tolist(), strict=True):
            if number in wanted:
                found[wanted[number]] = image
        if len(found) == len(wanted):
            break
    return torch.stack([found[place] for place in range(len(wanted))])


def _title(models: Mapping[str, nn.Module]) -> str:
    names = [name for name, model in models.items() if has_maps(model)]
    *others, last = names
    return f"Where {', '.join(others)} and {last} look" if others else f"Where {last} looks"


def _source(runs: Sequence[Run]) -> str:
    first = runs[0]
    where = " and ".join(str(run.path) for run in runs)
    return f"{where} · {first.config.dataset.name}, test split · {first.epoch} epoch"


def _place(settings: Settings) -> Path:
    name = "explain" if settings.image is None else "explain_pictures"
    return settings.runs[0] / name if settings.runs else Path(name)


if __name__ == "__main__":
    main()
