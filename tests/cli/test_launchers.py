"""Every way to run a sweep brings its jobs to their end, and says what to do where its plugin is missing."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

TINY = [
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "trainer.limit_train_batches=2",
    "teacher.trainer.limit_train_batches=2",
    "+trainer.limit_val_batches=1",
    "student.depth=1",
    "teacher.depth=1",
    "teacher.max_epochs=1",
    "pictures_every_n_epochs=0",
]

# As much of a cluster as submitit sees of it: one node, whose every job runs at once, again when requeued.
SLURM = {
    "sbatch": """
        cp "$1" "$CLUSTER/batch"
        last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\)%.*/\\1/p' "$1")
        for task in $(seq 0 "$last"); do
            (
                export SLURM_JOB_ID=$((7 + task)) SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$task
                export SLURM_JOB_NAME=train SLURM_JOB_NUM_NODES=1 SLURM_NTASKS=1 SLURM_JOB_NODELIST=node
                export SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
                bash "$1"
                while rm "$CLUSTER/7_$task"; do bash "$1"; done
            ) > "$CLUSTER/log$task" 2>&1 &
        done
        echo Submitted batch job 7""",
    "srun": 'until [[ "$1" == */python* ]]; do shift; done; exec "$@"',
    "scontrol": 'touch "$CLUSTER/$2"; echo "$@" >> "$CLUSTER/calls"',
    "sacct": "printf 'JobID|State|NodeList\\n7_0|RUNNING|node\\n7_1|RUNNING|node\\n'",
}


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Path:
    """A folder in which a cluster keeps its batch script, log and the calls that it has got."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    for name, script in SLURM.items():
        program = folder / name
        program.write_text(f"#!/bin/bash\n{script}\n")
        program.chmod(0o755)
    monkeypatch.setenv("CLUSTER", str(folder))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.fixture
def no_plugins() -> Iterator[None]:
    """As Hydra is without them."""
    Plugins.instance()
    groups = ConfigStore.instance().repo["hydra"]
    before = {name: dict(groups[name]) for name in ("launcher", "sweeper")}
    groups["launcher"].clear()
    groups["sweeper"].pop("optuna.yaml", None)
    yield
    for name, options in before.items():
        groups[name].update(options)


def runs(folder: Path) -> list[Path]:
    return [status.parent for status in (folder / "outputs" / "digits").glob("*/status.json")]


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def losses_done(folder: Path) -> list[str]:
    """The loss of each run, all of which must have ended well."""
    assert {read(run / "status.json")["state"] for run in runs(folder)} == {"done"}
    assert all(read(run / "metrics.json")["test/acc_last"] > 0 for run in runs(folder))
    configs = [yaml.safe_load((run / "config.yaml").read_text()) for run in runs(folder)]
    return sorted(config["loss"]["_target_"].rpartition(".")[2] for config in configs)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "local"])
def test_a_launcher_runs_every_job(launcher, process, tmp_path):
    ended = process("train", "-m", f"hydra/launcher={launcher}", "loss=mse,kl", *TINY, cwd=tmp_path)

    assert ended.code == 0, ended.err
    assert "Warning" not in ended.err
    assert losses_done(tmp_path) == ["KL", "MSE"]


@pytest.mark.slow
def test_joblibs_workers_have_a_fair_share_of_the_cores(process, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    ended = process("train", "-m", "hydra/launcher=joblib", "loss=mse,kl", *TINY, cwd=tmp_path)

    assert ended.code == 0, ended.err
    assert "Warning" not in ended.err
    assert losses_done(tmp_path) == ["KL", "MSE"]
    assert [read(run / "metrics.json")["hardware/threads"] for run in runs(tmp_path)] == [1, 1]


@pytest.mark.slow
def test_a_preempted_slurm_job_queues_again_and_resumes(cluster, tmp_path):
    given = [
        "hydra/launcher=slurm",
        "hydra.launcher.partition=gpu",
        "loss=mse,kl",
        "trainer.max_epochs=100",
    ]
    line = [sys.executable, "-m", "vitkd.train", "-m", *TINY, *given]
    with subprocess.Popen(line, cwd=tmp_path, stderr=subprocess.PIPE) as sweep:
        while sweep.poll() is None and not (
            saved := [*tmp_path.glob("outputs/digits/*/checkpoints/last.ckpt")]
        ):
            time.sleep(0.01)
        preempted = saved[0].parents[1]
        os.kill(read(preempted / "status.json")["pid"], signal.SIGUSR2)
        error = sweep.communicate()[1]
    asked = [line.split()[1] for line in (cluster / "batch").read_text().splitlines() if "#SBATCH" in line]

    assert sweep.returncode == 0, error
    assert (cluster / "calls").read_text() in ("requeue 7_0\n", "requeue 7_1\n")
    assert losses_done(tmp_path) == ["KL", "MSE"]
    assert (preempted / "run.log").read_text().count(" epoch 1/100 ") == 1
    assert {"--requeue", "--signal=USR2@120", "--time=240", "--open-mode=append"} <= {*asked}
    assert {"--partition=gpu", "--array=0-1%2", "--gpus-per-node=1", "--cpus-per-task=4"} <= {*asked}


@pytest.mark.slow
def test_optuna_finds_the_best_on_validation(process, tmp_path):
    trials = ["sweep=optuna", "hydra.sweeper.n_trials=3", "granularity=block"]

    ended = process("train", *trials, *TINY, cwd=tmp_path)
    (result,) = (tmp_path / "outputs").rglob("optimization_results.yaml")
    found = yaml.safe_load(result.read_text())

    assert ended.code == 0, ended.err
    assert "Warning" not in ended.err
    assert found["best_value"] == max(read(run / "metrics.json")["val/acc_best"] for run in runs(tmp_path))
    assert len(losses_done(tmp_path)) == 3
    assert {*found["best_params"]} == {"loss", "alpha", "optimizer.lr"}


@pytest.mark.parametrize(
    ("choice", "plugin"),
    [
        ("hydra/launcher=joblib", "hydra/launcher=joblib"),
        ("hydra/launcher=local", "hydra/launcher=submitit_local"),
        ("hydra/launcher=slurm", "hydra/launcher=submitit_slurm"),
        ("sweep=optuna", "hydra/sweeper=optuna"),
    ],
)
def test_a_plugin_that_is_missing_is_one_line(choice, plugin, command, no_plugins):
    ended = command("train", "-m", choice, "seed=0,1", *TINY)

    assert ended.code == 2
    assert ended.err == f"error: {plugin}: is a plugin that is not installed; pip install 'vitkd[sweep]'\n"
