"""RESULTS.md: prose from benchmarks/RESULTS.md.jinja, every number from the files in benchmarks/evidence.

python -m benchmarks.results_page           writes RESULTS.md
python -m benchmarks.results_page --check   exit code 1 if it is not what would be written
"""

import argparse
import sys
import tarfile
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks import evidence_table, few_labels
from benchmarks.command import ROOT
from benchmarks.studies import EVIDENCE, NOTE, lost, teacher_right
from vitkd.report.comparison import Comparison, Row, compare
from vitkd.report.experiments import find_experiments
from vitkd.report.formatting import mean_interval, mean_std, p_text
from vitkd.report.pages import literal
from vitkd.report.runs import find_runs
from vitkd.report.statistics import Summary, paired_gain, summarise
from vitkd.report.tables import main_columns
from vitkd.runs.files import read_mapping, write_atomically

PAGE = ROOT / "RESULTS.md"
TEMPLATE = "RESULTS.md.jinja"


class Study:
    """A folder of benchmarks/evidence, as its table, its arms by name, and where they come from.

    Args:
        place: the folder, with study.yaml and runs.tar.gz.
        unpacked: an empty folder for the runs.
    """

    def __init__(self, place: Path, unpacked: Path) -> None:
        self.name = place.name
        self.note = read_note(place)
        with tarfile.open(place / evidence_table.RUNS) as archive:
            archive.extractall(unpacked, filter="data")
        self.comparisons = [compare(experiment) for experiment in find_experiments(find_runs([unpacked]))]

    @cached_property
    def rows(self) -> dict[str, Row]:
        """Every arm by its label, those of the largest experiment first."""
        rows: dict[str, Row] = {}
        for comparison in self.comparisons:
            for row in comparison.rows:
                rows.setdefault(row.arm.label, row)
        return rows

    @property
    def table(self) -> str:
        """The arms of the largest experiment as `vitkd.report` shows them."""
        return table_of(self.comparisons[0])

    def arms(self, start: str) -> list[Row]:
        """The arms whose labels start so."""
        return [row for label, row in self.rows.items() if label.startswith(start)]

    def lost(self, label: str) -> dict[int, float]:
        """Seed → test images that the teacher has right and the student wrong, in percent."""
        right = teacher_right(run.path for row in self.rows.values() for run in row.arm.runs.values())
        return {seed: lost(run.path, right) for seed, run in self.rows[label].arm.runs.items()}

    def measured(self, label: str, file: str, *keys: str) -> dict[int, float]:
        """Seed → a number in a file that `vitkd.explain` left."""
        values = {}
        for seed, run in self.rows[label].arm.runs.items():
            content: Any = read_mapping(run.path / "explain" / file)
            for key in keys:
                content = content[key]
            values[seed] = float(content)
        return values


class FewLabels:
    """A folder of benchmarks/evidence that `benchmarks.few_labels` wrote."""

    def __init__(self, place: Path) -> None:
        self.name, self.note = place.name, read_note(place)
        self.results = few_labels.read_csv(place / few_labels.RESULTS)
        self.table = few_labels.markdown(self.results, self.note["test images"])
        self.gains, self.corrected = few_labels.gains_of(self.results)

    def values(self, arm: str, share: str, field: str = "test_last") -> dict[int, float]:
        """Seed → a number of the runs of an arm, in percent."""
        runs = (r for r in self.results if (r.stage, r.arm, r.share) == ("main", arm, share))
        return {run.seed: getattr(run, field) for run in runs}

    def outcomes(self, arm: str, share: str) -> str:
        """`+1.20 [0.81, 1.59], p 0.002`."""
        gain = self.gains[arm, share]
        return f"{mean_interval(gain.difference)}, p {p_text(self.corrected[arm, share])}"

    @property
    def shares(self) -> list[str]:
        """Of the labels, the smallest first."""
        return sorted({result.share for result in self.results}, key=float)


def read_note(place: Path) -> dict[str, Any]:
    """What study.yaml says of a folder's origin."""
    return dict(yaml.safe_load((place / NOTE).read_text("utf-8")))


def table_of(comparison: Comparison) -> str:
    """The main table of `vitkd.report`, as Markdown."""
    columns = main_columns(comparison)
    lines = [
        [column.heading for column in columns],
        ["---" if column.is_text else "---:" for column in columns],
        *([literal(column.cell(row)) for column in columns] for row in comparison.rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def source(study: "Study | FewLabels") -> str:
    """Where a table comes from, as it stands below it."""
    note = study.note
    commands = "\n".join(f"    {command}" for command in note["commands"])
    versions = f"vitkd {note['commit']}, torch {note['versions']['torch']}"
    where = f"[{study.name}](benchmarks/evidence/{study.name})"
    return f"{where}: {note['hardware']}, {versions}, {note['date']}.\n\n{commands}"


def gain(values: Mapping[int, float], others: Mapping[int, float]) -> Summary:
    """The difference of two arms, paired by seed."""
    return paired_gain(values, others).difference


def sides(summary: Summary, value: float) -> str:
    """Whether a mean is shown to be `above` or `below` a value; empty if its interval holds that."""
    assert summary.interval is not None
    above, below = summary.interval.low > value, summary.interval.high < value
    return "above" if above else "below" if below else ""


def make_page() -> str:
    """RESULTS.md."""
    with TemporaryDirectory() as unpacked:
        environment = Environment(
            loader=FileSystemLoader(ROOT / "benchmarks"),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        environment.filters |= {"mean": mean_std, "interval": mean_interval, "p": p_text}
        environment.globals |= {
            "study": cache(lambda name: Study(EVIDENCE / name, Path(unpacked, name))),
            "few_labels": cache(lambda name: FewLabels(EVIDENCE / name)),
            "evidence": lambda name: evidence_table.read_results(EVIDENCE / name / evidence_table.RUNS),
            **{function.__name__: function for function in (source, gain, sides, summarise)},
        }
        return environment.get_template(TEMPLATE).render()


def main(argv: Sequence[str] | None = None) -> int:
    """Write RESULTS.md, or check it; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results_page", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options, page = parser.parse_args(argv), make_page()
    if options.check:
        return int(PAGE.read_text("utf-8") != page)
    write_atomically(PAGE, page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
