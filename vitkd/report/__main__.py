"""Compare finished runs over seeds: `python -m vitkd.report outputs`."""

from vitkd.process.start import start

start(__name__)

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from vitkd.errors import ConfigError
from vitkd.process.signals import orderly_stops
from vitkd.report.comparison import compare
from vitkd.report.experiments import find_experiments
from vitkd.report.exports import csv_text, json_text
from vitkd.report.notes import remarks_on, teacher_lines
from vitkd.report.pages import pages
from vitkd.report.runs import find_runs
from vitkd.report.tables import print_report
from vitkd.runs.files import write_atomically

WIDTH_WITHOUT_TERMINAL = 160
"""Characters."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Report on the runs named on the command line; user errors are one line and exit code 2."""
    command = parser()
    options = command.parse_intermixed_args(arguments)
    try:
        with orderly_stops(lambda line: sys.stderr.write(f"error: {line}\n")):
            report(options.folders, options.out or options.folders[0] / "report")
    except ConfigError as error:
        command.exit(2, f"error: {error}\n")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vitkd.report",
        description="Compare finished runs over seeds: tables, verdicts and plots. Trains nothing.",
    )
    parser.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="outputs, the folder of a data set or sweep, or single runs",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: report/ in the first FOLDER")
    return parser


def report(folders: Sequence[Path], out: Path) -> None:
    """Compare the runs below `folders`, print the result and write it into `out`.

    Raises ConfigError if a folder does not exist, if there are no runs, or if `out` cannot be written to.
    """
    runs = find_runs(folders)
    comparisons = [compare(experiment) for experiment in find_experiments(runs)]
    teachers, remarks = teacher_lines(runs), remarks_on(runs, folders)
    contents = {
        "report.csv": csv_text(comparisons),
        "report.json": json_text(comparisons, runs, remarks),
        **pages(comparisons, runs, remarks),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_atomically(out / name, content)
    except OSError as error:
        raise ConfigError(
            f"--out {out}: cannot be written to ({error.strerror}); name a writable folder"
        ) from error
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = WIDTH_WITHOUT_TERMINAL
    print_report(console, comparisons, teachers, remarks)
    console.print(Text(f"\nreport    {out / 'report.html'}, and report.md, .csv and .json"), soft_wrap=True)


if __name__ == "__main__":
    main()
