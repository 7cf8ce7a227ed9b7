"""Colours of a pipeline diagram: a hue a kind of action, a shade a chunk; the same in page and picture.

Hues are those of ``..palette``. The first chunk of a rank has the full hue, later ones are mixed with white.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ...pipelining.problem import PipelineProblem
from ...pipelining.schedule import ActionKind

__all__ = ["COLOURS", "HELD", "MESSAGE", "REDUCE", "chunks_of", "shaded"]

COLOURS: Mapping[ActionKind, str] = MappingProxyType(
    {
        ActionKind.FORWARD: "#0072b2",
        ActionKind.INPUT_GRADIENT: "#e69f00",
        ActionKind.WEIGHT_GRADIENT: "#009e73",
        ActionKind.BACKWARD: "#d55e00",
        ActionKind.OUTPUT: "#cc79a7",
        ActionKind.OUTPUT_GRADIENT: "#8c4a73",
        ActionKind.OFFLOAD: "#8c8c8c",
        ActionKind.RELOAD: "#b3a100",
    }
)
REDUCE = "#5c5c5c"
MESSAGE = "#7a3fb0"
HELD = "#56b4e9"

_PALEST = 0.62  # how much white the last of many chunks has


def chunks_of(problem: PipelineProblem) -> tuple[int, ...]:
    """By stage, which of its rank's stages it is, from 0."""
    chunk = [0] * len(problem.stages)
    for stages in problem.stages_of:
        for position, stage in enumerate(stages):
            chunk[stage] = position
    return tuple(chunk)


def shaded(colour: str, chunk: int, chunks: int) -> str:
    """``colour`` as it is for the first of ``chunks``, palest for the last; two are well apart."""
    white = 0.0 if chunks < 2 else chunk / (chunks - 1) * min(_PALEST, 0.45 + 0.03 * chunks)
    parts = (round(int(colour[at : at + 2], 16) * (1 - white) + 255 * white) for at in (1, 3, 5))
    return "#" + "".join(f"{part:02x}" for part in parts)
