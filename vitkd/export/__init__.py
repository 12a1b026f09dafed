"""Writing a trained student as one file that works without vitkd."""
