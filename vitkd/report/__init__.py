"""Runs → understanding: tables with error bars, verdicts in words, pictures (`python -m vitkd.report`)."""
