"""How fast vitkd is, as ratios measured side by side: `python -m benchmarks.NAME`, NAME as the files here."""
