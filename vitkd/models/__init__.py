"""Images → `ViTOutput(logits, scores)`."""

from vitkd.models.vit import ViT, ViTConfig, ViTOutput, count_parameters
from vitkd.models.weights import build_from_header, describe, digest, load_model, save_model

__all__ = [
    "ViT",
    "ViTConfig",
    "ViTOutput",
    "build_from_header",
    "count_parameters",
    "describe",
    "digest",
    "load_model",
    "save_model",
]
