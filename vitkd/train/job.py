"""One training job, from a composed configuration to a run folder."""

import logging
from contextlib import closing

from omegaconf import DictConfig

from vitkd.cli.console import Job, print_results, start_logging
from vitkd.cli.jobs import is_multirun
from vitkd.config.computing import compute_as
from vitkd.config.run import Config
from vitkd.process.distributed import agree, is_first, joined
from vitkd.runs.folder import RunFolder
from vitkd.runs.inputs import contents_of, inputs_of, known_inputs
from vitkd.train.plan import Earlier, make_plan
from vitkd.train.student import (
    check_pair,
    load_data,
    obtain_teacher,
    prepare,
    read_data,
    read_given_teacher,
    train_student,
)

log = logging.getLogger("vitkd")


def run_job(composed: DictConfig, job: Job) -> float | None:
    """Run one job and return what a sweeper may maximise: the best accuracy on validation, if any."""
    start_logging()
    plan = make_plan(composed)
    plan.warn()
    config, machine = plan.config, plan.machine
    compute_as(config, machine.device)
    given = read_given_teacher(config)
    check_pair(config, given)
    with joined(machine.processes, machine.hosts, plan.command):
        # All processes must do the same, whatever each has found.
        contents = agree(lambda: contents_of(config))
        earlier = agree(lambda: plan.earlier(known_inputs(config, contents)))
        if earlier and earlier.is_taken:
            return skip(earlier, job, again=repeating(config))
        agree(lambda: prepare("student", config.student))
        with closing(load_data(config)) as data:
            read_data(config, given, data, machine.processes)
            teacher = obtain_teacher(config, given, contents, machine.device)
            inputs = inputs_of(config, data, contents, teacher)
            folder = plan.claim_folder(inputs, earlier)
            job.folder = str(folder.path)
            metrics = train_student(config, teacher, data, machine.device, folder, inputs)
    if not is_first():
        return None
    print_results(metrics, folder, config.outputs)
    return job.take_metrics(metrics)


def repeating(config: Config) -> str:
    """The settings with which a job that is done is run again."""
    settings = {"resume=null": config.resume == "auto", "sweep.rerun=all": is_multirun()}
    return " and ".join(setting for setting, needed in settings.items() if needed)


def skip(earlier: Earlier, job: Job, again: str) -> float | None:
    """Report the metrics of an earlier run that is done, and how to repeat it; leave one that is running."""
    job.folder = str(earlier.path)
    if earlier.state == "running":
        job.state = "running elsewhere"
        log.info("%s: skipped, another process is running it", earlier.path)
        return None
    job.state = "done before"
    log.info("%s: already done; %s runs it again", earlier.path, again)
    return job.take_metrics(RunFolder(earlier.path).read_metrics())
