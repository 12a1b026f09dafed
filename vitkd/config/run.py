"""The typed configuration: what Hydra composed, checked completely before anything is loaded or written.

Every option of a group names a dataclass by `_target_`, and that class is the option's schema: its fields are
the keys and types, its `__post_init__` checks the ranges. A new option is one class and one YAML file.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from vitkd.config.agreement import check_batch_size, check_images, check_views
from vitkd.config.debug import OPTIONS as DEBUG_OPTIONS
from vitkd.config.debug import leave_out_randomness
from vitkd.config.loggers import LoggerOption
from vitkd.config.schema import build, check_group, check_text, instantiate, unquoted
from vitkd.data import Augment, Dataset
from vitkd.errors import ConfigError, check, check_at_least, check_choice, check_fraction
from vitkd.methods.base import Method
from vitkd.methods.maps.granularity import Granularity
from vitkd.methods.maps.losses import AttentionLoss
from vitkd.methods.none import NoDistillation
from vitkd.methods.weighting import Weighting
from vitkd.models import ModelConfig
from vitkd.optim import Optimizer, Schedule

PACKAGE = Path(__file__).parents[1]
# In a wheel conf/ lies inside the package, in a checkout beside it.
CONF_DIR = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir())

# File systems take 255 bytes a name; the rest is for suffixes.
LONGEST_NAME = 160

BASES: dict[str, type] = {
    **{"student": ModelConfig, "method": Method, "weighting": Weighting, "granularity": Granularity},
    **{"loss": AttentionLoss, "optimizer": Optimizer, "schedule": Schedule},
}
"""group → what its options are, where the group's node describes nothing else"""
READ_BY_MODELS = (
    *(("teacher", "checkpoint"), ("teacher", "weights"), ("student", "weights")),
    *(("teacher", "init_from"), ("student", "init_from")),
)
"""settings that name files with weights"""
GROUPS = ("dataset", "teacher", "trainer", "logger", *BASES)


@dataclass
class Paths:
    """Folders; relative paths start from the working folder."""

    data: str
    outputs: str

    def __post_init__(self) -> None:
        for name in ("data", "outputs"):
            check(self, name, getattr(self, name) != "", "name a folder")
            place = Path(getattr(self, name))
            nearest = next(path for path in (place, *place.absolute().parents) if path.exists())
            if not nearest.is_dir():
                raise ConfigError(f"{name}={place}: {nearest} is a file; name a folder")


@dataclass
class SweepSettings:
    """How a multirun treats jobs that an earlier multirun has run."""

    rerun: str
    """`missing` skips jobs that are done and resumes interrupted ones; `all` runs every job again."""

    def __post_init__(self) -> None:
        check_choice(self, "rerun", ("missing", "all"))


@dataclass
class TeacherSource:
    """The teacher's settings besides its model, optimiser and schedule."""

    checkpoint: str | None
    """A run folder, .safetensors or .ckpt file; null takes the stored teacher, trained first if need be."""
    seed: int
    max_epochs: int
    train_fraction: float
    """As `dataset.train_fraction`, which is the student's."""
    trained: bool
    """False leaves it with the random weights that training would start from: a control arm."""
    cache: str
    """`auto` computes the teacher's outputs once for images without random augmentation; `off` every time."""
    cache_gib: float
    """The most device memory that these outputs may take, in GiB."""
    trainer: dict[str, Any]
    """Arguments of Lightning's Trainer for the teacher's own run, but for `max_epochs` and MACHINE."""

    def __post_init__(self) -> None:
        check_seed(self)
        check_at_least(1, self, "max_epochs")
        check_fraction(self, "train_fraction")
        for name in self.trainer:
            if name == "max_epochs":
                raise ConfigError("trainer.max_epochs: leave it out; teacher.max_epochs is that setting")
            if name in MACHINE:
                raise ConfigError(f"trainer.{name}: leave it out; trainer.{name} is the teacher's as well")
        if not self.trained and self.checkpoint is not None:
            raise ConfigError(f"trained=false: {self.checkpoint} is trained; set one of the two")
        self.cache = unquoted(self.cache)
        check_choice(self, "cache", ("auto", "off"))
        check(self, "cache_gib", 0 < self.cache_gib < math.inf, "must be above 0; cache=off keeps nothing")


@dataclass
class Teacher(TeacherSource):
    """The teacher and how it is trained if it is not stored yet."""

    model: ModelConfig
    optimizer: Optimizer
    schedule: Schedule


# Settings of `trainer` that say on what a run is computed: the teacher's run takes them from its student's.
MACHINE = ("accelerator", "devices", "num_nodes", "strategy", "deterministic", "benchmark")

# The keys of the teacher's group that are not its model's.
TEACHER_KEYS = {f.name for f in fields(Teacher)} - {"model"}


@dataclass
class Root:
    """The settings that belong to no group."""

    alpha: float
    """Weight of the *class* loss: alpha·L_class + (1 − alpha)·L_transfer. 1 is the student alone. DeiT's and
    vit-pytorch's alpha weigh the other term."""
    label_smoothing: float
    """The share of a label's weight that is spread over all classes (Szegedy et al. 2016); 0 for none."""
    seed: int
    name: str | None
    """The run folder's name; null makes one from the overrides."""
    debug: str | None
    """The option chosen in conf/debug: a run to look for mistakes by, and no result; null for none."""
    log_every_n_steps: int
    pictures_every_n_epochs: int
    """Epochs between attention pictures in TensorBoard, besides those at the end; 0 for no picture at all."""
    checkpoint_minutes: float
    """A checkpoint is written at every epoch's end and when this much time has passed since the last one."""
    resume: str | None
    """`auto` resumes an interrupted run of the same configuration; null starts a new one beside it."""
    ema_decay: float | None
    """Validate and keep an exponential moving average of the student's weights; null keeps the weights. The
    decay starts low and grows to this value."""
    matmul_precision: str
    """Precision of float32 matrix products and convolutions: `highest` is float32; `high` and `medium` may
    round the factors, on NVIDIA GPUs to TF32. `auto` is `high` there, `highest` elsewhere."""
    cuda_graph: str
    """`auto` replays training steps on a GPU from a CUDA graph where possible; `off` never does."""
    kernels: str
    """`auto` computes layers on a GPU by Triton kernels of this package where there are any; `off` never."""
    compile: bool
    """torch.compile the losses of a training step, models included."""
    sweep: SweepSettings
    paths: Paths

    def __post_init__(self) -> None:
        meaning = "it weighs the class loss (1 is labels alone, 0 the teacher alone)"
        check(self, "alpha", 0 <= self.alpha <= 1, f"must lie in [0, 1]; {meaning}")
        check(self, "label_smoothing", 0 <= self.label_smoothing < 1, "must lie in [0, 1)")
        check_seed(self)
        check_at_least(1, self, "log_every_n_steps")
        check(self, "pictures_every_n_epochs", self.pictures_every_n_epochs >= 0, "must be 0 (never) or more")
        check(self, "checkpoint_minutes", self.checkpoint_minutes >= 0, "must be 0 (every step) or more")
        for name in ("cuda_graph", "kernels"):
            setattr(self, name, unquoted(getattr(self, name)))
            check_choice(self, name, ("auto", "off"))
        check_choice(self, "resume", ("auto", None))
        check_choice(self, "debug", (*DEBUG_OPTIONS, None))
        is_share = self.ema_decay is None or 0 < self.ema_decay < 1
        check(self, "ema_decay", is_share, "must lie between 0 and 1, or be null")
        check_choice(self, "matmul_precision", ("auto", "highest", "high", "medium"))
        if self.name is not None:
            is_one_folder = Path(self.name).name == self.name and self.name not in ("", "..")
            check(self, "name", is_one_folder, "must be one folder name, without slashes")
            is_short = len(self.name.encode()) <= LONGEST_NAME
            check(self, "name", is_short, f"must be at most {LONGEST_NAME} bytes long")


@dataclass
class Config(Root):
    """All settings of a run, typed and checked."""

    dataset: Dataset
    student: ModelConfig
    teacher: Teacher
    method: Method
    weighting: Weighting
    granularity: Granularity
    loss: AttentionLoss
    optimizer: Optimizer
    schedule: Schedule
    trainer: dict[str, Any]
    """Arguments of Lightning's Trainer."""
    loggers: dict[str, LoggerOption]
    """by name; empty for metrics.csv alone"""
    resolved: dict[str, Any] = field(repr=False)
    """The configuration as plain values, with every interpolation resolved: what config.yaml holds."""

    @property
    def outputs(self) -> Path:
        """The folder of its run and its teacher; a debug run's is apart from all others."""
        return Path(self.paths.outputs, "debug") if self.debug else Path(self.paths.outputs)


def parse(composed: DictConfig) -> Config:
    """Check a composed configuration and turn it into objects; reads no images and writes nothing.

    Raises ConfigError for the first mistake.
    """
    plain = resolve(composed)
    dataset = build("dataset", plain["dataset"], Dataset)
    if dataset.num_classes is None:
        # The number of classes of an image folder is only known from its files.
        dataset.num_classes = dataset.inspect(Path(plain["paths"]["data"]))
        composed = composed.copy()
        composed.dataset.num_classes = dataset.num_classes
        plain = resolve(composed)
    root = instantiate("", Root, {key: value for key, value in plain.items() if key not in GROUPS})
    built = {group: build(group, plain[group], base) for group, base in BASES.items()}
    if not dataset.validates:
        plain["trainer"]["limit_val_batches"] = 0
    teacher, trainer = _teacher(plain["teacher"]), plain["trainer"]
    built["loggers"] = {n: build(f"logger.{n}", node, LoggerOption) for n, node in plain["logger"].items()}
    config = Config(**vars(root), **built, dataset=dataset, teacher=teacher, trainer=trainer, resolved=plain)
    config.resolved = recorded(plain, config)
    check_batch_size(dataset.batch_size, config.student, config.method)
    check_views(dataset, config.method)
    for group, model in (("student", config.student), ("teacher", teacher.model)):
        check_images(group, model, dataset)
    return config


def resolve(composed: DictConfig) -> dict[str, Any]:
    """A composed configuration as plain values, with absolute paths; ConfigError where a group is none."""
    plain = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))
    check_text(plain)
    plain.setdefault("logger", {})  # absent with logger=[]
    for group in (*GROUPS, "paths"):
        if plain.get(group) is None:
            raise ConfigError(f"{group}: is missing and required")
        check_group(group, plain[group])
    make_paths_absolute(plain)
    if plain.get("debug") == "overfit":
        leave_out_randomness(plain)
    return plain


def recorded(node: Mapping[str, Any], settings: Any) -> dict[str, Any]:
    """The settings of a node with the values, and so the types, that the object built from it has.

    Left out are augmentations that are not applied: they change nothing.
    """
    values = vars(settings) | (vars(settings.model) if isinstance(settings, Teacher) else {})
    values |= values.get(getattr(settings, "REST", None), {})
    is_augment = isinstance(settings, Augment)
    built = {key: values.get(key, value) for key, value in node.items() if key in values or not is_augment}
    return {key: recorded(node[key], each) if is_dataclass(each) else each for key, each in built.items()}


def make_paths_absolute(plain: dict[str, Any]) -> None:
    """Make the paths of what is read absolute, so that config.yaml means the same in any working folder.

    Raises ConfigError for a path that is no text.
    """
    for group, key in (("paths", "data"), ("dataset", "root"), *READ_BY_MODELS):
        if (place := plain[group].get(key)) is not None:
            if not isinstance(place, str) or not place:
                raise ConfigError(f"{group}.{key}={place}: must be text, the path of a file or folder")
            plain[group][key] = str(Path(place).resolve())
    if isinstance(runs := plain["student"].get("runs"), list):
        plain["student"]["runs"] = [str(Path(run).resolve()) if isinstance(run, str) else run for run in runs]


def teacher_run(config: Config) -> Config:
    """The run that trains the teacher: on the job's data set and machine, by the teacher's own settings."""
    node = config.resolved["teacher"]
    model = {key: value for key, value in node.items() if key not in TEACHER_KEYS}
    none = {"_target_": f"{NoDistillation.__module__}.{NoDistillation.__name__}"}
    machine = {key: value for key, value in config.trainer.items() if key in MACHINE}
    trainer = machine | node["trainer"] | {"max_epochs": node["max_epochs"]}
    own = {"student": model, "method": none, "trainer": trainer, "ema_decay": None, "label_smoothing": 0.0}
    own |= {key: node[key] for key in ("optimizer", "schedule", "seed")}
    own["dataset"] = config.resolved["dataset"] | {"train_fraction": node["train_fraction"]}
    return parse(OmegaConf.create(config.resolved | own))


def name_in_job(setting: str) -> str:
    """A setting of the teacher's own run as a job sets it that needs the teacher: student.x is teacher.x."""
    group, _, key = setting.partition(".")
    if group == "student" or setting in ("trainer.max_epochs", "dataset.train_fraction"):
        return f"teacher.{key}"
    is_teachers = group in ("optimizer", "schedule", "seed") or (group == "trainer" and key not in MACHINE)
    return f"teacher.{setting}" if is_teachers else setting


def check_seed(settings: Root | TeacherSource) -> None:
    """ConfigError unless PyTorch takes the seed."""
    check(settings, "seed", 0 <= settings.seed < 2**32, f"must be a whole number from 0 to {2**32 - 1}")


def _teacher(node: dict[str, Any]) -> Teacher:
    """The teacher of the group's node, whose settings are the model's and the teacher's own."""
    own = {f.name: node[f.name] for f in fields(TeacherSource) if f.name in node}
    for group in ("optimizer", "schedule"):
        if isinstance(option := node.get(group), str):
            raise ConfigError(f"teacher.{group}={option}: write {group}@teacher.{group}={option}")
    return Teacher(
        **vars(instantiate("teacher", TeacherSource, own)),
        model=build("teacher", {k: v for k, v in node.items() if k not in TEACHER_KEYS}, ModelConfig),
        optimizer=build("teacher.optimizer", node.get("optimizer"), Optimizer),
        schedule=build("teacher.schedule", node.get("schedule"), Schedule),
    )
