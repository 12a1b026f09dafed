"""The typed configuration: what Hydra composed, checked as a whole before anything is loaded or written.

Every group's option names a class by `_target_`. That class, a dataclass, *is* the option's schema: its
fields are the keys and types, its `__post_init__` the ranges. So a new option is one class and one YAML.
"""

import importlib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vitkd.data import Dataset
from vitkd.distill.granularity import Granularity
from vitkd.distill.losses import AttentionLoss
from vitkd.distill.methods import Method, NoDistillation
from vitkd.distill.optimization import AdamW, Schedule
from vitkd.errors import ConfigError, suggest
from vitkd.models import ViTConfig

PACKAGE = Path(__file__).parent
# In a wheel conf/ lies inside the package, in a checkout beside it.
CONF_DIR = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir())

# File systems take 255 bytes a name; the rest is for suffixes.
LONGEST_NAME = 160

GROUPS = (
    *("dataset", "student", "teacher", "method", "granularity", "loss"),
    *("optimizer", "schedule", "trainer"),
)


@dataclass
class Paths:
    """Where things lie; relative paths start from the working folder."""

    data: str
    outputs: str

    def __post_init__(self) -> None:
        for name in ("data", "outputs"):
            place = Path(getattr(self, name))
            nearest = next(path for path in (place, *place.absolute().parents) if path.exists())
            if not nearest.is_dir():
                raise ConfigError(f"{name}={place}: {nearest} is a file; name a folder")


@dataclass
class TeacherSource:
    """What a teacher is besides its shape, optimiser and schedule."""

    checkpoint: str | None
    """A run folder, .safetensors or .ckpt file; null takes the teacher from the store, trained at need."""
    seed: int
    max_epochs: int

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.max_epochs < 1:
            raise ConfigError(f"max_epochs={self.max_epochs}: must be at least 1")


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
        check_seed(self.seed)
        if self.log_every_n_steps < 1:
            raise ConfigError(f"log_every_n_steps={self.log_every_n_steps}: must be at least 1")
        if self.pictures_every_n_epochs < 0:
            raise ConfigError(
                f"pictures_every_n_epochs={self.pictures_every_n_epochs}: must be 0 (never) or more"
            )
        if self.name is not None and (Path(self.name).name != self.name or self.name in ("", ".", "..")):
            raise ConfigError(f"name={self.name}: must be one folder name, without slashes")
        if self.name is not None and len(self.name.encode()) > LONGEST_NAME:
            raise ConfigError(f"name={self.name}: must be at most {LONGEST_NAME} bytes long")


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
    """Check a composed configuration and turn it into objects; reads no images and writes nothing.

    Raises ConfigError, with one line, for the first thing that is wrong.
    """
    composed = composed.copy()
    for group in GROUPS:
        if composed.get(group) is None:
            raise ConfigError(f"{group}: is missing, and nothing can do without it")
    dataset = build("dataset", composed.dataset, Dataset)
    if dataset.num_classes is None:
        # A folder of one's own images shows its number of classes only when looked at.
        composed.dataset.num_classes = dataset.num_classes = dataset.inspect(Path(composed.paths.data))
    plain = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))
    record_whereabouts(plain)
    root = instantiate("", Root, {key: value for key, value in plain.items() if key not in GROUPS})
    if not dataset.val_fraction:
        plain["trainer"]["limit_val_batches"] = 0
    return Config(
        **{f.name: getattr(root, f.name) for f in fields(Root)},
        dataset=dataset,
        student=build("student", plain["student"], ViTConfig),
        teacher=_teacher(plain["teacher"]),
        method=build("method", plain["method"], Method),
        granularity=build("granularity", plain["granularity"], Granularity),
        loss=build("loss", plain["loss"], AttentionLoss),
        optimizer=build("optimizer", plain["optimizer"], AdamW),
        schedule=build("schedule", plain["schedule"], Schedule),
        trainer=plain["trainer"],
        resolved=plain,
    )


def record_whereabouts(plain: dict[str, Any]) -> None:
    """Make the paths of data absolute, so that the run can be measured again from any folder."""
    plain["paths"]["data"] = str(Path(plain["paths"]["data"]).resolve())
    if plain["dataset"].get("root"):
        plain["dataset"]["root"] = str(Path(plain["dataset"]["root"]).resolve())


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
        is_kind = inspect.isclass(found) and issubclass(found, base) and not inspect.isabstract(found)
        if is_kind and found.__module__.startswith("vitkd."):
            return cast(type, found)
    raise ConfigError(f"{key}._target_={target}: only vitkd's own {base.__name__} classes are allowed")


def instantiate(key: str, cls: type, settings: Mapping[str, Any]) -> Any:
    """An instance of the dataclass `cls`, every setting checked against its field's name and type."""
    prefix = f"{key}." if key else ""
    known = [f.name for f in fields(cls)]
    for name in settings:
        if name not in known:
            raise ConfigError(f"{prefix}{name}: no such setting; {suggest(name, known)}")
    schema = OmegaConf.structured(cls)
    for name, value in settings.items():
        try:
            schema = OmegaConf.merge(schema, {name: value})
        except OmegaConfBaseException as error:
            raise ConfigError(f"{prefix}{name}={value}: must be {type_of(cls, name)}") from error
    try:
        return OmegaConf.to_object(schema)
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from error


def type_of(cls: type, name: str) -> str:
    """The type of a dataclass's field, in a person's words."""
    kind = get_type_hints(cls)[name]
    text = kind.__name__ if inspect.isclass(kind) and not get_args(kind) else str(kind)
    for code, words in {"None": "null", "float": "a number", "int": "a whole number", "str": "text"}.items():
        text = re.sub(rf"\b{code}\b", words, text)
    return text.replace(" | ", " or ")


def check_seed(seed: int) -> None:
    """ConfigError unless PyTorch takes `seed`."""
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed}: must be a whole number from 0 to {2**32 - 1}")


def _teacher(node: dict[str, Any]) -> Teacher:
    """Split the group's node into the model's settings and the teacher's own."""
    own = instantiate("teacher", TeacherSource, {f.name: node[f.name] for f in fields(TeacherSource)})
    return Teacher(
        **vars(own),
        model=build("teacher", {k: v for k, v in node.items() if k not in TEACHER_KEYS}, ViTConfig),
        optimizer=build("teacher.optimizer", node["optimizer"], AdamW),
        schedule=build("teacher.schedule", node["schedule"], Schedule),
    )
