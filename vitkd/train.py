"""Train a student, alone or beside a teacher: `python -m vitkd.train granularity=block loss=kl alpha=0.5`."""

import logging
import math
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from vitkd.cli import overridden, run_command, run_path, warn_of_ignored_settings
from vitkd.config import Config, parse, teacher_run
from vitkd.data import ImageDataModule
from vitkd.distill.modules import DistillModule
from vitkd.models import ViT, count_parameters, digest, save_model
from vitkd.runs import results
from vitkd.runs.console import Job, describe_model, percent, print_jobs, print_results, start_logging
from vitkd.runs.evaluation import Evaluation, evaluate
from vitkd.runs.folder import RunFolder
from vitkd.runs.pictures import AttentionPictures
from vitkd.runs.provenance import provenance
from vitkd.runs.seeding import DROPOUT, ORDER, WEIGHTS, seed_generators, seed_of
from vitkd.runs.teacher_store import fingerprint, given_teacher, stored_teacher
from vitkd.runs.training import build_trainer, check_trainer, conclude_curves, fit

log = logging.getLogger("vitkd")


def main() -> None:
    """Run the job, or all jobs, of the command line."""
    jobs: list[Job] = []
    try:
        run_command("train", lambda composed: run_job(composed, jobs))
    finally:
        print_jobs(jobs)


def run_job(composed: DictConfig, jobs: list[Job]) -> float:
    """Run one job and return the accuracy that a sweeper may maximise: the best on validation, if any."""
    start_logging()
    config = parse(composed)
    check_trainer(config.trainer)
    warn_of_ignored_settings(config.method)
    given = given_teacher(config.teacher.checkpoint, config.dataset) if config.method.needs_teacher else None
    config.method.check(config.student, given.config if given else config.teacher.model, config)
    announce(config, given)
    with closing(load_data(config)) as data:
        teacher = (given or obtain_teacher(config)) if config.method.needs_teacher else None
        folder = RunFolder.claim(run_path(config))
        metrics = train(config, teacher, data, folder)
    print_results(metrics, folder, config.paths.outputs)
    jobs.append(Job(overridden(), metrics, folder))
    best = metrics["val/acc_best"]
    return math.nan if best is None else float(best)


def announce(config: Config, given: ViT | None) -> None:
    """Say what was chosen before anything takes time."""
    dataset = config.dataset
    hint = " (embedded; dataset=cifar100 is the report's)" if dataset.name == "digits" else ""
    size = f"{dataset.image_size}×{dataset.image_size}"
    log.info("dataset: %s, %d classes, %s pixels%s", dataset.name, dataset.num_classes, size, hint)
    if config.method.needs_teacher:
        log.info("teacher: %s", describe_model(given.config if given else config.teacher.model))
    log.info("student: %s", describe_model(config.student))


def obtain_teacher(config: Config) -> ViT:
    """The stored teacher of this configuration, trained now if no run has needed it before."""
    own = teacher_run(config)
    mark = fingerprint(own, own.dataset.contents(Path(own.paths.data)))
    store = Path(config.paths.outputs, "teachers", own.dataset.name, mark)
    return stored_teacher(store, lambda folder: train_teacher(own, folder))


def train_teacher(own: Config, folder: RunFolder) -> None:
    """Train a teacher in `folder`, by a run of its own."""
    with closing(load_data(own)) as data:
        train(own, None, data, folder)


def load_data(config: Config) -> ImageDataModule:
    """The configuration's data set, read before anything is written, should it turn out to be damaged."""
    data = ImageDataModule(config.dataset, config.paths.data, seed_of(config.seed, ORDER, config.student))
    data.setup()
    return data


def train(config: Config, teacher: ViT | None, data: ImageDataModule, folder: RunFolder) -> dict[str, Any]:
    """Train the configuration's student in `folder`, measure it, and return what `metrics.json` holds."""
    with folder.running(config.resolved):
        torch.use_deterministic_algorithms(False)  # Lightning switches it on for a job, and never off.
        seed_generators(config.seed, WEIGHTS, config.student)
        student = config.student.build()
        module = config.method.module(student, teacher, config, lambda: data.first("train", 64).image)
        trainer = build_trainer(folder, config, [pictures(config, data, folder)] if teacher else [])
        device = trainer.strategy.root_device
        teacher_test = measure_teacher(teacher, data, device)
        about_teacher = {
            "teacher/test_acc": teacher_test and teacher_test.accuracy,
            "teacher/parameters": teacher and count_parameters(teacher),
            "teacher/weights": teacher and digest(teacher),
        }
        if isinstance(module, DistillModule):
            results.write_pairs(folder, module.transfer.pairs)
        # Training draws the same random numbers whatever it took to get here.
        seed_generators(config.seed, DROPOUT, config.student)
        fitted = fit(trainer, module, data, folder)
        known = teacher_test and teacher_test.predictions
        test, predictions = results.measure(
            fitted.last, fitted.best, data.loader("test", device), device, known
        )
        save_model(fitted.best, folder.student, {"epoch": str(fitted.metrics["best_epoch"])})
        results.write_predictions(folder, predictions)
        metrics = {
            **test,
            **fitted.metrics,
            **about_teacher,
            "student/parameters": count_parameters(student),
            "seed": config.seed,
            **provenance(device),
        }
        folder.write_metrics(metrics)
        conclude_curves(trainer, config.resolved, config.method.ignores, test)
    return metrics


def measure_teacher(teacher: ViT | None, data: ImageDataModule, device: torch.device) -> Evaluation | None:
    """Say how good the teacher is before anybody learns from it."""
    if teacher is None:
        return None
    test = evaluate(teacher, data.loader("test", device), device)
    log.info("teacher: %s on the test split", percent(test.accuracy))
    return test


def pictures(config: Config, data: ImageDataModule, folder: RunFolder) -> AttentionPictures:
    """The callback that shows where teacher and student look."""
    batch = data.first("val" if config.dataset.val_fraction else "test", 4)
    return AttentionPictures(
        batch.image,
        batch.label,
        data.class_names,
        config.dataset.mean,
        config.dataset.std,
        every_n_epochs=config.pictures_every_n_epochs,
        path=folder.pictures,
    )


if __name__ == "__main__":
    main()
