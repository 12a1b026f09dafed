"""Does it help to learn where a teacher looks, when labels are few?

python -m benchmarks.few_labels digits --seeds 40
python -m benchmarks.few_labels fashion_mnist --shares 0.01,0.03,0.1,1 --steps 4000 trainer=gpu

One teacher learns all labels, students a share of them (`dataset.train_fraction`), by each of the arms below.
All take the same number of steps, so that few labels do not mean little training, and validate ten times.
Each arm's alpha is the one of ALPHAS that is best on the validation images (mean of the last epoch, by seeds
of their own); a control has that of `block kl`. Then all seeds of an arm train as a stack.

Prints every command, and writes into --export results.csv (one line a run), table.md, and study.yaml, which
says where both come from. Run again, it does what is missing. KEY=VALUE goes to every command. The exit code
is that of the first command that fails.
"""

import argparse
import csv
import io
import json
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from statistics import fmean

from benchmarks.command import as_typed, environment, train_command
from benchmarks.evidence_table import joined, run_folders
from benchmarks.evidence_time import compose
from benchmarks.studies import head, lost, teacher_accuracy, teacher_right, write_note
from vitkd.cli.console import start_logging
from vitkd.data import ImageDataModule
from vitkd.errors import ConfigError
from vitkd.report.formatting import count, mean_interval, mean_std, p_text
from vitkd.report.statistics import Gain, paired_gain, summarise
from vitkd.runs.files import write_atomically
from vitkd.statistics import holm

ALONE, COPY = "student alone", "copied maps"
ATTENTION = {
    f"{granularity} {loss}": ("method=attention", f"granularity={granularity}", f"loss={loss}")
    for granularity in ("block", "encoder")
    for loss in ("kl", "mse")
}
ALPHAS = ("0.015", "0.15", "0.5", "0.85")
LEARN = {**ATTENTION, "relation": ("method=relation",), "logit": ("method=logit",)}
"""arms that learn from the teacher at an alpha to be chosen"""
CONTROLS = {
    "other images' maps": (*ATTENTION["block kl"], "method.control=shuffled"),
    "uniform maps": (*ATTENTION["block kl"], "method.control=uniform"),
    "untrained teacher": (*ATTENTION["block kl"], "teacher.trained=false", "teacher.seed=${seed}"),
}
"""arms at the alpha of `block kl`"""
FIXED = {ALONE: ("method=none",), COPY: ("method=copy",)}
ARMS = {**FIXED, **LEARN, **CONTROLS}
FIRST_PILOT = 1000
VALIDATIONS = 10
RESULTS, TABLE = "results.csv", "table.md"
Cell = tuple[str, str]
LEGEND = """\
Test accuracy of the last epoch in percent, mean ± standard deviation over seeds; below it the gain over the
student alone, paired by seed, with its 95 % interval by Student's t, what that is in images, and p after
Holm's correction over the whole table. Each column has its own alphas: compare a control with `block kl` in
its column, not across columns. Copied maps need the teacher at test time: a reference, not an alternative.
"""


@dataclass(frozen=True)
class Result:
    """One run; accuracies in percent."""

    stage: str
    """pilot or main"""
    share: str
    arm: str
    alpha: str
    seed: int
    test_last: float
    test_best: float
    val_last: float
    lost: float
    """test images that the trained teacher has right and the student wrong"""


def run_share(options: Namespace, share: str, epochs: int) -> None:
    """Choose alphas and train all arms on a share of the labels, as far as that is missing."""
    pilots = range(FIRST_PILOT, FIRST_PILOT + options.pilots)
    for arm, own in LEARN.items():
        train(options, epochs, ("pilot", share, arm), own, ALPHAS, pilots)
    alphas = chosen_alphas(read_results(options), share)
    for arm, own in ARMS.items():
        alpha = alphas.get(arm, alphas["block kl"] if arm in CONTROLS else "0.5")
        train(options, epochs, ("main", share, arm), own, [alpha], range(options.seeds))


def check_same(options: Namespace) -> None:
    """ConfigError if the folder holds the runs of other settings; otherwise it is noted which it holds."""
    asked = " ".join((f"--steps {options.steps}", *options.overrides))
    note = options.outputs / f"{options.dataset}.txt"
    if note.exists() and (before := note.read_text("utf-8")) != asked:
        raise ConfigError(
            f"--outputs {options.outputs}: holds runs of {before}, not of {asked}; name another"
        )
    note.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(note, asked)


def facts_of(options: Namespace, share: str) -> tuple[int, int]:
    """How many batches an epoch has, and how many images the test split."""
    config = compose([f"dataset={options.dataset}", *shared(options), f"dataset.train_fraction={share}"])
    with closing(ImageDataModule(config.dataset, config.paths.data, config.seed)) as data:
        return len(data.loader("train", "cpu")), data.counts["test"]


def shared(options: Namespace) -> tuple[str, ...]:
    """The settings of every command, of teachers too."""
    return (f"paths.outputs={options.outputs}", "pictures_every_n_epochs=0", *options.overrides)


def train(
    options: Namespace,
    epochs: int,
    name: tuple[str, str, str],
    own: Sequence[str],
    alphas: Sequence[str],
    seeds: Sequence[int],
) -> None:
    """Run one command, if any of its runs is missing; SystemExit if it fails.

    Args:
        name: stage, share and arm.
    """
    place = options.outputs / options.dataset
    folders = [place / folder_of(*name, alpha, str(seed)) for alpha, seed in product(alphas, seeds)]
    if all((folder / "metrics.json").exists() for folder in folders):
        return
    command = train_command(
        *("-m", "hydra/launcher=stacked", f"dataset={options.dataset}", *shared(options), *own),
        *(f"name={folder_of(*name, '${alpha}', '${seed}')}", f"dataset.train_fraction={name[1]}"),
        *(f"trainer.max_epochs={epochs}", f"trainer.check_val_every_n_epoch={max(epochs // VALIDATIONS, 1)}"),
        *(f"alpha={','.join(alphas)}", f"seed={','.join(map(str, seeds))}"),
    )
    print(f"python {shlex.join(command[1:])}", flush=True)
    code = subprocess.run(command, env=environment(), stdout=subprocess.DEVNULL, check=False).returncode
    if code:
        sys.exit(code)


def folder_of(stage: str, share: str, arm: str, alpha: str, seed: str) -> str:
    """The name of a run's folder."""
    return f"{stage}_{share}_{plain(arm)}_{alpha}_{seed}"


def plain(arm: str) -> str:
    """An arm's name as part of a folder's."""
    return arm.replace(" ", "-").replace("'", "")


def chosen_alphas(results: Sequence[Result], share: str) -> dict[str, str]:
    """By arm the alpha that is best on validation; the largest of several."""
    pilot = [result for result in results if (result.stage, result.share) == ("pilot", share)]
    return {
        arm: max(
            ALPHAS,
            key=lambda alpha: (
                fmean(r.val_last for r in pilot if (r.arm, r.alpha) == (arm, alpha)),
                float(alpha),
            ),
        )
        for arm in LEARN
    }


def read_results(options: Namespace) -> list[Result]:
    """What all runs found that are done."""
    arms = {plain(arm): arm for arm in ARMS}
    folders = sorted((options.outputs / options.dataset).glob("*_*_*_*_*/metrics.json"))
    untrained = plain("untrained teacher")
    right = teacher_right(path.parent for path in folders if untrained not in path.parent.name)
    found = []
    for path in folders:
        metrics = json.loads(path.read_text("utf-8"))
        stage, share, arm, alpha, seed = path.parent.name.split("_")
        percent = (100 * metrics[key] for key in ("test/acc_last", "test/acc_best", "val/acc_last"))
        place = (stage, share, arms[arm], alpha, int(seed))
        found.append(Result(*place, *percent, lost(path.parent, right)))
    return found


def read_csv(path: Path) -> list[Result]:
    """The results in a file that `write` left."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [*csv.DictReader(file)]
    types = {field.name: field.type for field in fields(Result)}
    return [Result(**{name: types[name](value) for name, value in row.items()}) for row in rows]


def markdown(results: Sequence[Result], test_images: int) -> str:
    """The table: a row an arm, a column a share."""
    shares, cells = shares_of(results), cells_of(results)
    gains, corrected = gains_of(cells)
    rows = [
        ["", *(f"{100 * float(share):g} % of the labels" for share in shares)],
        ["---"] * (1 + len(shares)),
    ]
    for arm in ARMS:
        row = [arm]
        for share in shares:
            values = cells[arm, share]
            text = mean_std(summarise([*values.values()]))
            if (arm, share) in gains:
                text += f"<br>{in_words(gains[arm, share], corrected[arm, share], test_images)}"
            row.append(text)
        rows.append(row)
    return f"{joined(rows)}\n\n{chosen_in_words(results)}\n\n{LEGEND}\n"


def shares_of(results: Sequence[Result]) -> list[str]:
    """The shares of the labels that the main stage has students of, the smallest first."""
    return sorted({result.share for result in results if result.stage == "main"}, key=float)


def cells_of(results: Sequence[Result]) -> dict[Cell, dict[int, float]]:
    """Arm and share → seed → test accuracy, of the runs of the main stage."""
    main = [result for result in results if result.stage == "main"]
    return {
        (arm, share): {r.seed: r.test_last for r in main if (r.arm, r.share) == (arm, share)}
        for arm, share in product(ARMS, shares_of(main))
    }


def gains_of(
    cells: Mapping[Cell, Mapping[int, float]],
) -> tuple[dict[Cell, Gain], dict[Cell, float | None]]:
    """Arm and share → gain over the student alone, and its p after Holm's correction over all of them."""
    gains = {
        (arm, share): paired_gain(values, cells[ALONE, share])
        for (arm, share), values in cells.items()
        if arm != ALONE and values
    }
    return gains, dict(zip(gains, holm([gain.p for gain in gains.values()]), strict=True))


def in_words(gain: Gain, p_holm: float | None, test_images: int) -> str:
    """`+1.20 [0.81, 1.59], 4 images, p 0.002`."""
    if gain.difference.mean is None:
        return ""
    images = count(round(abs(gain.difference.mean) / 100 * test_images), "image")
    return f"{mean_interval(gain.difference)}, {images}, p {p_text(p_holm)}"


def chosen_in_words(results: Sequence[Result]) -> str:
    """Which alpha each arm has at each share."""
    main, shares = [result for result in results if result.stage == "main"], shares_of(results)
    lines = []
    for arm in LEARN:
        alphas = [next((r.alpha for r in main if (r.arm, r.share) == (arm, s)), "–") for s in shares]
        lines.append(f"`{arm}` {', '.join(alphas)}")
    percent = ", ".join(f"{100 * float(share):g} %" for share in shares)
    return f"Alpha by validation, at {percent}: {'; '.join(lines)}."


def write(results: Sequence[Result], test_images: int, place: Path) -> str:
    """Write results.csv and table.md, each whole or not at all; returns the table."""
    table, text = markdown(results, test_images), io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Result)])
    writer.writeheader()
    writer.writerows(asdict(result) for result in results)
    place.mkdir(parents=True, exist_ok=True)
    write_atomically(place / RESULTS, text.getvalue())
    write_atomically(place / TABLE, table)
    return table


def read_arguments(argv: Sequence[str] | None) -> Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.few_labels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", help="digits, mnist, fashion_mnist, …")
    parser.add_argument("--seeds", type=int, default=10, help="of each arm (10)")
    parser.add_argument("--pilots", type=int, default=5, help="seeds by which an alpha is chosen (5)")
    parser.add_argument("--shares", default="0.03,0.1,0.3,1", help="of the labels (0.03,0.1,0.3,1)")
    parser.add_argument("--steps", type=int, default=400, help="of each student (400)")
    parser.add_argument("--outputs", type=Path, metavar="DIR", help="run folders (outputs/few-labels)")
    parser.add_argument("--export", type=Path, metavar="DIR", help="results (OUTPUTS/export)")
    parser.add_argument("--commit", help="where there is no .git")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for every command")
    options = parser.parse_intermixed_args(argv)
    options.shares = options.shares.split(",")
    options.outputs = options.outputs or Path("outputs", "few-labels")
    options.export = options.export or options.outputs / "export"
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, print the table; the exit code."""
    options = read_arguments(argv)
    start_logging()
    try:
        batches, test_images = zip(*(facts_of(options, share) for share in options.shares), strict=True)
        check_same(options)
        for share, count in zip(options.shares, batches, strict=True):
            run_share(options, share, max(round(options.steps / count), 1))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(write(read_results(options), test_images[0], options.export))
    runs = run_folders(options.outputs / options.dataset)
    commands = [as_typed("benchmarks.few_labels", argv)]
    facts = {"test images": test_images[0], "teacher": teacher_accuracy(runs)}
    write_note(options.export, commands, runs, options.commit or head(), facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
