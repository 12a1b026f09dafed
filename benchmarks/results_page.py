"""RESULTS.md: prose from benchmarks/RESULTS.md.jinja, every number from the files in benchmarks/evidence.

python -m benchmarks.results_page           writes it, its answer into README.md, and docs/results.png
python -m benchmarks.results_page --check   exit code 1 if one of the texts is not what would be written
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
from benchmarks.results_figure import FIGURE, draw
from benchmarks.studies import EVIDENCE, NOTE, lost, teacher_right
from vitkd.report.comparison import Row, compare
from vitkd.report.experiments import find_experiments
from vitkd.report.formatting import MINUS, mean_interval, mean_std
from vitkd.report.pages import markdown_table
from vitkd.report.runs import find_runs
from vitkd.report.statistics import Summary, paired_gain, summarise
from vitkd.runs.files import read_mapping, write_atomically

PAGE, TEMPLATE = ROOT / "RESULTS.md", "RESULTS.md.jinja"
README, ANSWER = ROOT / "README.md", "answer.md.jinja"
DIGITS = "few-labels-digits"
SEED = "$seed"  # of commands that are run for each of the seeds
START, END = "<!-- made by `make evidence` -->\n", "<!-- until here -->\n"


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
        return markdown_table(self.comparisons[0])

    @property
    def arms(self) -> list[Row]:
        """Those of the largest experiment that can be compared with the student alone."""
        return [row for row in self.comparisons[0].rows if row.gain]

    def alone(self, **settings: object) -> Summary:
        """The accuracy of the student alone in the one experiment with these settings; `__` is a dot.

        Raises KeyError if there is none, or another.
        """
        wanted = {name.replace("__", "."): value for name, value in settings.items()}
        found = [c.rows[0].last for c in self.comparisons if wanted.items() <= c.experiment.settings.items()]
        if len(found) != 1:
            raise KeyError(f"{self.name}: {len(found)} experiments with {wanted}")
        return found[0]

    def count(self, outcome: str) -> int:
        """How many of `arms` have that verdict: real, hurts, no evidence."""
        return sum(row.verdict.outcome == outcome for row in self.arms)

    @property
    def students(self) -> int:
        """How many were trained for all of these runs, in one stack."""
        (students,) = {run.stacked for row in self.arms for run in row.arm.runs.values()}
        assert students is not None
        return students

    @property
    def seconds(self) -> float:
        """For which its students trained, all together as one stack."""
        return max(run.wall_seconds or 0.0 for row in self.arms for run in row.arm.runs.values())

    def accuracies(self, label: str) -> dict[int, float]:
        """Seed → test accuracy of the last epoch, in percent."""
        return self.rows[label].arm.metric("acc_last")

    def gains_over(self, label: str) -> str:
        """Every other arm with its gain over the one of that label, by what its name has beyond that."""
        others = (row.arm.label for row in self.arms if row.arm.label != label)
        return "; ".join(
            f"`{other.removeprefix(f'{label}, ')}`"
            f" {mean_interval(gain(self.accuracies(other), self.accuracies(label)))}"
            for other in others
        )

    def lost(self, label: str) -> dict[int, float]:
        """Seed → test images that the teacher has right and the student wrong, in percent."""
        right = teacher_right(run.path for row in self.rows.values() for run in row.arm.runs.values())
        return {seed: lost(run.path, right) for seed, run in self.rows[label].arm.runs.items()}

    @cached_property
    def teacher_accuracy(self) -> float:
        """That of the teacher that the runs learned from, in percent."""
        (accuracy,) = {run.teacher_acc for row in self.arms for run in row.arm.runs.values()}
        assert accuracy is not None
        return accuracy

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
        self.shares = few_labels.shares_of(self.results)
        """of the labels, the smallest first"""
        self.gains, self.corrected = few_labels.gains_of(few_labels.cells_of(self.results))

    def values(self, arm: str, share: str, field: str = "test_last") -> dict[int, float]:
        """Seed → a number of the runs of an arm, in percent."""
        runs = (r for r in self.results if (r.stage, r.arm, r.share) == ("main", arm, share))
        return {run.seed: getattr(run, field) for run in runs}


def read_note(place: Path) -> dict[str, Any]:
    """What study.yaml says of a folder's origin."""
    return dict(yaml.safe_load((place / NOTE).read_text("utf-8")))


def source(study: "Study | FewLabels") -> str:
    """Where a table comes from, as it stands below it."""
    note = study.note
    commands = "\n".join(command.replace("{seed}", SEED) for command in note["commands"])
    versions = f"vitkd {note['commit']}, torch {note['versions']['torch']}"
    where = f"[{study.name}](benchmarks/evidence/{study.name})"
    return f"{where}: {note['hardware']}, {versions}, {note['date']}.\n\n```bash\n{commands}\n```"


def gain(values: Mapping[int, float], others: Mapping[int, float]) -> Summary:
    """The difference of two arms, paired by seed."""
    return paired_gain(values, others).difference


def size(values: Mapping[int, float], decimals: int) -> str:
    """The mean over seeds."""
    mean = summary(values).mean
    assert mean is not None
    return f"{mean:.{decimals}f}".replace("-", MINUS)


def summary(values: Mapping[int, float]) -> Summary:
    """Mean and interval over seeds."""
    return summarise([*values.values()])


def sides(summary: Summary, value: float) -> str:
    """Whether a mean is shown to be `above` or `below` a value; empty if its interval holds that."""
    assert summary.interval is not None
    above, below = summary.interval.low > value, summary.interval.high < value
    return "above" if above else "below" if below else ""


def make_texts() -> dict[Path, str]:
    """RESULTS.md, and README.md with the answer between its marks."""
    with TemporaryDirectory() as unpacked:
        environment = Environment(
            loader=FileSystemLoader(ROOT / "benchmarks"),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            extensions=["jinja2.ext.do"],
        )
        environment.filters |= {"mean": mean_std, "interval": mean_interval, "size": size, "sides": sides}
        environment.globals |= {
            "study": cache(lambda name: Study(EVIDENCE / name, Path(unpacked, name))),
            "few_labels": cache(lambda name: FewLabels(EVIDENCE / name)),
            "digits": FewLabels(EVIDENCE / DIGITS),
            "has": lambda name: (EVIDENCE / name).exists(),
            "percent": lambda share: f"{100 * float(share):g} %",
            "reported": evidence_table.REPORTED,
            **{function.__name__: function for function in (source, gain, summary)},
        }
        answer, page = (environment.get_template(name).render() for name in (ANSWER, TEMPLATE))
    before, _, rest = README.read_text("utf-8").partition(START)
    _, _, after = rest.partition(END)
    return {PAGE: page, README: f"{before}{START}{answer}{END}{after}"}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, the answer and the picture, or check the texts; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.results_page",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    options, texts = parser.parse_args(argv), make_texts()
    if options.check:
        return int(any(path.read_text("utf-8") != text for path, text in texts.items()))
    for path, text in texts.items():
        write_atomically(path, text)
    draw(FewLabels(EVIDENCE / DIGITS), ROOT / FIGURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
