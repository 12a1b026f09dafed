"""The typed configuration: what Hydra composed, checked as a whole before anything is loaded or written.

Every group's option names a class by `_target_`. That class, a dataclass, *is* the option's schema: its
fields are the keys and types, its `__post_init__` the ranges. So a new option is one class and one YAML.
"""

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vitkd.data import Dataset
from vitkd.distill.granularity import Granularity
from vitkd.distill.losses import AttentionLoss
from vitkd.distill.methods import Method, NoDistillation
from vitkd.distill.optimization import AdamW, Schedule
from vitkd.errors import ConfigError
from vitkd.models import ViTConfig

PACKAGE = Path(__file__).parent
# In a wheel conf/ lies inside the package, in a checkout beside it.
CONF_DIR = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir())

# What Lightning's Trainer takes but vitkd decides.
RESERVED_TRAINER_KEYS = {
    "logger",
    "callbacks",
    "default_root_dir",
    "log_every_n_steps",
    "plugins",
    "profiler",
}


@dataclass
class Paths:
    """Where things lie; relative paths start from the working folder."""

    data: str
    outputs: str


@dataclass
class TeacherSource:
    """What a teacher is besides its shape, optimiser and schedule."""

    checkpoint: str | None
    """A run folder, .safetensors or .ckpt file; null takes the teacher from the store, trained at need."""
    seed: int
    max_epochs: int

    def __post_init__(self) -> None:
        check_seed("teacher.seed", self.seed)
        if self.max_epochs < 1:
            raise ConfigError(f"teacher.max_epochs={self.max_epochs}: must be at least 1")


@dataclass
class Teacher(TeacherSource):
    """The teacher and how it is trained, should it not be there yet."""

    model: ViTConfig
    optimizer: AdamW
    schedule: Schedule


# What stands in the teacher's group beside its model's settings.
TEACHER_KEYS = {f.name for f in fields(Teacher)} - {"model"}


@dataclass
class Root:
    """The settings that belong to no group."""

    alpha: float
    """Weight of the *class* loss: alpha·L_class + (1 − alpha)·L_att. 1 is the student alone. DeiT's and
    vit-pytorch's alpha weigh the other term."""
    seed: int
    name: str | None
    """The run folder's name; null makes one from the overrides."""
    log_every_n_steps: int
    pictures_every_n_epochs: int
    """How often attention pictures go to TensorBoard; 0 is never."""
    paths: Paths

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ConfigError(
                f"alpha={self.alpha}: must lie in [0, 1]; it weighs the class loss "
                "(1 is labels alone, 0 attention alone)"
            )
        check_seed("seed", self.seed)
        if self.log_every_n_steps < 1:
            raise ConfigError(f"log_every_n_steps={self.log_every_n_steps}: must be at least 1")
        if self.pictures_every_n_epochs < 0:
            raise ConfigError(
                f"pictures_every_n_epochs={self.pictures_every_n_epochs}: must be 0 (never) or more"
            )
        if self.name is not None and (not self.name or Path(self.name).name != self.name):
            raise ConfigError(f"name={self.name}: must be one folder name, without slashes")


@dataclass
class Config(Root):
    """A whole run, typed and checked."""

    dataset: Dataset
    student: ViTConfig
    teacher: Teacher
    method: Method
    granularity: Granularity
    loss: AttentionLoss
    optimizer: AdamW
    schedule: Schedule
    trainer: dict[str, Any]
    """Arguments of Lightning's Trainer."""
    resolved: dict[str, Any] = field(repr=False)
    """The plain configuration that this was read from, with every interpolation resolved."""


def parse(composed: DictConfig) -> Config:
    """Check a composed configuration and turn it into objects. Reads no data and writes nothing.

    Raises ConfigError, with one line, for the first thing that is wrong.
    """
    composed = composed.copy()
    dataset = build("dataset", composed.dataset, Dataset)
    paths = instantiate("paths", Paths, composed.paths)
    # A folder of one's own images shows its number of classes only when looked at.
    composed.dataset.num_classes = dataset.num_classes = dataset.inspect(Path(paths.data))
    plain = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))
    groups = (
        "dataset",
        "student",
        "teacher",
        "method",
        "granularity",
        "loss",
        "optimizer",
        "schedule",
        "trainer",
    )
    root = instantiate("", Root, {key: value for key, value in plain.items() if key not in groups})
    student = build("student", plain["student"], ViTConfig)
    return Config(
        **{f.name: getattr(root, f.name) for f in fields(Root)},
        dataset=dataset,
        student=student,
        teacher=_teacher(plain["teacher"]),
        method=build("method", plain["method"], Method),
        granularity=build("granularity", plain["granularity"], Granularity),
        loss=build("loss", plain["loss"], AttentionLoss),
        optimizer=build("optimizer", plain["optimizer"], AdamW),
        schedule=build("schedule", plain["schedule"], Schedule),
        trainer=check_trainer(plain["trainer"]),
        resolved=plain,
    )


def teacher_run(config: Config) -> Config:
    """The run that trains the teacher: the same job without distillation, with the teacher as its student."""
    teacher, node = config.teacher, config.resolved["teacher"]
    trainer = config.trainer | {"max_epochs": teacher.max_epochs}
    resolved = config.resolved | {
        "student": {key: value for key, value in node.items() if key not in TEACHER_KEYS},
        "method": {"_target_": f"{NoDistillation.__module__}.{NoDistillation.__name__}"},
        "optimizer": node["optimizer"],
        "schedule": node["schedule"],
        "trainer": trainer,
        "seed": teacher.seed,
    }
    return replace(
        config,
        student=teacher.model,
        method=NoDistillation(),
        optimizer=teacher.optimizer,
        schedule=teacher.schedule,
        trainer=trainer,
        seed=teacher.seed,
        resolved=resolved,
    )


def build(key: str, node: Mapping[str, Any], base: type) -> Any:
    """The object that a group's node describes, an instance of `base`.

    Raises ConfigError if `_target_` is not a class of vitkd's of that kind, or a setting does not fit it.
    """
    settings = {str(name): node[name] for name in node if name != "_target_"}
    return instantiate(key, allowed_class(key, str(node.get("_target_")), base), settings)


def allowed_class(key: str, target: str, base: type) -> type:
    """The subclass of `base` that `target` names.

    Only vitkd's own modules are ever imported, so a configuration file cannot name code to run.
    """
    module, _, name = target.rpartition(".")
    if module.split(".")[0] == "vitkd":
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ImportError:
            found = None
        if inspect.isclass(found) and issubclass(found, base) and found.__module__.startswith("vitkd."):
            return found
    raise ConfigError(f"{key}._target_={target}: only vitkd's own {base.__name__} classes are allowed")


def instantiate(key: str, cls: type, settings: Mapping[str, Any]) -> Any:
    """An instance of the dataclass `cls`, every setting checked against its field's name and type."""
    prefix = f"{key}." if key else ""
    known = [f.name for f in fields(cls)]
    for name in settings:
        if name not in known:
            raise ConfigError(f"{prefix}{name}: no such setting; {suggest(name, known)}")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), settings))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{prefix}{error.full_key}: {str(error).splitlines()[0]}") from error


def suggest(name: str, known: list[str]) -> str:
    """Words that lead from a mistyped name to the right one."""
    close = get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(known))}"


def check_trainer(settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` if Lightning's Trainer takes them all, else ConfigError."""
    accepted = set(inspect.signature(L.Trainer.__init__).parameters) - {"self"} - RESERVED_TRAINER_KEYS
    for name in settings:
        if name in RESERVED_TRAINER_KEYS:
            raise ConfigError(f"trainer.{name}: is decided by vitkd; leave it out")
        if name not in accepted:
            raise ConfigError(f"trainer.{name}: no such setting; {suggest(name, sorted(accepted))}")
    epochs = settings.get("max_epochs")
    if not isinstance(epochs, int) or epochs < 1:
        raise ConfigError(f"trainer.max_epochs={epochs}: must be a whole number of at least 1")
    try:
        L.Trainer(**settings, logger=False, enable_checkpointing=False)
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(
            f"trainer: {' '.join(str(error).split())}; trainer=auto fits this machine"
        ) from error
    return settings


def check_seed(key: str, seed: int) -> None:
    """ConfigError unless PyTorch takes `seed`."""
    if not 0 <= seed < 2**32:
        raise ConfigError(f"{key}={seed}: must be a whole number from 0 to {2**32 - 1}")


def _teacher(node: dict[str, Any]) -> Teacher:
    """Split the group's node into the model's settings and the teacher's own."""
    own = instantiate("teacher", TeacherSource, {f.name: node[f.name] for f in fields(TeacherSource)})
    return Teacher(
        **vars(own),
        model=build("teacher", {k: v for k, v in node.items() if k not in TEACHER_KEYS}, ViTConfig),
        optimizer=build("teacher.optimizer", node["optimizer"], AdamW),
        schedule=build("teacher.schedule", node["schedule"], Schedule),
    )
