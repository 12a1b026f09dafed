"""Images → `ModelOutput(logits, scores)`."""

from vitkd.models.base import Model, ModelConfig, ModelOutput, TokenLogits, count_parameters
from vitkd.models.resnet import ResNet, ResNetConfig
from vitkd.models.vit import ViT, ViTConfig
from vitkd.models.weights import build_from_header, describe, digest, load_model, save_model

__all__ = [
    "Model",
    "ModelConfig",
    "ModelOutput",
    "ResNet",
    "ResNetConfig",
    "TokenLogits",
    "ViT",
    "ViTConfig",
    "build_from_header",
    "count_parameters",
    "describe",
    "digest",
    "load_model",
    "save_model",
]
