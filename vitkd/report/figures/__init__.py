"""The plots of an experiment."""
