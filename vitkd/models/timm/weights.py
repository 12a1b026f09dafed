"""The weights of timm's networks that come from its authors or from a file; nothing is ever unpickled."""

import logging
import warnings
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vitkd.errors import ConfigError, one_line
from vitkd.models.timm.create import Options, created, only_errors

log = logging.getLogger("vitkd")

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module")
"""the keys under which training scripts save a model, the one to prefer first"""


def pretrained(name: str, num_classes: int, options: Options) -> nn.Module:
    """timm's network with its published weights, but for a head of another number of classes."""
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        raise ConfigError(
            f"pretrained=true: timm knows no weights of {name}; set weights=FILE, or pretrained=false"
        )
    try:
        with only_errors():
            network: nn.Module = timm.create_model(name, pretrained=True, num_classes=num_classes, **options)
    except Exception as error:  # of Hugging Face's hub, of urllib, and for lack of space
        raise ConfigError(
            f"pretrained=true: the weights of {name} are unavailable ({shortened(error)}); connect to a "
            "network, put them into Hugging Face's cache (HF_HOME), set weights=FILE, or pretrained=false"
        ) from error
    return network


def shortened(error: Exception) -> str:
    """An error's first sentence; those of downloads go on for lines."""
    return one_line(error).partition(". ")[0][:200]


def from_file(name: str, num_classes: int, options: Options, file: str) -> nn.Module:
    """timm's network with the weights in a file, but for a head of another number of classes.

    Positions are interpolated and names translated as timm does it for its own files.

    Raises:
        ConfigError: the file cannot be read, holds code, or the weights of another architecture.
    """
    weights = read_weights(Path(file))
    network = created(name, num_classes, options)
    heads = heads_of(name)
    classes = classes_in(weights, heads)
    given = {"state_dict": weights, "num_classes": classes}
    try:
        # All of them have to fit, so they are loaded with their own head first.
        with only_errors():
            whole = timm.create_model(
                name, pretrained=True, num_classes=classes, pretrained_cfg_overlay=given, **options
            )
    except Exception as error:
        raise ConfigError(f"weights={file}: are not those of {name} ({shortened(error)})") from error
    is_new = classes != num_classes
    kept = {k: v for k, v in whole.state_dict().items() if not (is_new and k.rpartition(".")[0] in heads)}
    network.load_state_dict(kept, strict=not is_new)
    return network


def classes_of(name: str, file: str | None) -> int:
    """The number of classes of the weights in a file, or of the published ones; 0 if they have no head."""
    if file is not None:
        return classes_in(read_weights(Path(file)), heads_of(name))
    cfg = timm.get_pretrained_cfg(name)
    return cfg.num_classes if cfg else 0


def classes_in(weights: Mapping[str, Tensor], heads: Sequence[str]) -> int:
    """The number of classes of weights, by the names of their heads; 0 if they have none."""
    rows = [len(weights[f"{head}.weight"]) for head in heads if f"{head}.weight" in weights]
    return rows[0] if rows else 0


def heads_of(name: str) -> tuple[str, ...]:
    """The names of the layers from which a network's logits come."""
    cfg = timm.get_pretrained_cfg(name)
    names = (cfg and cfg.classifier) or "head"
    return (names,) if isinstance(names, str) else tuple(names)


def say_new_head(name: str, before: int, now: int) -> None:
    """Log that the classifier is a new one, to be trained on the data set, if it is."""
    if before != now:
        had = (
            f"its head of {before} classes is replaced by" if before else "its weights have no head, it gets"
        )
        log.info("%s: %s a new one of %d, to be trained", name, had, now)


def check_file(file: Path) -> None:
    """ConfigError unless there is such a file, of a kind that `read_weights` reads."""
    if file.suffix not in SUFFIXES:
        raise ConfigError(f"weights={file}: must be a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file")
    if not file.is_file():
        raise ConfigError(f"weights={file}: there is no such file")


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors in a .safetensors file, or in one of PyTorch's, which must hold nothing but plain data."""
    check_file(file)
    try:
        content: Any = load_file(file) if file.suffix == ".safetensors" else load_plain(file)
    # Foreign bytes make the unpickler raise almost anything.
    except Exception as error:
        raise ConfigError(
            f"weights={file}: refused, it is damaged or holds code, not plain weights"
        ) from error
    wrapper = next((key for key in WRAPPERS if isinstance(content, dict) and key in content), None)
    weights = content if wrapper is None else content[wrapper]
    tensors = weights.values() if isinstance(weights, dict) else ()
    if not tensors or not all(isinstance(value, Tensor) for value in tensors):
        raise ConfigError(f"weights={file}: holds no weights by their names")
    return {str(key).removeprefix("module."): value for key, value in weights.items()}


def load_plain(file: Path) -> Any:
    """What `torch.save` wrote, without any code that may be in it."""
    # timm's training script stores its arguments beside the weights, as such a namespace.
    with warnings.catch_warnings(), torch.serialization.safe_globals([Namespace]):
        warnings.simplefilter("ignore")
        return torch.load(file, map_location="cpu", weights_only=True)
