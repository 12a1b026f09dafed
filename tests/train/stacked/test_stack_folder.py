"""Where a stack is saved is removed after its last student, whatever other processes do there meanwhile."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runs.foreign import NO_FILE, NO_JSON, replace
from vitkd.runs.folder import RunFolder
from vitkd.runs.stack_folder import StackFolder, read_slot, release_slot


@pytest.fixture
def held(tmp_path) -> Callable[..., list[RunFolder]]:
    """held("a", "b") is a run a name, their students saved as one stack in tmp_path/stacks/a."""

    def hold(*names: str) -> list[RunFolder]:
        runs = [RunFolder(tmp_path / name) for name in names]
        folder = StackFolder(tmp_path / "stacks" / names[0])
        for path in (folder.last.parent, *(run.path for run in runs)):
            path.mkdir(parents=True)
        folder.assign(runs)
        return runs

    return hold


def test_goes_after_the_last_student_and_leaves_other_stacks_alone(held, tmp_path):
    first, second, (other,) = *held("a", "b"), held("c")
    stacks = tmp_path / "stacks"

    release_slot(first, stacks)
    assert read_slot(second, stacks).job == 1
    release_slot(second, stacks)
    assert [path.name for path in stacks.iterdir()] == ["c"]
    release_slot(other, stacks)

    assert not stacks.exists()


@pytest.mark.parametrize("become", (NO_FILE | NO_JSON).values(), ids=NO_FILE | NO_JSON)
@pytest.mark.parametrize("is_note", [True, False], ids=["the note", "the stack's list"])
def test_what_is_no_file_of_a_stack_s_removes_nothing(is_note, become, held, tmp_path):
    (run,) = held("a")
    stacks = tmp_path / "stacks"
    replace(run.stack if is_note else stacks / "a" / "runs.json", become)

    assert (read_slot(run, stacks) is None) == is_note
    StackFolder(stacks / "a").remove_if_unused()

    assert (stacks / "a").exists() == (not is_note)


@pytest.mark.parametrize(
    "changed",
    [{"stack": "x" * 5000}, {"stack": "\0"}, {"job": 1e999}, {"job": "0"}, {"jobs": None}],
    ids=str,
)
def test_a_note_of_no_stack_is_none(changed, held, tmp_path):
    (run,) = held("a")
    run.stack.write_text(json.dumps(json.loads(run.stack.read_text()) | changed))

    assert read_slot(run, tmp_path / "stacks") is None


@pytest.mark.parametrize("others", [[], ["new"]], ids=["removed the rest", "began another"])
def test_it_does_not_matter_what_another_process_did_at_that_moment(others, held, tmp_path, monkeypatch):
    (run,) = held("a")
    stacks, rmtree = tmp_path / "stacks", shutil.rmtree

    def removed(path: Path, ignore_errors: bool) -> None:
        rmtree(path.parent)
        for name in others:
            (stacks / name).mkdir(parents=True)

    monkeypatch.setattr("vitkd.runs.stack_folder.shutil.rmtree", removed)

    release_slot(run, stacks)

    assert stacks.exists() == bool(others)
    assert [path.name for path in stacks.glob("*")] == others
