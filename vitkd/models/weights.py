"""One model in one safetensors file: the weights, and in its header everything needed to build the model."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vitkd.errors import ConfigError
from vitkd.models.vit import ViT, ViTConfig

CONFIGS = {config.__name__: config for config in (ViTConfig,)}


def save_model(model: ViT, path: Path, about: Mapping[str, str] | None = None) -> None:
    """Write `model` to `path`; `about` adds plain strings (which epoch, which run) to the header."""
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(weights, temporary, metadata={**(about or {}), **describe(model)})
    temporary.replace(path)


def describe(model: ViT) -> dict[str, str]:
    """The header from which `build_from_header` builds a model like `model`."""
    return {"config": type(model.config).__name__, "model": json.dumps(asdict(model.config))}


def load_model(path: Path) -> ViT:
    """Read the model in `path`, in eval mode, on the CPU.

    Raises ConfigError if the file is absent, damaged or not written by `save_model`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: cannot be read as a safetensors file ({error})") from error
    model = build_from_header(header, path)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ConfigError(f"{path}: its weights do not fit the model that its header describes") from error
    return model.eval()


def build_from_header(header: Mapping[str, str], path: Path) -> ViT:
    """The model that a file's header describes, without memory yet: load weights with `assign=True`.

    Raises ConfigError if it describes none.
    """
    try:
        config = CONFIGS[header["config"]]
        settings = json.loads(header["model"])
        known = {field.name for field in fields(config)}
        with torch.device("meta"):
            return config(**{name: settings[name] for name in settings if name in known}).build()
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: its header does not describe a vitkd model; give a student.safetensors or a run folder"
        ) from error
