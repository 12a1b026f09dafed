"""Attention scores → maps, measures and figures."""

from vitkd.explain.gallery.figures import denormalise, figure_1, upsample
from vitkd.explain.maps.attention import cls_attention

__all__ = ["cls_attention", "denormalise", "figure_1", "upsample"]
