"""The typed configuration of a run, its schema, and what each setting is for."""
