"""Reading models back from a run's files; nothing is ever unpickled."""

import warnings
from pathlib import Path
from typing import Any

import torch

from vitkd.errors import ConfigError
from vitkd.models import ViT, build_from_header, load_model


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A Lightning checkpoint's content, on the CPU.

    Raises ConfigError if it is absent, damaged, or holds anything but plain data and tensors.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    # Foreign bytes make the unpickler raise almost anything.
    except Exception as error:
        raise ConfigError(f"{path}: refused, it is damaged or holds code instead of plain weights") from error
    if not isinstance(content, dict) or not {"model", "state_dict", "epoch"} <= content.keys():
        raise ConfigError(f"{path}: is not a checkpoint of vitkd's")
    return content


def load_from_checkpoint(path: Path) -> tuple[ViT, int]:
    """The trained model of a checkpoint, in eval mode, and the epoch (from 1) after which it was saved."""
    content = read_checkpoint(path)
    model = build_from_header(content["model"], path)
    prefix = "model."
    weights = {k.removeprefix(prefix): v for k, v in content["state_dict"].items() if k.startswith(prefix)}
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ConfigError(f"{path}: its weights do not fit the model that it describes") from error
    return model.float().eval(), content["epoch"] + 1


def load_any(path: Path) -> ViT:
    """The model in a run folder, a .safetensors file or a .ckpt file, in eval mode on the CPU."""
    if path.is_dir():
        path = path / "student.safetensors"
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file; give a run folder, a .safetensors or a .ckpt file")
    return load_model(path) if path.suffix == ".safetensors" else load_from_checkpoint(path)[0]
