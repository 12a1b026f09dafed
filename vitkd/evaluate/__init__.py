"""Measuring a trained model on a split."""
