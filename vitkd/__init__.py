"""Teach a small Vision Transformer where to look."""

__version__ = "0.1.0"
