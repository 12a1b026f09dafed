"""Attention scores → maps, measures and figures."""
