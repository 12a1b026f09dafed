"""The contract of methods, weightings, students and optimisers; each file in `conf/` inherits these tests."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import pytest
import torch
from torch import Tensor

from tests.merged import saved_students
from vitkd.config.agreement import check_views
from vitkd.config.run import CONF_DIR, Config, Paths, parse
from vitkd.data import Batch, Mix
from vitkd.errors import ConfigError, RunError
from vitkd.models import Model
from vitkd.models.copying import CopyingModel
from vitkd.runs.folder import RunFolder
from vitkd.runs.seeding import first_weights
from vitkd.train.build import build_module, facts_of
from vitkd.train.callbacks import TeacherCaching
from vitkd.train.cuda_graph import GraphedStep
from vitkd.train.fit import fit
from vitkd.train.job import load_data
from vitkd.train.logged import Meter
from vitkd.train.module import DistillModule
from vitkd.train.stacked import StackedModule

REMARKS = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]
"""of Lightning, on every training here"""
pytestmark = [
    *REMARKS,
    pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
]
GROUPS = ("method", "weighting", "student", "optimizer")
OPTIONS = [(group, file.stem) for group in GROUPS for file in sorted((CONF_DIR / group).glob("*.yaml"))]
# A setting that takes another way through the objective, and is no file.
OPTIONS.append(("granularity.head_map", "squeeze"))
AUGMENTED = ("dataset.augment.then", "[rand_augment]")
OPTIONS.append(AUGMENTED)
SMALL_SWIN = [
    *("img_size=8", "window_size=2", "embed_dim=8", "depths=[2,1]"),
    "num_heads=[2,2]",
    "drop_path_rate=0.1",
]
SMALL_TNT = [
    *("img_size=8", "patch_size=4", "first_stride=2", "embed_dim=8", "inner_dim=4", "depth=2"),
    *("num_heads_outer=2", "num_heads_inner=2", "drop_path_rate=0.1"),
]
MIXED = ("dataset.mix.mixup_alpha", "0.8")
OPTIONS.append(MIXED)
SHARED_DROP_PATH = ("method", "attention, drop path shared")
OPTIONS.append(SHARED_DROP_PATH)
# Learning rates layer by layer, clipped and averaged.
OPTIONS.append(("optimizer.layer_decay", "0.5"))
OPTIONS += [("student.init", "mimetic"), ("student.init", "weight_selection")]
# What an option needs besides to suit the others' defaults.
SMALL = ["student.depth=2", "student.head_dim=8", "student.mlp_dim=32"]
BESIDES = {
    ("method", "dearkd"): ["teacher=resnet56", "teacher.variant=resnet20"],
    ("method", "locality"): ["teacher=resnet56", "teacher.variant=resnet20"],
    AUGMENTED: ["dataset.augment.crop_padding=1", *SMALL],
    ("granularity.head_map", "squeeze"): ["granularity=encoder", *SMALL, "student.num_heads=2"],
    ("student", "resnet"): ["method=logit"],
    MIXED: [
        *("dataset.mix.cutmix_alpha=1", "dataset.mix.prob=0.9", "dataset.passes=2", "dataset.repeats=2"),
        *("weighting=student_correct", "student.depth=2"),
    ],
    SHARED_DROP_PATH: ["method.share_drop_path=true", "teacher.depth=2"],
    ("optimizer.layer_decay", "0.5"): [
        *("optimizer.decay_all=false", "optimizer.weight_decay=0.3", "+trainer.gradient_clip_val=0.1"),
        "ema_decay=0.9",
    ],
    ("method", "together"): ["method.parts=[attention,relation,dkd]", "method.weights=[1,0.5,0.1]"],
    ("student", "vit"): SMALL,
    ("student", "report"): SMALL,
    ("student", "mnist"): SMALL,
    ("student", "tiny_imagenet"): [*SMALL, "student.embed_dim=32"],
    ("student", "sl_vit"): [*SMALL, "student.embed_dim=32", "student.num_heads=4"],
    ("student", "sl_vit_narrow"): [*SMALL, "student.embed_dim=32", "student.num_heads=4"],
    ("student", "report_teacher"): ["granularity=head", *SMALL],
    ("student", "swin"): [
        *(f"{whose}.{setting}" for whose in ("student", "teacher") for setting in SMALL_SWIN),
        *("teacher=swin", "granularity=encoder", "loss=kl"),
    ],
    ("student", "tnt"): [
        *(f"{whose}.{setting}" for whose in ("student", "teacher") for setting in SMALL_TNT),
        *("teacher=tnt", "granularity=encoder", "granularity.part=inner", "loss=kl"),
    ],
    ("student", "timm"): [
        *("student.img_size=8", "student.patch_size=2", "student.embed_dim=32", "student.num_heads=4"),
        *("student.depth=2", "student.drop_path_rate=0.1"),
    ],
}
BRIEF = [
    *("trainer=cpu", "dataset.batch_size=16", "log_every_n_steps=2", "label_smoothing=0.1"),
    *("trainer.max_epochs=2", "trainer.limit_train_batches=4", "+trainer.limit_val_batches=2"),
    "checkpoint_minutes=0",
]
STEPS = 8
CLOSE = {"atol": 1e-9, "rtol": 1e-7}


@pytest.fixture(scope="module", autouse=True)
def _students_to_merge(tmp_path_factory) -> None:
    students = saved_students(tmp_path_factory.mktemp("students"))
    BESIDES["student", "merged"] = ["method=logit", students]


@cache
def composed(group: str, option: str) -> Config:
    """`python -m vitkd.train group=option`, briefly, on digits; whoever changes it works on a copy."""
    has_own = option in ("merged", "resnet", "swin", "timm", "tnt")
    dropout = [f"student.{what}=0.1" for what in ("dropout", "emb_dropout")] + ["student.drop_path_rate=0.3"]
    dropout = [] if has_own else dropout
    besides, name = BESIDES.get((group, option), []), option.partition(",")[0]
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return parse(hydra.compose("train", [*BRIEF, *dropout, *besides, f"{group}={name}"]))


# A residual network takes as long as all others together.
PARAMS = [
    pytest.param(option, id="=".join(option), marks=pytest.mark.slow if option[1] == "resnet" else ())
    for option in OPTIONS
]


@pytest.fixture(params=PARAMS)
def option(request) -> tuple[str, str]:
    return request.param


@pytest.fixture
def config(option) -> Config:
    return composed(*option)


def teacher_of(config: Config) -> Model | None:
    """One with random weights, always the same."""
    if not config.method.needs_teacher:
        return None
    return first_weights(config.teacher.seed, config.teacher.model)


def module_of(config: Config, data: Any, seed: int = 0) -> DistillModule:
    student = first_weights(seed, config.student)
    return build_module(config, student, teacher_of(config), facts_of(data)).train()


def train(module: DistillModule, config: Config, data: Any, *callbacks: L.Callback) -> None:
    """As the configuration says, in float64."""
    silent = {f"enable_{what}": False for what in ("checkpointing", "progress_bar", "model_summary")}
    settings = config.trainer | {"precision": "64-true", "num_sanity_val_steps": 0}
    trainer = L.Trainer(
        **settings, **silent, logger=False, callbacks=[*callbacks], log_every_n_steps=config.log_every_n_steps
    )
    trainer.fit(module, data)
    assert trainer.global_step == STEPS


def weights_of(model: Model) -> list[Tensor]:
    return [value.detach().clone() for value in model.state_dict().values()]


def assert_equal(ours: list[Tensor], theirs: list[Tensor], **tolerance: float) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        if tolerance:
            torch.testing.assert_close(a, b, **tolerance)
        else:
            assert torch.equal(a, b)


@cache
def trained_alone(
    group: str, option: str, seed: int
) -> tuple[DistillModule, list[Tensor], list[dict[str, Any]]]:
    """A module after its training, its weights before that, and what was kept of every step."""
    config, kept = composed(group, option), Keep()
    data = load_data(config)
    module = module_of(config, data, seed)
    first = weights_of(module.model.double())
    torch.manual_seed(seed + 10)
    train(module, config, data, kept)
    return module, first, kept.steps


class Keep(L.Callback):
    """Keeps the curves and the term weights after every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        curves = {k: v.tolist() for k, v in trainer.callback_metrics.items() if "per_second" not in k}
        class_loss, transfer = pl_module.term_weights.both.unbind(-1)
        weights = {"term class_loss": class_loss.tolist(), "term transfer": transfer.tolist()}
        self.steps.append(curves | weights)


class Curves(L.pytorch.loggers.logger.DummyLogger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged.append(metrics)

    def of(self, name: str) -> list[float]:
        return [metrics[name] for metrics in self.logged if name in metrics]


def curves_of(config: Config, module: Any, data: Any, count: int = 1, **settings: Any) -> list[Curves]:
    """What each of `count` students' loggers keeps of a training in float64."""
    torch.manual_seed(0)
    curves = [Curves() for _ in range(count)]
    silent = {f"enable_{what}": False for what in ("checkpointing", "progress_bar", "model_summary")}
    settings = config.trainer | {"precision": "64-true", "num_sanity_val_steps": 0} | settings
    L.Trainer(**settings, **silent, logger=curves, log_every_n_steps=2).fit(module, data)
    return curves


def test_the_gradient_reaches_the_student_and_what_learns_beside_it(config):
    data = load_data(config)
    module = module_of(config, data).double()
    batch = data.first("train", 16)

    losses = module.losses(Batch(batch.image.double(), batch.label, batch.index))
    losses.total.backward()

    assert losses.total.isfinite()
    model = module.model.student if isinstance(module.model, CopyingModel) else module.model
    learning = [*model.parameters(), *(module.objective.parameters() if module.objective else ())]
    assert {id(p) for p in learning} == {id(p) for p in module.parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in learning)
    if config.method.needs_teacher:
        assert all(p.grad is None and not p.requires_grad for p in module.teacher.parameters())


def test_mixed_images_are_learned_from_or_refused(option, config):
    if option[0] not in ("method", "weighting"):
        return
    dataset = replace(config.dataset, mix=Mix(mixup_alpha=1.0, cutmix_alpha=1.0), repeats=2)
    if config.method.why_unmixed:
        with pytest.raises(ConfigError):
            check_views(dataset, config.method)
        return
    data = load_data(replace(config, dataset=dataset))
    module = module_of(config, data)
    batch = next(iter(data.loader("train")))

    losses = module.losses(batch)
    losses.total.backward()

    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)
    logits = (
        losses.output.answer if module.objective is None else module.objective.class_logits(losses.output)
    )
    smoothed = 0.9 * batch.target + 0.1 / batch.target.shape[1]
    expected = -(smoothed * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(losses.class_loss, expected)


def test_the_teacher_stays_and_the_student_learns(option, config):
    module, first, _ = trained_alone(*option, 0)

    assert any(not torch.equal(a, b) for a, b in zip(first, weights_of(module.model), strict=True))
    if (before := teacher_of(config)) is not None:
        assert not module.teacher.training
        assert_equal(weights_of(before.double()), weights_of(module.teacher))


class Stop(L.Callback):
    """Ends the process's run after so many steps, as a killed process would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise RunError("as a killed process would")


def assert_resumed_is_uninterrupted(config: Config, folder: Path, stopped_after: int) -> None:
    """A run that is stopped after so many steps, then resumed, ends as one that is not, curves included."""

    def attempt(name: str, *callbacks: L.Callback) -> list[Tensor]:
        (folder / name).mkdir(exist_ok=True)
        own = replace(config, paths=Paths(config.paths.data, str(folder)))
        data, run = load_data(own), RunFolder(folder / name)
        module = module_of(own, data)
        torch.manual_seed(0)
        with run.running(own.resolved, {}):
            fit(module, data, run, own, callbacks)
        return weights_of(module.model)

    uninterrupted, resumed = Keep(), Keep()
    expected = attempt("whole", uninterrupted)
    with pytest.raises(RunError):
        attempt("cut", Stop(stopped_after))

    assert_equal(attempt("cut", resumed), expected)
    # A checkpoint is written after every step but the one that stops.
    assert resumed.steps == uninterrupted.steps[stopped_after - 1 :]


def test_resumed_is_uninterrupted(config, tmp_path):
    assert_resumed_is_uninterrupted(config, tmp_path, stopped_after=6)


def test_stacked_is_alone_or_refused(option, config):
    if config.student.why_alone or config.method.why_alone:
        # `candidates.why_alone` gives the reason; its tests hold that.
        return
    data = load_data(config)

    stacked = StackedModule([module_of(config, data, seed) for seed in (0, 1)], [0, 0], [10, 11])
    train(stacked, config, data)

    for student in (0, 1):
        own = [weights[student] for weights in weights_of(stacked.model)]
        assert_equal(own, weights_of(trained_alone(*option, student)[0].model), **CLOSE)


class Recording:
    """A captured step, played on the CPU: a replay runs it again, and the host notes nothing of that."""

    def __init__(self, work: Callable[[], None], meter: Meter) -> None:
        self.work, self.meter, self.replays = work, meter, 0

    def replay(self) -> None:
        counts = self.meter.counts()
        self.work()
        if self.replays:
            self.meter.set_counts(counts)
        self.replays += 1


class PlayedGraphs(L.Callback):
    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.recordings: list[Recording] = []

        def capture(work: Callable[[], None]) -> Recording:
            self.recordings.append(Recording(work, pl_module.window.meter))
            return self.recordings[-1]

        pl_module.graph = GraphedStep(pl_module.whole_step, capture, lambda work: work())


def test_a_played_graph_is_eager(option, config, monkeypatch):
    monkeypatch.setattr("vitkd.train.cuda_graph.WARM_UP", 1)
    eager, _, expected = trained_alone(*option, 0)
    graphs, played, data = PlayedGraphs(), Keep(), load_data(config)
    module = module_of(config, data)

    torch.manual_seed(10)
    train(module, config, data, graphs, played)

    assert sum(recording.replays for recording in graphs.recordings) >= 2
    assert_equal(weights_of(module.model), weights_of(eager.model))
    for ours, theirs in zip(played.steps, expected, strict=True):
        assert ours == pytest.approx(theirs)


def asks_of(module: DistillModule) -> list[str]:
    """The split of each question that `module` asks its teacher from now on."""
    asked: list[str] = []
    ask = module.ask_teacher
    module.ask_teacher = lambda images, split: asked.append(split) or ask(images, split)  # type: ignore[method-assign]
    return asked


class KeepsAll(TeacherCaching):
    """Keeps the answers however short the training is, and notes of which splits."""

    def _passes(self, *_: Any) -> float:
        return 2.0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self.splits = {*pl_module.cached}


def test_a_cached_teacher_is_an_asked_one(option, config):
    if not config.method.needs_teacher:
        return
    data = load_data(config)
    module, caching = module_of(config, data), KeepsAll(data, gib=1.0)

    torch.manual_seed(10)
    train(module, config, data, caching)

    dataset = config.dataset
    varies = module.shares_drop_path or dataset.mix.is_on or dataset.augment.is_random
    varying = {"train"} if varies else set()
    # A copy runs its teacher itself.
    assert caching.splits == ({"train", "val"} - varying if module.objective is not None else set())
    assert_equal(weights_of(module.model), weights_of(trained_alone(*option, 0)[0].model), **CLOSE)
