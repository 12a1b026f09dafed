"""Tables with error bars, verdicts and plots of finished runs: `python -m vitkd.report`."""
