"""A run folder says which version made it, and every command refuses that of another in one line."""

import shutil
from pathlib import Path

import pytest
import yaml

import vitkd
from vitkd.report.__main__ import main as report


def test_a_run_says_which_version_made_it(finished):
    assert yaml.safe_load((finished / "config.yaml").read_text())["version"] == vitkd.__version__


@pytest.fixture
def other(finished, tmp_path) -> Path:
    """A run of version 0.0.9."""
    run = tmp_path / "outputs" / "digits" / "other"
    shutil.copytree(finished, run)
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"version": "0.0.9"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


BOTH = f"made by vitkd 0.0.9, this is {vitkd.__version__}; install that version to read it"


@pytest.mark.parametrize("name", ["evaluate", "explain", "export"])
def test_a_command_refuses_a_run_of_another_version(name, command, other):
    ended = command(name, f"run={other}")

    assert (ended.code, ended.err) == (2, f"error: run={other}: {BOTH}\n")


def test_the_report_leaves_it_out_and_says_why(other, finished, capsys):
    shutil.copytree(finished, other.parent / "ours")

    report([str(other.parent)])

    (line,) = (line for line in capsys.readouterr().out.splitlines() if "0.0.9" in line)
    assert line == f"{other}: incompatible ({BOTH}), left out"
