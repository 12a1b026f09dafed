"""Models: images and `Taps` in, `Output` out."""

from vitkd.models.base import Model, ModelConfig, count_parameters
from vitkd.models.output import AttentionLayout, Output, Taps
from vitkd.models.resnet import ResNet, ResNetConfig
from vitkd.models.vit import ViT, ViTConfig
from vitkd.models.weights import build_from_header, describe, digest, load_model, save_model

__all__ = [
    "AttentionLayout",
    "Model",
    "ModelConfig",
    "Output",
    "ResNet",
    "ResNetConfig",
    "Taps",
    "ViT",
    "ViTConfig",
    "build_from_header",
    "count_parameters",
    "describe",
    "digest",
    "load_model",
    "save_model",
]
