"""Pipeline schedules for people to look at: text, one self-contained page, a picture, a trace, and files."""

from __future__ import annotations

from .files import load_problem, load_schedule, save_schedule, schedule_json
from .report import write_pipeline_report
from .text import pipeline_text

__all__ = ["load_problem", "load_schedule", "pipeline_text", "save_schedule", "schedule_json", "write_pipeline_report"]
