"""The studies behind RESULTS.md: runs their commands and keeps what is small of their runs.

python -m benchmarks.studies                      lists them
python -m benchmarks.studies granularities-digits
python -m benchmarks.studies --keep-only widths-mnist

The commands of benchmarks/studies.yaml are run one after the other; what is done is not run again. Then
benchmarks/evidence/NAME has runs.tar.gz, which `vitkd.report` reads when it is unpacked, and study.yaml: the
commands, the commit, the hardware, and the versions. The exit code is that of the first command that fails.
"""

import argparse
import shlex
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.command import ROOT, environment
from benchmarks.evidence_table import KEPT, RUNS, packed, run_folders
from vitkd.runs.files import read_mapping, write_atomically
from vitkd.runs.folder import RunFolder

STUDIES = ROOT / "benchmarks" / "studies.yaml"
EVIDENCE = ROOT / "benchmarks" / "evidence"
NOTE = "study.yaml"
SEEDS = range(10)
MEASURED = ("test_predictions.npz", "explain/fidelity.json", "explain/metrics.json")
VERSIONS = ("vitkd", "python", "torch", "lightning")


def commands_of(name: str, outputs: Path) -> list[str]:
    """The commands of a study whose runs go into `outputs`; some may hold {seed}."""
    studies = yaml.safe_load(STUDIES.read_text("utf-8"))
    return [command.replace("{outputs}", str(outputs)) for command in studies[name]]


def for_each_seed(commands: Iterable[str]) -> Iterator[str]:
    """The commands, those with {seed} once for each of the seeds."""
    for command in commands:
        for seed in SEEDS if "{seed}" in command else [0]:
            yield command.replace("{seed}", str(seed))


def run(commands: Sequence[str], done: Path) -> None:
    """Run the commands that `done` does not list; SystemExit if one fails."""
    before = done.read_text("utf-8").splitlines() if done.exists() else []
    for command in (each for each in for_each_seed(commands) if each not in before):
        print(command, flush=True)
        program, *arguments = shlex.split(command)
        assert program == "python", command
        ended = subprocess.run([sys.executable, *arguments], env=environment(), check=False)
        if ended.returncode:
            sys.exit(ended.returncode)
        done.parent.mkdir(parents=True, exist_ok=True)
        with done.open("a", encoding="utf-8") as file:
            file.write(f"{command}\n")


def keep(commands: Sequence[str], outputs: Path, place: Path, commit: str) -> None:
    """Write runs.tar.gz and study.yaml into `place`."""
    runs = [run for run in run_folders(outputs) if run.state == "done"]
    place.mkdir(parents=True, exist_ok=True)
    write_atomically(place / RUNS, packed(runs, outputs, (*KEPT, *MEASURED)))
    write_note(place, commands, runs, commit)


def write_note(
    place: Path,
    commands: Sequence[str],
    runs: Sequence[RunFolder],
    commit: str,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write study.yaml: where the numbers in `place` come from, and other facts on them."""
    origin = {"commands": [*commands], "commit": commit, "date": time.strftime("%Y-%m-%d")}
    note = origin | made_by(runs) | dict(facts or {})
    write_atomically(place / NOTE, yaml.safe_dump(note, sort_keys=False, width=100, allow_unicode=True))


def made_by(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """The hardware and the versions that `runs` were trained with; several where they differ."""
    metrics = [read_mapping(run.metrics) for run in runs]
    hardware = sorted({f"{m['hardware/cpu_count']} cores, {m['hardware/device']}" for m in metrics})
    versions = {
        name: ", ".join(sorted({str(m[f"versions/{name}"]) for m in metrics if f"versions/{name}" in m}))
        for name in VERSIONS
    }
    return {"hardware": " and ".join(hardware), "versions": versions}


def teacher_right(runs: Iterable[Path]) -> np.ndarray:
    """[test images] bool: those that the teacher of the first run that has one answers rightly."""
    for run in runs:
        with np.load(RunFolder(run).predictions) as predictions:
            if "teacher" in predictions:
                return predictions["teacher"] == predictions["labels"]
    raise ValueError("no run has a teacher")


def teacher_accuracy(runs: Iterable[RunFolder]) -> float | None:
    """The highest test accuracy, in percent, of the teachers of `runs`: that of the one that was trained."""
    found = (read_mapping(run.metrics).get("teacher/test_acc") for run in runs)
    return max((round(100 * accuracy, 4) for accuracy in found if accuracy is not None), default=None)


def lost(run: Path, right: np.ndarray) -> float:
    """Test images that the teacher has `right` and the run's student wrong at its end, in percent of all."""
    with np.load(RunFolder(run).predictions) as predictions:
        return 100 * float(np.mean(right & (predictions["last"] != predictions["labels"])))


def head() -> str:
    """The checkout's commit; `+ changes` if it has any."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    status = subprocess.run(
        [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False
    )
    return commit.stdout.strip() + (" + changes" if status.stdout else "")


def read_arguments(argv: Sequence[str] | None) -> Namespace:
    """The command line."""
    names = [*yaml.safe_load(STUDIES.read_text("utf-8"))]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    parser.add_argument("--keep-only", action="store_true", help="run nothing, keep what is done")
    parser.add_argument("--commit", help="where there is no .git")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.names if name not in names]:
        parser.error(f"{', '.join(unknown)}: no such study; there are {', '.join(names)}")
    if not options.names:
        print("\n".join(names))
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Run studies and keep what they found."""
    options = read_arguments(argv)
    for name in options.names:
        outputs = Path("outputs", "studies", name)
        commands = commands_of(name, outputs)
        if not options.keep_only:
            run(commands, outputs / "done.txt")
        keep(commands, outputs, EVIDENCE / name, options.commit or head())


if __name__ == "__main__":
    main()
