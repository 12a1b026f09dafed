"""What each setting is for: which runs, teachers, stacks and arms differ because it differs.

All code that tells settings apart asks here. A new setting needs an entry only if two runs that differ in it
may share something. Nothing here imports PyTorch: the report reads this table too.
"""

from collections.abc import Iterator, Mapping
from enum import Flag, auto
from typing import Any


class Separates(Flag):
    """What cannot be shared by two runs that differ in a setting."""

    NOTHING = 0
    RUNS = auto()
    """One does not resume the other, nor count as done because the other is."""
    NAMES = auto()
    """The run folder's name says which one it is."""
    TEACHERS = auto()
    """Of two runs that train teachers: the trained teachers are different ones."""
    STACKS = auto()
    """Students of one stack have the same value."""
    EXPERIMENTS = auto()
    """The report does not compare them."""
    ARMS = auto()
    """The report does not count them as seeds of one arm."""

    ALL = RUNS | NAMES | TEACHERS | STACKS | EXPERIMENTS | ARMS
    SPEED = RUNS | NAMES | STACKS
    """Those of settings that change results by rounding at most."""
    LEARNING = RUNS | NAMES | ARMS
    """Those of settings that say what a student learns from: each student of a stack has its own."""
    RATES = RUNS | NAMES | TEACHERS | EXPERIMENTS | ARMS
    """Those of settings that say how fast a student learns: each student of a stack has its own."""


ROLES: dict[str, Separates] = {
    # Which vitkd made the run: a run of another version is refused before anything is compared.
    "version": Separates.NOTHING,
    # Where files lie and how often to look. A stack reads its images from one place.
    "paths": Separates.STACKS,
    "logger": Separates.STACKS,
    "name": Separates.NOTHING,
    "resume": Separates.NOTHING,
    "sweep": Separates.NOTHING,
    "checkpoint_minutes": Separates.NOTHING,
    "pictures_every_n_epochs": Separates.NOTHING,
    # How a result is computed.
    "log_every_n_steps": Separates.SPEED & ~Separates.NAMES,
    "cuda_graph": Separates.SPEED,
    "kernels": Separates.SPEED,
    "compile": Separates.SPEED,
    "trainer.accelerator": Separates.SPEED & ~Separates.NAMES,
    "trainer.strategy": Separates.SPEED,
    "trainer.deterministic": Separates.SPEED | Separates.TEACHERS,
    "teacher.cache": Separates.SPEED,
    "teacher.cache_gib": Separates.SPEED,
    "dataset.eval_batch_size": Separates.SPEED,
    "dataset.resident_limit_gib": Separates.SPEED,
    "dataset.workers": Separates.SPEED,
    "dataset.download": Separates.SPEED,
    # The default of trainer.max_epochs and teacher.max_epochs, which count.
    "dataset.max_epochs": Separates.SPEED,
    # A stored teacher is found by its images' contents, wherever they lie.
    "dataset.root": Separates.ALL & ~Separates.TEACHERS,
    # Likewise a file with weights to begin with.
    "student.weights": Separates.ALL & ~Separates.TEACHERS,
    "student.init_from": Separates.ALL & ~Separates.TEACHERS,
    # Of students that are merged: their paths would make a long name.
    "student.runs": Separates.ALL & ~Separates.NAMES,
    "student.seed": Separates.RUNS,
    # What a student learns from.
    "alpha": Separates.LEARNING,
    "method": Separates.LEARNING,
    "granularity": Separates.LEARNING,
    "loss": Separates.LEARNING,
    "weighting": Separates.LEARNING,
    "teacher": Separates.LEARNING | Separates.STACKS,
    # How fast a student learns.
    "label_smoothing": Separates.RATES,
    "schedule": Separates.RATES,
    "optimizer.lr": Separates.RATES,
    "optimizer.weight_decay": Separates.RATES,
    # What the report averages over.
    "seed": Separates.RUNS | Separates.NAMES | Separates.TEACHERS,
}
"""Settings, or whole groups of them, and what they separate. All others separate everything."""

NEW_TO_MODELS: dict[str, Any] = {
    **{"drop_path_rate": 0.0, "drop_path_uniform": False},
    **{"init": None, "init_layers": "first", "init_from": None},
}
ABSENT: dict[str, Any] = {
    **{f"{model}.{name}": value for model in ("student", "teacher") for name, value in NEW_TO_MODELS.items()},
    **dict.fromkeys(("method.share_drop_path", "method.attention.share_drop_path"), False),
    **dict.fromkeys(("optimizer.decay_all", "teacher.optimizer.decay_all"), True),
    **dict.fromkeys(("optimizer.layer_decay", "teacher.optimizer.layer_decay"), 1.0),
    "dataset.mix.mixup_alpha": 0.0,
    "dataset.mix.cutmix_alpha": 0.0,
    "dataset.mix.prob": 1.0,
    "dataset.mix.switch_prob": 0.5,
    "dataset.passes": 1,
    "dataset.repeats": 1,
    "dataset.augment.then": [],
}
"""Settings that a stored configuration may lack because it is older, and what they were by then.

At this value a setting is as good as not being there, so that older runs and teachers stay what they are.
"""

# Choices of groups that name no folder: the experiment stands in its path, trainer=… picks hardware.
UNNAMED_CHOICES = {"experiment", "trainer"}


def separates(setting: str, what: Separates) -> bool:
    """Whether different values of a setting, as `group.key`, separate all of `what`.

    A setting without an entry has that of its nearest group.
    """
    names = setting.split(".")
    above = (".".join(names[:length]) for length in range(len(names), 0, -1))
    return what in next((ROLES[name] for name in above if name in ROLES), Separates.ALL)


def names_folder(override: str) -> bool:
    """Whether a setting, or a choice of a group, on the command line is part of the run folder's name."""
    return override not in UNNAMED_CHOICES and separates(override, Separates.NAMES)


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings one by one, as (`group.key`, value); an empty group is a value."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def relevant(config: Mapping[str, Any], what: Separates) -> dict[str, Any]:
    """The settings in a nested configuration that separate `what`, by `group.key`; none as in `ABSENT`."""
    return {
        name: value
        for name, value in flatten(config)
        if separates(name, what) and (name not in ABSENT or value != ABSENT[name])
    }


def first_difference(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> str | None:
    """The first setting that separates runs and in which two configurations differ, as `group.key`, or None.

    Null is as good as not being there.
    """
    for key in {**one, **other}:
        name = f"{prefix}{key}"
        mine, theirs = (settings[key] if key in settings else _absent(name) for settings in (one, other))
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            if (found := first_difference(mine, theirs, f"{name}.")) is not None:
                return found
        elif mine != theirs and separates(name, Separates.RUNS):
            return name
    return None


def _absent(name: str) -> Any:
    """What a setting is that is not there; a group of such settings is empty."""
    return {} if any(each.startswith(f"{name}.") for each in ABSENT) else ABSENT.get(name)
