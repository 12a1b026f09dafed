"""The typed configuration of a run, and its schema."""

from vitkd.config.run import CONF_DIR, GROUPS, LONGEST_NAME, Config, Teacher, parse, teacher_run

__all__ = ["CONF_DIR", "GROUPS", "LONGEST_NAME", "Config", "Teacher", "parse", "teacher_run"]
