"""Comparing attention maps: which map learns from which, what makes two maps alike, what controls for it."""
