"""What the evidence leaves: a folder of at most 8 files of 16 MiB.

table.md               accuracies by arm, with intervals by Student's t
runs.tar.gz            settings, metrics, curves, state, log of each run; unpacked, `vitkd.report` reads it
evidence.log           the commands, what was measured before each stage, how long each took
study.yaml             the command, the commit, the hardware, the versions
teacher-S.safetensors  the teachers' weights, as many as there is room for

python -m benchmarks.evidence_table DIR makes the table again from runs.tar.gz alone.
"""

import io
import json
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vitkd.report.formatting import mean_interval, mean_std
from vitkd.report.statistics import paired_gain, summarise
from vitkd.runs.files import parse_yaml, read_mapping, write_atomically
from vitkd.runs.folder import RunFolder

REPORTED = {
    "teacher": 46.18,
    "student alone": 41.08,
    "encoder mse 0.00015": 42.86,
    "block mse 0.015": 42.17,
    "block kl 0.5": 43.33,
}
"""the report's accuracies in percent, one run each"""
ALONE, TEACHER, PROTOCOL = "student alone", "teacher", "protocol-"
RUNS, LOG, TABLE = "runs.tar.gz", "evidence.log", "table.md"
KEPT = ("config.yaml", "metrics.json", "metrics.csv", "status.json", "inputs.json", "command.json", "run.log")
MOST_FILES, MOST_BYTES = 8, 16 * 2**20
HEADS = (
    "",
    "seeds",
    "epochs",
    "report",
    "last epoch",
    "gain",
    "best on validation",
    "gain",
    "protocol",
    "gain",
)
LEGEND = """\
Test accuracy in percent, mean ± standard deviation over seeds; gains over the student alone, paired by seed,
with their 95 % interval, over students of one teacher. `report` is its figure of one run of 100 epochs.
`protocol` is how the report reads: the best epoch on the *test* images, trained on all others. It flatters;
it is there for that figure only. An arm's number is alpha, the weight of the class loss. Rows of fewer epochs
than all are what the whole training, whose learning rate is constant, has come to by then."""


class Result(NamedTuple):
    """What one run found, accuracies in percent."""

    stage: str
    arm: str
    seed: int
    epochs: str
    """`100`, or `19 of 100`"""
    last: float
    best: float
    """of the epoch that was best on whatever it validated with"""
    chosen: float | None
    """the accuracy by which that epoch was chosen"""
    device: str
    dataset: str


def result_of(stage: str, config: Mapping[str, Any], metrics: Mapping[str, Any]) -> Result:
    """From a run's config.yaml and metrics.json."""
    epochs, whole = config["trainer"]["max_epochs"], config["dataset"]["max_epochs"]
    accuracies = [metrics[name] for name in ("test/acc_last", "test/acc_best", "val/acc_best")]
    return Result(
        stage,
        TEACHER if stage.endswith(TEACHER) else arm_of(config),
        config["seed"],
        f"{epochs} of {whole}" if epochs < whole else str(epochs),
        *(None if accuracy is None else 100 * accuracy for accuracy in accuracies),
        metrics["hardware/device"],
        config["dataset"]["name"],
    )


def arm_of(config: Mapping[str, Any]) -> str:
    """What a student learned from: `block kl 0.5`."""
    if config["method"]["_target_"].endswith("NoDistillation") or config["alpha"] == 1:
        return ALONE
    names = (config[key]["_target_"].rpartition(".")[2].lower() for key in ("granularity", "loss"))
    return f"{' '.join(names)} {config['alpha']:g}"


def markdown(results: Sequence[Result]) -> str:
    """The table: a row an arm, stage by stage, the report's own arms first."""
    order = {arm: number for number, arm in enumerate(REPORTED)}
    arms = {(r.stage, r.arm) for r in results if not r.stage.startswith(PROTOCOL)}
    ranked = sorted((stage != TEACHER, stage, order.get(arm, len(order)), arm) for stage, arm in arms)
    several = len({stage for stage, _ in arms} - {TEACHER}) > 1
    rows = [HEADS, ["---", *["---:"] * (len(HEADS) - 1)]]
    for is_student, stage, _, arm in ranked:
        name = f"{arm} ({stage})" if several and is_student else arm
        rows.append([name, *cells_of(results, stage, arm)])
    table = joined(rows)
    return f"# Evidence: {' and '.join(sorted({r.device for r in results}))}\n\n{table}\n\n{LEGEND}\n"


def joined(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the second of them the rule below the head, as Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cells_of(results: Sequence[Result], stage: str, arm: str) -> list[str]:
    """An arm's row below `HEADS`, without its name."""
    own = [r for r in results if (r.stage, r.arm) == (stage, arm)]
    columns = columns_of(results, stage, arm)
    alone = [{}] * len(columns) if arm in (ALONE, TEACHER) else columns_of(results, stage, ALONE)
    reported = REPORTED.get(arm) if all(r.dataset == "cifar100" for r in own) else None
    cells = [str(len(columns[0])), " and ".join(dict.fromkeys(r.epochs for r in own)), f"{reported or ''}"]
    for column, baseline in zip(columns, alone, strict=True):
        cells.append(mean_std(summarise([*column.values()])))
        cells.append(mean_interval(paired_gain(column, baseline).difference))
    return cells


def columns_of(results: Sequence[Result], stage: str, arm: str) -> list[dict[int, float]]:
    """Seed → accuracy of the last epoch, the best and by the protocol; of runs alike (alpha=1) one counts."""
    own = [r for r in results if (r.stage, r.arm) == (stage, arm)]
    protocol = [r for r in results if (r.stage, r.arm) == (f"{PROTOCOL}{stage}", arm)]
    chosen = {r.seed: r.chosen for r in protocol if r.chosen is not None}
    return [{r.seed: r.last for r in own}, {r.seed: r.best for r in own}, chosen]


def run_folders(place: Path) -> list[RunFolder]:
    """The runs below a folder."""
    return [RunFolder(path.parent) for path in sorted(place.glob("**/config.yaml"))]


def export(outputs: Path, place: Path) -> str:
    """Write what is worth keeping of `outputs`, each file whole or not at all; returns the table, if any."""
    runs = run_folders(outputs)
    files = {RUNS: packed(runs, outputs), LOG: (outputs / LOG).read_bytes()}
    for run in runs:
        stage = run.path.relative_to(outputs).parts[0]
        if stage.endswith(TEACHER) and run.state == "done":
            files[f"{stage}-{run.read_config()['seed']}.safetensors"] = run.student.read_bytes()
    place.mkdir(parents=True, exist_ok=True)
    room = MOST_FILES - 2  # for the table and study.yaml
    for name, content in files.items():
        if room and len(content) <= MOST_BYTES:
            write_atomically(place / name, content)
            room -= 1
        else:
            print(f"{place / name}: left out, {len(content) / 2**20:.1f} MiB", file=sys.stderr)
    return write_table(place)


def packed(runs: Sequence[RunFolder], outputs: Path, names: Sequence[str] = KEPT) -> bytes:
    """The small files of all runs, done or not, as an archive of folders, without this machine's paths."""
    content, places = io.BytesIO(), {f"{Path.cwd()}/": "", **dict.fromkeys(data_folders(runs), "data")}
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        # All files of one name in a row: they are alike, and gzip sees no further than 32 KiB.
        for path in (run.path / name for name in names for run in runs):
            if path.exists():
                data = path.read_bytes()
                for place, name in places.items() if path.suffix != ".npz" else ():
                    data = data.replace(place.encode(), name.encode())
                member = tarfile.TarInfo(path.relative_to(outputs).as_posix())
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


def data_folders(runs: Sequence[RunFolder]) -> set[str]:
    """Where the runs found their images."""
    found = {read_mapping(run.config, parse_yaml).get("paths", {}).get("data") for run in runs}
    return {folder for folder in found if folder}


def read_results(archive: Path) -> list[Result]:
    """What those of the archive's runs found that are done."""
    with tarfile.open(archive) as opened:
        texts = {name: opened.extractfile(name).read().decode() for name in opened.getnames()}  # type: ignore[union-attr]
    found = []
    for name in (name for name in texts if name.endswith("/metrics.json")):
        run = name.rpartition("/")[0]
        if json.loads(texts[f"{run}/status.json"])["state"] == "done":
            config = parse_yaml(texts[f"{run}/config.yaml"])
            found.append(result_of(run.partition("/")[0], config, json.loads(texts[name])))
    return found


def write_table(place: Path) -> str:
    """Make the table of the archive in `place`; empty if no run is done."""
    results = read_results(place / RUNS)
    text = markdown(results) if results else ""
    write_atomically(place / TABLE, text)
    return text


if __name__ == "__main__":
    print(write_table(Path(sys.argv[1])))
