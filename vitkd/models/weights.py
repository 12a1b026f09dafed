"""One model in one safetensors file: the weights, and in its header everything needed to build the model.

The header is one JSON text: several keys of metadata would be written in another order by each process.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from vitkd.errors import ConfigError, MissingPackageError
from vitkd.models.base import CONFIGS, Model, configuration, file_of
from vitkd.models.copying import CopyingConfig
from vitkd.models.resnet import ResNetConfig
from vitkd.models.timm.model import TimmConfig
from vitkd.models.vit import ViTConfig

CONFIGS.update({config.__name__: config for config in (ViTConfig, ResNetConfig, TimmConfig, CopyingConfig)})
HEADER = "vitkd"
"""The one key of the file's metadata."""


def save_model(model: Model, path: Path, about: Mapping[str, Any] | None = None) -> None:
    """Write `model` to `path`; `about` adds plain values (which epoch, which classes) to the header."""
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    header = {**(about or {}), **describe(model), "digest": digest(model)}
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(save(weights, metadata={HEADER: json.dumps(header, sort_keys=True)}))
    temporary.replace(path)


def describe(model: Model) -> dict[str, Any]:
    """The header from which `build_from_header` builds a model like `model`."""
    config = type(model.config)
    is_own = CONFIGS.get(config.__name__) is config
    name = config.__name__ if is_own else f"{config.__module__}.{config.__name__}"
    return {"config": name, "model": asdict(model.config)}


def load_model(path: Path | str) -> Model:
    """Read the model in the file or run folder `path`, in eval mode and float32, on the CPU.

    Raises ConfigError if the file is absent, damaged or not written by `save_model`.
    """
    path = file_of(Path(path))
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path}: cannot be read as a safetensors file, it is no regular file")
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: cannot be read as a safetensors file ({error})") from error
    header = read_header(path)
    model = build_from_header(header, path, weights)
    if header.get("digest", expected := digest(model)) != expected:
        raise ConfigError(f"{path}: is damaged, its weights are not those that were written")
    return model.float().eval()


def read_header(path: Path) -> dict[str, Any]:
    """What `save_model` wrote of the model in the file or run folder `path`; empty if it wrote none."""
    file = file_of(path)
    header: Any = None
    with suppress(OSError, SafetensorError, ValueError, RecursionError):
        if file.is_file():  # a pipe would be waited for
            with safe_open(file, framework="pt") as opened:
                header = json.loads((opened.metadata() or {}).get(HEADER, ""))
    return header if isinstance(header, dict) else {}


def build_from_header(
    header: Mapping[str, Any], path: Path, weights: Mapping[str, Any] | None = None
) -> Model:
    """The model that a file's header describes, with its weights; without them, it has no memory yet.

    Raises ConfigError if it describes none, or one that the weights do not fit.
    """
    try:
        config = configuration(header)
        if weights is not None and getattr(config, "depth", 0) > len(weights):
            raise ValueError("a block has weights; to build a billion blocks takes hours")
        with torch.device("meta"):
            model = config.architecture()
    except MissingPackageError as error:
        raise MissingPackageError(f"{path}: {error}") from error
    # Numbers that no machine holds make PyTorch raise almost anything.
    except Exception as error:
        raise ConfigError(
            f"{path}: its header does not describe a vitkd model; give a student.safetensors or a run folder"
        ) from error
    try:
        if weights is not None:
            model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ConfigError(f"{path}: its weights do not fit the model that its header describes") from error
    return model


def digest(model: nn.Module) -> str:
    """A short hash of a model's weights: equal for equal weights only."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        hasher.update(name.encode())
        hasher.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()[:12]
