"""Why a plan moves what it moves, or why there is none: what binds, and what would help."""

from __future__ import annotations

from .explain import explain
from .facts import BindingStep, DroppedGap, Explanation, LiveBuffer, Relaxation
from .text import explanation_text

__all__ = [
    "BindingStep",
    "DroppedGap",
    "Explanation",
    "LiveBuffer",
    "Relaxation",
    "explain",
    "explanation_text",
]
