"""Attention scores → pictures."""

from vitkd.explain.panel import attention_panel, cls_attention, denormalise, upsample

__all__ = ["attention_panel", "cls_attention", "denormalise", "upsample"]
