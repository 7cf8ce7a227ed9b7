"""A program's plan in the form that its executor takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ...plan import Plan

__all__ = ["DevicePlan"]


@dataclass(frozen=True)
class DevicePlan:
    """A plan of a program's planning graph, every residence placed.

    Offsets below ``arena_bytes`` are addresses in the arena. Storages that are allocated apart (outputs, what calls make
    for themselves, inputs handed over) own a range of offsets each, behind the arena: ``apart`` has its first byte.
    What is placed inside such a range lies in that storage's own memory. ``waits`` names, for each step, earlier steps
    on other engines that must be done before it; empty where there is only one engine.
    """

    plan: Plan
    arena_bytes: int
    apart: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    waits: tuple[tuple[int, ...], ...] = ()
