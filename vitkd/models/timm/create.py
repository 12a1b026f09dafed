"""Networks of timm's by name and options, with random weights, and those that `init` gives them."""

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import timm
from torch import nn

from vitkd.errors import ConfigError, one_line, suggest
from vitkd.models.mimetic import make_mimetic
from vitkd.models.output import AttentionLayout

Options = Mapping[str, Any]

SET_BY_VITKD = {
    "num_classes": "it follows the data set",
    "in_chans": "a grey image is given as three equal channels",
    "patch_drop_rate": "maps need all patches",
    **dict.fromkeys(("device", "dtype"), "set trainer.accelerator and trainer.precision"),
}
"""What timm's models take but vitkd sets, and why."""
MOST, MOST_BLOCKS = 2**16, 1000


@contextmanager
def only_errors() -> Iterator[None]:
    """Without timm's remarks on what it does, and those of the hub that it asks."""
    loggers = [logging.getLogger(name) for name in ("timm", "huggingface_hub")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def check_name(name: str) -> None:
    """ConfigError, with the nearest names, unless timm has a model called `name`, or NAME of "NAME.TAG"."""
    if ":" in name or not timm.is_model(name):
        known = timm.list_models()
        near = get_close_matches(name, known, n=3) or [each for each in known if each.startswith("vit_tiny")]
        raise ConfigError(f"name={name}: timm has no such model, it has {', '.join(near[:3])}, …")


def check_options(name: str, options: Options) -> None:
    """ConfigError unless the model's class takes each of `options`, with values that can be meant."""
    known = arguments_of(type(created(name, 1, {}))) if options else set()
    for key, value in options.items():
        if key in SET_BY_VITKD:
            raise ConfigError(f"{key}: is set by vitkd, leave it out; {SET_BY_VITKD[key]}")
        if key not in known:
            raise ConfigError(f"{key}: is no setting of timm's {name}; {suggest(key, known)}")
        most = MOST_BLOCKS if key in ("depth", "depths") else MOST
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not -most <= number <= most:
                raise ConfigError(f"{key}={value}: must be at most {most:,}")
        if key.endswith("_rate") and not (isinstance(value, int | float) and 0 <= value < 1):
            raise ConfigError(f"{key}={value}: must be a number in [0, 1)")
        if value == "skip":
            raise ConfigError(f"{key}=skip: leaves weights without values; leave it out")


def arguments_of(architecture: type[nn.Module]) -> set[str]:
    """The names of all arguments of an architecture, those of its base classes too."""
    names: set[str] = set()
    for each in architecture.__mro__:
        if each.__module__.startswith("timm."):
            parameters = inspect.signature(each).parameters.values()
            names |= {
                p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.kind is not p.VAR_POSITIONAL
            }
    return names - {"device", "dtype"}


def begin_mimetic(name: str, network: Any, layout: AttentionLayout) -> None:
    """Let a VisionTransformer begin as `make_mimetic` has it; ConfigError if it has no positions."""
    if network.pos_embed is None:
        raise ConfigError(f"init=mimetic: {name} has no position embedding; set init=null")
    layers = [(block.attn.qkv, block.attn.proj) for block in network.blocks]
    make_mimetic(layers, network.pos_embed, layout)


def created(name: str, num_classes: int, options: Options) -> nn.Module:
    """timm's network from PyTorch's global generator; ConfigError if timm cannot build it."""
    check_name(name)
    try:
        with only_errors():
            network: nn.Module = timm.create_model(name, num_classes=num_classes, **options)
    # Sizes that do not go together make timm and PyTorch raise almost anything.
    except Exception as error:
        shown = "".join(f", {key}={value}" for key, value in options.items())
        raise ConfigError(f"name={name}{shown}: timm cannot build that ({one_line(error)})") from error
    return network
