"""Which jobs `hydra/launcher=stacked` trains together, what it says of the others, and what goes wrong."""

import resource
import shutil
import weakref
from collections.abc import Callable, Collection
from contextlib import ExitStack
from copy import deepcopy
from functools import reduce
from itertools import chain, product
from operator import getitem
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

from tests.cli.test_multirun import SweepResult, Sweeps, read, state_of
from vitkd.cli.console import Job
from vitkd.config.run import BASES, CONF_DIR
from vitkd.config.schema import build
from vitkd.errors import RunError
from vitkd.methods.attention import AttentionDistillation
from vitkd.methods.logit import LogitDistillation
from vitkd.methods.together import Together
from vitkd.models import ResNetConfig, ViTConfig
from vitkd.optim import AdamW
from vitkd.runs.folder import RunFolder
from vitkd.runs.stack_folder import StackFolder, StackSlot
from vitkd.train.plan import Machine
from vitkd.train.stacked import StackedModule
from vitkd.train.stacked.candidates import Candidate, stacks_of, start_over, why_alone
from vitkd.train.stacked.fit import room_for
from vitkd.train.student import measure_student

STACKED = "hydra/launcher=stacked"
ALONE = [
    *("method=none", "student.depth=1", "trainer=cpu", "trainer.max_epochs=1", "dataset.batch_size=32"),
    *("+trainer.limit_train_batches=2", "pictures_every_n_epochs=0"),
]
OVERFLOW = "one student's overflow would hold all others back"
BESIDE_A_TEACHER = [*ALONE[1:], "teacher.depth=1", "teacher.max_epochs=1"]
BESIDE_A_TEACHER += ["teacher.trainer.limit_train_batches=2"]

CE, KL, MSE, REVERSE_KL = (
    {"_target_": f"vitkd.methods.maps.losses.{name}"} for name in ("CE", "KL", "MSE", "ReverseKL")
)
MATCHED = {"_target_": "vitkd.methods.maps.granularity.Block", "head_map": "hungarian"}
LOGIT = {"_target_": "vitkd.methods.logit.LogitDistillation"}
BALANCE = {"_target_": "vitkd.methods.weighting.GradientBalance"}
LINEAR = {"_target_": "vitkd.methods.weighting.Linear", "end": 0.5}


@pytest.fixture
def sweeps(tmp_path, command) -> Sweeps:
    return Sweeps(tmp_path / "outputs", command)


@pytest.fixture
def plan(sweeps, monkeypatch) -> Callable[..., tuple[list[list[int]], list[int], SweepResult]]:
    """plan(*arguments) is the jobs of each stack, those that run alone, and what is said; none is trained."""

    def make(*arguments: str) -> tuple[list[list[int]], list[int], SweepResult]:
        stacks: list[list[int]] = []
        alone: list[int] = []

        def train_stack(members: list[Candidate], sweep: str) -> list[Any]:
            stacks.append([member.job.number for member in members])
            for member in members:
                member.job.state = "done"
            return []

        monkeypatch.setattr("vitkd.train.stacked.job.train_stack", train_stack)
        monkeypatch.setattr("vitkd.train.job.run_job", lambda _, job: alone.append(job.number))
        result = sweeps.run(STACKED, *arguments)
        assert result.code == 0, result.err
        return stacks, alone, result

    return make


@pytest.fixture(scope="module")
def resolved() -> dict[str, Any]:
    """A job's resolved configuration."""
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        composed = OmegaConf.to_container(compose("train"), resolve=True)
    return cast(dict[str, Any], composed)


@pytest.fixture
def stacked(resolved, monkeypatch) -> Callable[..., tuple[list[list[int]], list[str]]]:
    """stacked(changes, …) is the jobs of each stack, and what is said; each job has `changes` of its own.

    Those of `saved` were cut off in a stack each.
    """

    def stacks(
        *jobs: dict[str, Any], most: int = 9, saved: Collection[int] = (), room: int = 99
    ) -> tuple[list[list[int]], list[str]]:
        said: list[str] = []
        monkeypatch.setattr(
            "vitkd.train.stacked.candidates.log.info", lambda text, *args: said.append(text % args)
        )
        members = []
        for number, changes in enumerate(jobs):
            settings = deepcopy(resolved)
            for key, value in changes.items():
                *names, last = key.split(".")
                node = reduce(getitem, names, settings)
                node[last] = value
            groups = ("method", "weighting", "granularity", "loss")
            built = {group: build(group, settings[group], BASES[group]) for group in groups}
            config = SimpleNamespace(resolved=settings, alpha=settings["alpha"], **built)
            place = StackSlot(StackFolder(Path(f"stack-{number}")), 0, 1) if number in saved else None
            members.append(SimpleNamespace(job=Job(number, {}), config=config, place=place))
        found = stacks_of(cast(Any, members), most, room)
        return [[member.job.number for member in stack] for stack in found], said

    return stacks


class TestWhatTrainsTogether:
    @pytest.mark.parametrize(
        ("setting", "value"),
        [
            ("method", {"_target_": "vitkd.methods.logit.LogitDistillation"}),
            ("method.control", "shuffled"),
            ("granularity", {"_target_": "vitkd.methods.maps.granularity.Head", "heads": [[0, 1]]}),
            ("loss", {"_target_": "vitkd.methods.maps.losses.MSE"}),
            ("schedule", {"_target_": "vitkd.optim.Constant"}),
            *(("loss.temperature", 3.0), ("alpha", 1), ("seed", 7), ("label_smoothing", 0.1)),
            *(("optimizer.lr", 0.1), ("optimizer.weight_decay", 0.3)),
            *(("name", "other"), ("checkpoint_minutes", 3), ("pictures_every_n_epochs", 0)),
        ],
    )
    def test_differs_in_what_each_has_of_its_own(self, setting, value, stacked):
        stacks, said = stacked({}, {setting: value})

        assert [sorted(stack) for stack in stacks] == [[0, 1]]
        assert said == []

    @pytest.mark.parametrize(
        ("setting", "value", "named"),
        [
            *(("student.depth", 7, None), ("student.dropout", 0.5, None), ("teacher.seed", 3, None)),
            *(("trainer.precision", "bf16-mixed", None), ("trainer.max_epochs", 7, None)),
            *(
                ("optimizer.betas", [0.5, 0.9], None),
                ("dataset.batch_size", 7, None),
                ("compile", True, None),
            ),
            *(("matmul_precision", "high", None), ("ema_decay", 0.9, None), ("paths.data", "there", "paths")),
            ("method", {"_target_": "vitkd.methods.none.NoDistillation"}, "method"),
        ],
    )
    def test_differs_in_nothing_else_and_that_is_named(self, setting, value, named, stacked):
        stacks, said = stacked({}, {setting: value}, {"seed": 1}, {setting: value, "seed": 1})

        assert stacks == [[0, 2], [1, 3]]
        assert said == [f"jobs 1, 3 cannot be stacked with jobs 0, 2: different {named or setting}"]

    def test_resumes_from_one_checkpoint_and_jobs_of_the_same_settings_say_so(self, stacked):
        other = {"student.depth": 7}

        stacks, said = stacked({}, other, {"seed": 1}, other | {"seed": 1}, saved=[2, 3])

        assert stacks == [[0], [1], [2], [3]]
        reason = "interrupted runs resume where they were saved"
        assert said == [
            "job 1 cannot be stacked with job 0: different student.depth",
            f"job 2 cannot be stacked with job 0: {reason}",
            f"job 3 cannot be stacked with job 1: {reason}",
        ]

    @pytest.mark.parametrize(
        ("most", "sizes"),
        [(1, [1] * 5), (2, [1, 2, 2]), (3, [2, 3]), (4, [2, 3]), (5, [5]), (9, [5])],
    )
    def test_makes_stacks_of_even_size_up_to_a_limit(self, most, sizes, stacked):
        stacks, said = stacked(*({"seed": seed} for seed in range(5)), most=most)

        assert [len(stack) for stack in stacks] == sizes
        assert said == [f"jobs 0-4 make {len(sizes)} stacks of at most {most} students"] * (len(sizes) > 1)

    def test_puts_equal_losses_beside_each_other(self, stacked):
        other = {"_target_": "vitkd.methods.maps.losses.MSE"}

        stacks, _ = stacked({"alpha": 1}, {"loss": other}, {}, {"loss": other, "seed": 1}, {"seed": 1})

        assert stacks == [[2, 4, 1, 3, 0]]

    def test_puts_temperatures_of_one_loss_and_granularity_beside_each_other(self, stacked):
        head = {"granularity": {"_target_": "vitkd.methods.maps.granularity.Head"}}
        warm = {"loss.temperature": 2.0}

        stacks, _ = stacked({}, head, warm, head | warm)

        assert stacks == [[0, 2, 1, 3]]

    @pytest.mark.parametrize(("most", "stacks"), [(57, 1), (56, 2)])
    def test_is_each_student_once_whatever_of_the_grid_it_stands_for(self, most, stacks, stacked):
        maps, losses = (f"vitkd.methods.maps.{module}" for module in ("granularity", "losses"))
        cells = product(("Head", "Block", "Encoder"), ("MSE", "CE", "KL"), (0.015, 0.3, 0.5, 1), range(3))
        jobs = [
            {
                "granularity": {"_target_": f"{maps}.{granularity}"},
                "loss": {"_target_": f"{losses}.{loss}"},
                "alpha": alpha,
                "seed": seed,
            }
            for granularity, loss, alpha, seed in cells
        ]

        found, said = stacked(*jobs, most=most, room=108)

        # 3 granularities × (mse, ce = kl) × 3 alphas below 1 × 3 seeds, and the student alone of each seed.
        assert sorted(chain.from_iterable(found)) == [*range(108)]
        assert said == ["jobs 0-107 make 2 stacks of at most 56 students"] * (stacks - 1)
        assert len(found) == stacks

    @pytest.mark.parametrize(
        ("one", "other", "alike"),
        [
            ({"loss": CE}, {"loss": KL}, True),
            ({"loss": CE}, {"loss": KL, "seed": 1}, False),
            ({"loss": CE}, {"loss": KL | {"temperature": 2.0}}, False),
            ({"loss": CE}, {"loss": REVERSE_KL}, False),
            ({"loss": CE, "weighting": BALANCE}, {"loss": KL, "weighting": BALANCE}, True),
            ({"loss": CE, "granularity": MATCHED}, {"loss": KL, "granularity": MATCHED}, False),
            ({"alpha": 1, "loss": CE}, {"alpha": 1, "granularity": MATCHED, "method": LOGIT}, True),
            ({"alpha": 1}, {"alpha": 1, "label_smoothing": 0.1}, False),
            ({"alpha": 1, "weighting": LINEAR}, {"alpha": 1, "weighting": LINEAR, "loss": MSE}, False),
            ({"method": LOGIT, "loss": MSE}, {"method": LOGIT, "granularity": MATCHED}, True),
            ({"method": LOGIT}, {"method": LOGIT | {"temperature": 2.0}}, False),
            ({"name": "one"}, {"name": "other"}, True),
        ],
        ids=str,
    )
    def test_trains_once_what_has_equal_gradients(self, one, other, alike, stacked):
        stacks, _ = stacked(one, other, most=1)

        assert len(stacks) == (1 if alike else 2)

    @pytest.mark.parametrize(("room", "sizes"), [(9, [9]), (8, [3, 6]), (4, [3, 3, 3]), (2, [3, 3, 3])])
    def test_holds_no_more_jobs_than_there_is_room_for_unless_they_share_a_student(
        self, room, sizes, stacked
    ):
        names = [{"seed": seed, "name": name} for seed in range(3) for name in ("a", "b", "c")]

        stacks, _ = stacked(*names, room=room)

        assert [len(stack) for stack in stacks] == sizes

    def test_is_no_more_than_files_may_be_open(self, monkeypatch):
        limits = [1024, 2048]
        monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
        monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.__setitem__(slice(None), new))

        assert (room_for(100), limits) == (100, [1024, 2048])
        assert (room_for(400), limits) == (400, [1856, 2048])
        assert (room_for(4000), limits) == (448, [2048, 2048])

    def test_is_settled_by_the_command(self, plan):
        swept = ["student.depth=1,2", "alpha=0.5,0.50,0.7", "hydra.launcher.max_students=2"]
        stacks, alone, result = plan(
            "sweep=grid", "granularity=head", "loss=kl", "seed=0", *swept, "trainer=cpu"
        )

        # Of the same job twice, the second one finds it done.
        assert (stacks, alone) == ([[0, 4], [1, 5]], [2, 3])
        assert "jobs 1, 5 cannot be stacked with jobs 0, 4: different student.depth\n" in result.out

    def test_is_no_single_job(self, plan):
        assert plan("seed=3", "trainer=cpu")[:2] == ([], [0])


class TestWhatRunsAlone:
    @pytest.mark.parametrize(
        ("processes", "precision", "reason"),
        [
            (1, "bf16-mixed", None),
            (2, "32-true", "it uses 2 processes"),
            (
                1,
                "16-mixed",
                "under trainer.precision=16-mixed one student's overflow would hold all others back",
            ),
            (1, 16, "under trainer.precision=16 one student's overflow would hold all others back"),
        ],
    )
    def test_is_what_needs_a_process_to_itself(self, processes, precision, reason):
        member = self.candidate(torch.device("cpu"), processes, precision, dropout=0.5)

        assert why_alone(member) == reason

    def test_is_what_leaves_out_branches_of_the_teacher(self):
        shared = AttentionDistillation(share_drop_path=True)
        methods = {"attention": shared, "logit": LogitDistillation()}
        for method in (shared, Together(["logit", "attention"], methods=methods)):
            member = self.candidate(torch.device("cpu"), 1, "32-true")
            member.config.method = method

            assert "method.share_drop_path" in (why_alone(member) or "")

    def test_is_what_keeps_figures_of_the_whole_batch(self):
        member = self.candidate(torch.device("cpu"), 1, "32-true")
        member.config.student = ResNetConfig(32, 3, 10)

        assert "batch normalisation" in (why_alone(member) or "")

    @pytest.mark.parametrize("name", ["dropout", "emb_dropout", "drop_path_rate"])
    @pytest.mark.parametrize(
        ("device", "triton", "share", "reason"),
        [
            *(("cpu", None, 0.1, None), ("cuda:0", "spec", 0.1, None), ("cuda:0", None, 0.0, None)),
            ("cuda:0", None, 0.1, "its dropout masks need Triton on a GPU, and cuda:0 has none"),
            ("mps", "spec", 0.1, "its dropout masks need Triton on a GPU, and mps has none"),
            ("mps", None, 0.0, None),
        ],
    )
    def test_is_what_drops_where_there_is_no_kernel(self, name, device, triton, share, reason, monkeypatch):
        monkeypatch.setattr("vitkd.train.stacked.dropout.find_spec", lambda _: triton)

        assert why_alone(self.candidate(torch.device(device), 1, "32-true", **{name: share})) == reason

    @staticmethod
    def candidate(device: torch.device, processes: int, precision: Any, **student: float) -> Candidate:
        config = SimpleNamespace(
            debug=None,
            method=AttentionDistillation(),
            optimizer=AdamW(),
            trainer={"precision": precision},
            student=ViTConfig(8, 1, 10, 2, **cast(Any, student)),
        )
        machine = Machine(device, processes, 1)
        plan = SimpleNamespace(config=config, machine=machine)
        return Candidate(Job(0, {}), cast(Any, plan), folder=None, place=None)

    def test_is_what_resumes_from_a_checkpoint_of_its_own(self, plan, finished, sweeps):
        shutil.copytree(finished, sweeps.folder("run0"))
        (sweeps.folder("run0") / "status.json").write_text('{"state": "stopped"}')
        briefly = [
            "trainer.max_epochs=1",
            "teacher.max_epochs=1",
            "trainer.limit_train_batches=1",
            "teacher.trainer.limit_train_batches=1",
        ]

        stacks, alone, result = plan("seed=0,1,2", "name=run${seed}", *briefly)

        assert (stacks, alone) == ([[1, 2]], [0])
        assert "job 0 trains by itself: it resumes from a checkpoint of its own\n" in result.out


@pytest.mark.parametrize("most", ["0", "-1", "many", "2.5", "true"])
def test_a_wrong_limit_is_one_line(most, sweeps):
    result = sweeps.command("train", "-m", STACKED, "seed=0,1", f"hydra.launcher.max_students={most}", *ALONE)

    assert result.code == 2
    most = most.capitalize() if most == "true" else most
    assert result.err == (
        f"error: hydra.launcher.max_students={most}: must be a whole number of at least 1, or null\n"
    )


def test_a_bad_job_is_reported_once_and_the_others_train(sweeps):
    ended = sweeps.run("seed=0,1", "optimizer.weight_decay=0,-1", *ALONE, STACKED)

    assert (ended.code, ended.states) == (1, ["done", "failed"] * 2)
    assert "jobs 0, 2 train as one stack\n" in ended.out
    assert [line.split(":")[1] for line in ended.err.splitlines()] == [f" job {n} failed" for n in (1, 3)]
    assert "weight_decay=-1" in ended.err


@pytest.mark.slow
def test_what_cannot_learn_from_its_teacher_is_reported_once(sweeps):
    jobs = ["alpha=7,0.5", "granularity=head", "granularity.heads=[[0,0]],[[0,1]],[[9,0]]"]
    ended = sweeps.run(*jobs, *BESIDE_A_TEACHER, STACKED)

    assert ended.code == 1
    assert ended.states == ["failed"] * 3 + ["done", "done", "failed"]
    assert "jobs 3-4 train as one stack\n" in ended.out
    lines = ended.err.splitlines()
    assert [line.split(":")[1] for line in lines] == [f" job {n} failed" for n in (0, 1, 2, 5)]
    assert "alpha=7.0" in lines[0]
    assert "granularity.heads" in lines[3]


def test_a_share_of_the_batches_that_is_none_is_refused_before_a_teacher_is_trained(sweeps, tmp_path):
    share = "trainer.limit_train_batches=0.001"
    settings = [each for each in BESIDE_A_TEACHER if not each.startswith("+trainer.limit_train_batches")]
    ended = sweeps.run("alpha=0.3,0.5", *settings, share, STACKED)

    assert ended.states == ["failed", "failed"]
    first, second = ended.err.splitlines()
    assert first.startswith(f"error: job 0 failed: {share}: is not one of ")
    assert second == "error: job 1 failed: as job 0"
    assert not (tmp_path / "outputs" / "teachers").exists()


def test_image_files_are_looked_at_once_a_sweep(plan, monkeypatch):
    looked_at = []
    monkeypatch.setattr("vitkd.train.stacked.candidates.contents_of", looked_at.append)

    stacks, _, _ = plan("seed=0,1,2")

    assert stacks == [[0, 1, 2]]
    assert len(looked_at) == 1


@pytest.mark.slow
def test_images_that_workers_decode_train_one_by_one(sweeps, tmp_path):
    random = np.random.default_rng(0)
    photos = tmp_path / "photos"
    for name in ("cat", "dog"):
        (photos / name).mkdir(parents=True)
        for number in range(8):
            pixels = random.integers(256, size=(8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(photos / name / f"{number}.png")
    files = ["dataset=image_folder", f"dataset.root={photos}", "dataset.image_size=8"]
    decoded = ["dataset.patch_size=4", "dataset.resident_limit_gib=0", "dataset.workers=0", "student=small"]
    settings = [setting for setting in ALONE if "batch_size" not in setting]

    ended = sweeps.run("alpha=0.5,1", *files, *decoded, *settings, "dataset.batch_size=2", STACKED)

    assert ended.states == ["done", "done"], ended.err
    assert "jobs 0-1 train one by one: workers decode their images" in ended.out
    assert ended.out.count("warning: alpha has no effect with method=none") == 2


@pytest.mark.parametrize("teachers", [("old", "old"), ("old", None), ("new", "new"), ("old", "new")])
def test_a_stack_whose_teacher_was_trained_to_other_weights_starts_over_as_a_whole(teachers, tmp_path):
    members, settings = [], {"paths": {"outputs": "o"}}
    for number, weights in enumerate(teachers):
        folder = RunFolder.claim(tmp_path / f"run{number}")
        with folder.running(settings, {"teacher/weights": weights}):
            pass
        plan = SimpleNamespace(path=folder.path, config=SimpleNamespace(resolved=settings))
        place = StackSlot(StackFolder(tmp_path / "stack"), number, 2)
        members.append(Candidate(Job(number, {}), cast(Any, plan), folder, place))

    start_over(members, {"teacher/weights": "new"})

    assert [bool(member.folder) for member in members] == [weights != "old" for weights in teachers]
    resumes = teachers == ("new", "new")
    assert [member.place is not None for member in members] == [resumes, resumes]


def test_what_another_process_has_taken_meanwhile_is_skipped(sweeps, monkeypatch):
    jobs = ["seed=0,1,2", "name=seed${seed}", *ALONE, STACKED]
    with monkeypatch.context() as patch:
        patch.setattr("vitkd.train.stacked.job.fit_stack", fail)
        assert sweeps.run(*jobs).states == ["failed"] * 3
    taken = RunFolder(sweeps.folder("seed1"))

    with ExitStack() as other:

        def take(*_: Any) -> None:
            other.enter_context(taken.running(taken.read_config()))

        # When all has been planned.
        monkeypatch.setattr("vitkd.train.stacked.job.read_data", take)
        ended = sweeps.run(*jobs)

    assert (ended.code, ended.states) == (0, ["done", "running elsewhere", "done"]), ended.err
    assert "jobs 0, 2 train as one stack\n" in ended.out
    assert f"{sweeps.folder('seed1')}: skipped, another process is running it\n" in ended.out


def fail(*_: Any) -> None:
    raise RunError("the disk is full")


def on_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def on_a_cpu() -> None:
    """Ask for more than there are addresses."""
    torch.empty(2**50, dtype=torch.uint8)


class TestTooLittleMemory:
    @pytest.fixture
    def failed(self, monkeypatch) -> Callable[..., list[weakref.ref[StackedModule]]]:
        """failed(n) lets stacks of more than n students run out of memory; gives those that did."""

        def limit(most: int, run_out: Callable[[], Any] = on_a_gpu) -> list[weakref.ref[StackedModule]]:
            stacks: list[weakref.ref[StackedModule]] = []
            original = StackedModule.losses

            def losses(self: StackedModule, batch: Any) -> Any:
                if self.students > most:
                    stacks.append(weakref.ref(self))
                    run_out()
                assert [stack for stack in stacks if stack() is not None] == [], "they hold memory still"
                return original(self, batch)

            monkeypatch.setattr(StackedModule, "losses", losses)
            return stacks

        return limit

    @pytest.mark.parametrize("run_out", [on_a_gpu, on_a_cpu])
    def test_halves_stacks_until_they_fit(self, run_out, failed, sweeps):
        stacks = failed(2, run_out)

        ended = sweeps.run("seed=range(5)", "name=seed${seed}", *ALONE, STACKED)

        assert (ended.code, ended.states) == (0, ["done"] * 5), ended.err
        assert len(stacks) == 2
        assert "jobs 0-4: out of memory on cpu, trying two stacks of half the size\n" in ended.out
        assert "jobs 2-4: out of memory on cpu," in ended.out
        assert {path.name for path in sweeps.path.iterdir()} == {"digits", "sweeps"}
        assert {path.name for path in (sweeps.path / "digits").iterdir()} == {f"seed{n}" for n in range(5)}
        students = [read(sweeps.folder(f"seed{n}") / "metrics.json")["stack/students"] for n in range(5)]
        assert students == [2, 2, 1, 2, 2]

    @pytest.mark.slow
    def test_while_students_are_concluded_leaves_the_concluded_ones_alone(
        self, sweeps, tmp_path, monkeypatch
    ):
        jobs = ["seed=range(5)", "name=seed${seed}", *ALONE, STACKED]
        reference = Sweeps(tmp_path / "reference", sweeps.command)
        assert reference.run(*jobs).code == 0
        measured: list[int] = []

        def measure(config: Any, *rest: Any) -> Any:
            measured.append(config.seed)
            if len(measured) == 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return measure_student(config, *rest)

        monkeypatch.setattr("vitkd.train.stacked.job.measure_student", measure)
        ended = sweeps.run(*jobs)

        assert (ended.code, ended.states) == (0, ["done"] * 5), ended.err
        assert measured == [0, 1, 2, 2, 3, 4]
        assert "jobs 2-4: out of memory on cpu," in ended.out
        students = [read(sweeps.folder(f"seed{n}") / "metrics.json")["stack/students"] for n in range(5)]
        assert students == [5, 5, 1, 2, 2]
        assert {path.name for path in sweeps.path.iterdir()} == {"digits", "sweeps"}
        for n in range(5):
            runs = [outputs.folder(f"seed{n}") for outputs in (sweeps, reference)]
            mine, theirs = (load_file(run / "student.safetensors") for run in runs)
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)

    @pytest.mark.slow
    def test_for_one_student_is_one_line_a_job(self, failed, sweeps):
        failed(0)

        ended = sweeps.run("seed=0,1", "name=seed${seed}", *ALONE, STACKED)

        assert (ended.code, ended.states) == (1, ["failed"] * 2)
        assert ended.err.splitlines() == [
            "error: job 0 failed: cpu: out of memory even for one student; reduce dataset.batch_size",
            "error: job 1 failed: as job 0",
        ]
        assert state_of(sweeps.folder("seed1")) == "failed"


class TestAStudentThatIsNotFinite:
    def test_fails_alone_and_leaves_the_others_as_they_are(self, sweeps, tmp_path):
        jobs = ["optimizer.lr=0.001,1e30,0.01", "name=lr${optimizer.lr}", "+trainer.limit_train_batches=5"]
        settings = [setting for setting in ALONE if "limit_train" not in setting]

        ended = sweeps.run(*jobs, *settings, "trainer.max_epochs=2", "schedule.warmup=0", STACKED)
        without = Sweeps(tmp_path / "without", sweeps.command)
        good = ["optimizer.lr=0.001,0.01", *jobs[1:]]
        assert without.run(*good, *settings, "trainer.max_epochs=2", "schedule.warmup=0", STACKED).code == 0

        assert (ended.code, ended.states) == (1, ["done", "failed", "done"])
        (line,) = ended.err.splitlines()
        assert line.startswith("error: job 1 failed: step ")
        assert "is not finite: class loss nan, on training images " in line
        status = read(sweeps.folder("lr1e+30") / "status.json")
        assert status["state"] == "failed"
        assert "is not finite" in status["error"]
        for name in ("lr0.001", "lr0.01"):
            mine, theirs = (
                load_file(place.folder(name) / "student.safetensors") for place in (sweeps, without)
            )
            torch.testing.assert_close(mine, theirs)
        assert {path.name for path in sweeps.path.iterdir()} == {"digits", "sweeps"}
        warning = f"warning: {sweeps.folder('lr1e+30')}: step "
        assert ended.out.count(warning) == 1
        assert ended.out.index(warning) < ended.out.index("epoch 2/2"), "at once"
        assert "nan" not in ended.out.replace("class loss nan", "")

    @pytest.mark.slow
    def test_where_none_is_left_each_gets_its_own_line(self, sweeps):
        lr = "optimizer.lr=1e30,1e25"
        settings = [setting for setting in ALONE if "limit_train" not in setting]

        ended = sweeps.run(lr, "schedule.warmup=0", *settings, "trainer.max_epochs=3", STACKED)

        assert (ended.code, ended.states) == (1, ["failed"] * 2)
        assert [line.split(": ")[1] for line in ended.err.splitlines()] == ["job 0 failed", "job 1 failed"]
        assert ended.err.count("is not finite") == 2
