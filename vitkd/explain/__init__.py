"""Attention scores → pictures."""

from vitkd.explain.gallery.figures import figure_1
from vitkd.explain.gallery.panel import cls_attention, denormalise, upsample

__all__ = ["cls_attention", "denormalise", "figure_1", "upsample"]
