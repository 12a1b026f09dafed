"""Train a student, alone or beside a teacher: `python -m vitkd.train granularity=block loss=kl alpha=0.5`."""

import gc

from vitkd.process.start import start

start(__name__)
# Imports make hardly any garbage, and collecting it takes half a second of four.
COLLECTS = gc.isenabled()
gc.disable()

from vitkd.cli.command import run_command
from vitkd.train import job

if COLLECTS:
    gc.enable()


def main() -> None:
    """Run the job, or all jobs, of the command line."""
    run_command("train", job.run_job)


if __name__ == "__main__":
    main()
