"""This operating-system process: signals, memory, state between jobs, other processes of the run."""
