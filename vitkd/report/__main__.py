"""What a set of runs shows, with error bars: `python -m vitkd.report outputs`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from vitkd.errors import ConfigError
from vitkd.report.arms import experiments_of
from vitkd.report.comparison import compare
from vitkd.report.page import page
from vitkd.report.runs import find_runs
from vitkd.report.tables import csv_text, json_text, markdown, print_report, remarks_on
from vitkd.runs.files import write_atomically

USAGE_ERROR = 2
PLAIN_WIDTH = 160


def main(arguments: Sequence[str] | None = None) -> None:
    """Report on the runs of the command line; a mistake in it ends with one line and exit code 2."""
    options = parser().parse_intermixed_args(arguments)
    try:
        report(options.folders, options.out or options.folders[0] / "report")
    except ConfigError as error:
        Console(stderr=True, highlight=False).print(Text(f"error: {error}"), soft_wrap=True)
        sys.exit(USAGE_ERROR)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python -m vitkd.report",
        description="Compare finished runs over seeds: tables, verdicts and pictures. Trains nothing.",
    )
    found.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="outputs, a data set's folder, a sweep's, or single runs",
    )
    found.add_argument("--out", type=Path, metavar="DIR", help="default: report/ in the first FOLDER")
    return found


def report(folders: Sequence[Path], out: Path) -> None:
    """Read the runs below `folders`, print their comparison and write it into `out`.

    Raises ConfigError for a folder that does not exist, for no runs at all, and for a place that cannot be
    written to.
    """
    runs = find_runs(folders)
    make(out)
    comparisons = [compare(experiment) for experiment in experiments_of(runs)]
    teachers = [run for run in runs if run.is_teacher]
    remarks = remarks_on(runs, folders)
    contents = {
        "report.md": markdown(comparisons, teachers, remarks),
        "report.csv": csv_text(comparisons),
        "report.json": json_text(comparisons, runs, remarks),
        "report.html": page(comparisons, runs, remarks),
    }
    try:
        for name, content in contents.items():
            write_atomically(out / name, content)
    except OSError as error:
        raise ConfigError(
            f"--out {out}: cannot be written ({error.strerror}); name a place that can"
        ) from error
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    print_report(console, comparisons, teachers, remarks)
    console.print(Text(f"\nreport    {out / 'report.html'}, and report.md, .csv and .json"), soft_wrap=True)


def make(out: Path) -> None:
    """The folder `out`, there; ConfigError if it cannot be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--out {out}: no folder can be made there ({error.strerror}); name one that can be written"
        ) from error


if __name__ == "__main__":
    main()
