"""Colours by role and by kind of instruction, told apart by colour-blind readers.

The hues are those of Okabe and Ito, *Color Universal Design* (2008), yellow darkened until it shows on white. Of a
transfer the hue says the direction, and the strength whether it is compulsory (pale) or additional (full).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ..graph import Role
from .view import UNKNOWN_ROLE

__all__ = ["BOUND_COLOUR", "CAPACITY_COLOUR", "CATEGORY_COLOURS", "ROLE_COLOURS", "TRAFFIC_COLOURS"]

ROLE_COLOURS: Mapping[str, str] = MappingProxyType(
    {
        Role.INPUT.value: "#009e73",
        Role.WEIGHT.value: "#e69f00",
        Role.CONSTANT.value: "#8c8c8c",
        Role.OPTIMIZER_STATE.value: "#b3a100",
        Role.ACTIVATION.value: "#56b4e9",
        Role.GRADIENT.value: "#cc79a7",
        Role.OUTPUT.value: "#d55e00",
        UNKNOWN_ROLE: "#e4003a",
    }
)

CATEGORY_COLOURS: Mapping[str, str] = MappingProxyType(
    {
        "run": "#0072b2",
        "compulsory load": "#8fd4bd",
        "additional load": "#00835f",
        "compulsory store": "#f5bd8f",
        "additional store": "#d55e00",
        "recompute": "#cc79a7",
        "collective": "#e69f00",
        "wait": "#5c5c5c",
    }
)

TRAFFIC_COLOURS: Mapping[str, str] = MappingProxyType({"compulsory": "#8aa4b5", "additional": "#d55e00"})

CAPACITY_COLOUR = "#c1121f"
BOUND_COLOUR = "#0072b2"
