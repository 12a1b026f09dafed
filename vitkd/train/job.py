"""One training job, from a composed configuration to a run folder."""

import logging
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig

from vitkd.cli.command import goes_on, run_path, same_job, warn_of_ignored_settings
from vitkd.cli.console import Job, percent, print_results, start_logging
from vitkd.cli.jobs import figures_of
from vitkd.config import Config, parse, teacher_run
from vitkd.data import ImageDataModule
from vitkd.errors import ConfigError
from vitkd.evaluate.measure import Evaluation, evaluate, measure_both
from vitkd.models import Model, ModelConfig, count_parameters, digest, save_model
from vitkd.process.distributed import agree, is_first, joined, rank, wait_for_all
from vitkd.process.isolation import set_matmul_precision
from vitkd.runs import results
from vitkd.runs.folder import RunFolder
from vitkd.runs.provenance import provenance
from vitkd.runs.seeding import DROPOUT, ORDER, first_weights, seed_generators, seed_of
from vitkd.runs.stack_folder import restart_alone, stacks_folder
from vitkd.runs.teacher_store import fingerprint, given_teacher, stored_teacher
from vitkd.train.build import build_module, facts_of
from vitkd.train.compilation import check_compiler, compile_training
from vitkd.train.cuda_graph import CudaGraphs
from vitkd.train.fit import Fitted, check_trainer, conclude_curves, fit
from vitkd.train.pictures import AttentionPictures
from vitkd.train.teacher_cache import TeacherCaching

log = logging.getLogger("vitkd")


def run_job(composed: DictConfig, job: Job) -> float | None:
    """Run one job and return what a sweeper may maximise: the best accuracy on validation, if any."""
    start_logging()
    config = parse(composed)
    machine = check_trainer(config.trainer)
    set_matmul_precision(config.matmul_precision)
    if config.compile:
        check_compiler(machine.device)
    warn_of_ignored_settings(config.method)
    given = given_teacher(config.teacher.checkpoint, config.dataset) if config.method.needs_teacher else None
    config.method.check(config.student, given.config if given else config.teacher.model, config)
    with joined(machine.processes, machine.hosts, same_job()):
        path = run_path(config)
        earlier = agree(lambda: earlier_run(path, config))
        if earlier and earlier.state in ("running", "done"):
            return leave_alone(earlier, job)
        agree(lambda: prepare("student", config.student))
        announce(config, given)
        with closing(load_data(config)) as data:
            teacher = given
            if teacher is None and config.method.needs_teacher:
                teacher = obtain_teacher(config, machine.device)
            folder = RunFolder(agree(lambda: earlier.path if earlier else RunFolder.claim(path).path))
            job.folder = str(folder.path)
            metrics = train(config, teacher, data, machine.device, folder)
    if not is_first():
        return None
    print_results(metrics, folder, config.paths.outputs)
    return conclude(job, metrics)


class Earlier(NamedTuple):
    """A run of the same configuration."""

    path: Path
    state: str


def earlier_run(path: Path, config: Config) -> Earlier | None:
    """The run to leave alone or to go on with, if the job is to look for one and there is one."""
    found = RunFolder.latest(path, config.resolved) if goes_on(config) else None
    return Earlier(found.path, found.state) if found else None


def leave_alone(earlier: Earlier, job: Job) -> float | None:
    """Go by what an earlier run of the same configuration found, or let it finish."""
    job.folder = str(earlier.path)
    if earlier.state == "running":
        job.state = "running elsewhere"
        log.info("%s: another process is at work there; left alone", earlier.path)
        return None
    job.state = "done before"
    log.info("%s: done before; resume=null sweep.rerun=all does it again", earlier.path)
    return conclude(job, RunFolder(earlier.path).read_metrics())


def conclude(job: Job, metrics: Mapping[str, Any]) -> float | None:
    """Put a run's figures on its job's record, and return the best accuracy on validation."""
    job.figures = figures_of(metrics)
    best: float | None = metrics["val/acc_best"]
    return best


def announce(config: Config, given: Model | None) -> None:
    """Say what was chosen before anything takes time."""
    dataset = config.dataset
    hint = " (embedded; dataset=cifar100 is the report's)" if dataset.name == "digits" else ""
    size = f"{dataset.image_size}×{dataset.image_size}"
    log.info("dataset: %s, %d classes, %s pixels%s", dataset.name, dataset.num_classes, size, hint)
    if dataset.validate_on == "test":
        log.warning("warning: the best epoch is chosen on the test images; its accuracy flatters")
    if config.method.needs_teacher:
        log.info("teacher: %s", given.config if given else config.teacher.model)
    log.info("student: %s", config.student)


def obtain_teacher(config: Config, device: torch.device) -> Model:
    """The stored teacher of this configuration, trained now if no run has needed it before.

    One that is not to be trained is not stored either.
    """
    own = teacher_run(config)
    if not config.teacher.trained:
        agree(lambda: prepare("teacher", own.student))
        log.info("teacher: left as it is before training (teacher.trained=false), as a control")
        return first_weights(own.seed, own.student)
    check_trainer(own.trainer, "teacher.trainer")
    mark = fingerprint(own, own.dataset.contents(Path(own.paths.data)))
    store = Path(config.paths.outputs, "teachers", own.dataset.name, mark)
    if not store.exists():
        agree(lambda: prepare("teacher", own.student))
    return stored_teacher(store, own.resolved, lambda folder: train_teacher(own, device, folder))


def prepare(group: str, model: ModelConfig) -> None:
    """Fetch what building `model` takes from a network; ConfigError, naming its group, if that fails."""
    try:
        model.prepare()
    except ConfigError as error:
        raise ConfigError(f"{group}.{error}") from error


def train_teacher(own: Config, device: torch.device, folder: RunFolder) -> None:
    """Train a teacher in `folder`, by a run of its own."""
    with closing(load_data(own)) as data:
        train(own, None, data, device, folder)


def load_data(config: Config) -> ImageDataModule:
    """The configuration's data set, read before anything is written, should it turn out to be damaged."""
    data = ImageDataModule(config.dataset, config.paths.data, seed_of(config.seed, ORDER, config.student))
    data.setup()
    return data


def train(
    config: Config, teacher: Model | None, data: ImageDataModule, device: torch.device, folder: RunFolder
) -> dict[str, Any]:
    """Train the configuration's student in `folder`, measure it, and return what `metrics.json` holds.

    If an earlier attempt in `folder` was cut off, training goes on from where that was saved. Of several
    processes the first alone measures and writes; the others return nothing.
    """
    with folder.running(config.resolved):
        if is_first():
            restart_alone(folder, stacks_folder(config.paths.outputs))
        student = first_weights(config.seed, config.student)
        module = build_module(config, student, teacher, facts_of(data))
        teacher_test = measure_teacher(teacher, data, device) if teacher and is_first() else None
        # Now: training may change the precision of its weights.
        about_teacher = describe_teacher(teacher, teacher_test)
        have_maps = teacher is not None and student.attention and teacher.attention
        drawing = pictures(config, data, folder) if have_maps else None
        if module.objective is not None and module.objective.pairs and is_first():
            results.write_pairs(folder, module.objective.pairs)
        # Training draws the same random numbers whatever it took to get here.
        seed_generators(config.seed, DROPOUT, config.student, process=rank())
        if config.compile:
            compile_training(module)
        callbacks = [*([drawing] if drawing else []), *hot_path(config, data)]
        fitted = fit(module, data, folder, config, callbacks)
        metrics = {}
        if is_first():
            if drawing and not folder.pictures.exists():
                # The run was cut off between its last step and here.
                drawing.on_train_end(fitted.trainer, module)
            metrics = measure(config, fitted, about_teacher, teacher_test, data, device, folder)
        wait_for_all()
    return metrics


def measure(
    config: Config,
    fitted: Fitted,
    teacher: Mapping[str, Any],
    teacher_test: Evaluation | None,
    data: ImageDataModule,
    device: torch.device,
    folder: RunFolder,
) -> dict[str, Any]:
    """Measure a trained student on the test split, once, and leave everything in its folder."""
    known = teacher_test and teacher_test.predictions
    batches = data.loader("test", device, rank=0, world_size=1)
    test, predictions = measure_both(fitted.last, fitted.best, batches, device, known)
    save_model(fitted.best, folder.student, {"epoch": str(fitted.metrics["best_epoch"])})
    results.write_predictions(folder, predictions)
    metrics = {
        **test,
        **fitted.metrics,
        **teacher,
        "student/parameters": count_parameters(fitted.last),
        "seed": config.seed,
        "precision/trainer": fitted.trainer.precision,
        **provenance(device),
    }
    folder.write_metrics(metrics)
    conclude_curves(fitted.loggers, config.resolved, config.method.ignores, test)
    return metrics


def measure_teacher(teacher: Model, data: ImageDataModule, device: torch.device) -> Evaluation:
    """Say how good the teacher is before anybody learns from it."""
    test = evaluate(teacher, data.loader("test", device, rank=0, world_size=1), device)
    log.info("teacher: %s on the test split", percent(test.accuracy))
    return test


def describe_teacher(teacher: Model | None, test: Evaluation | None) -> dict[str, Any]:
    """What a student's metrics say of its teacher."""
    return {
        "teacher/test_acc": test and test.accuracy,
        "teacher/parameters": teacher and count_parameters(teacher),
        "teacher/weights": teacher and digest(teacher),
    }


def pictures(config: Config, data: ImageDataModule, folder: RunFolder) -> AttentionPictures:
    """The callback that shows where teacher and student look."""
    batch = data.first("val" if config.dataset.validates else "test", 4)
    return AttentionPictures(
        batch.image,
        batch.label,
        data.class_names,
        config.dataset.mean,
        config.dataset.std,
        every_n_epochs=config.pictures_every_n_epochs,
        path=folder.pictures,
    )


def hot_path(config: Config, data: ImageDataModule) -> list[Callback]:
    """What makes training steps faster: a teacher asked once, steps that are replayed."""
    callbacks: list[Callback] = []
    if config.method.needs_teacher and config.teacher.cache == "auto":
        callbacks.append(TeacherCaching(data, config.teacher.cache_gib))
    if config.cuda_graph == "auto":
        callbacks.append(CudaGraphs())
    return callbacks
