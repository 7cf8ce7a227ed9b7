"""Schedules that the field has drawn by hand, each for the problems that it is for."""

from __future__ import annotations

from .catalogue import NAMES, NamedSchedule, fitting, named, problem_for

__all__ = ["NAMES", "NamedSchedule", "fitting", "named", "problem_for"]
