"""What address passes return, or raise when residences cannot be placed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from ...compiler.pipeline import Decision
from ...compiler.plan import Certificate, Instruction, Plan
from ...errors import Infeasible
from .packing import Packing

__all__ = ["PlacementError", "check_fullest_step", "described", "listed", "no_placement", "placed"]

LISTED = 6  # residences a message names; the rest are counted


class PlacementError(Infeasible):
    """Residences have no placement within the capacity, or none was found.

    ``conflict`` are indices into ``plan.residences`` of some that cannot be placed together when ``proven``, and of
    those around which the search failed otherwise. ``required_bytes`` is the least arena found for all residences
    (the bytes the conflict needs, if nothing was placed), ``available_bytes`` the capacity.
    """

    code = "placement"

    def __init__(
        self, message: str, *, conflict: tuple[int, ...], proven: bool, required_bytes: int, available_bytes: int
    ) -> None:
        hint = "another residency may be placeable" if proven else "allow more time, or try address/exact"
        super().__init__(message, required_bytes=required_bytes, available_bytes=available_bytes, hint=hint)
        self.conflict = conflict
        self.proven = proven


def placed(
    plan: Plan, packing: Packing, offsets: Sequence[int], *, bound: int, by_search: bool = False, note: str = ""
) -> Decision:
    """``plan`` with ``offsets`` (alignment units, by residence); times are dropped.

    The certificate states the arena against ``bound``, bytes, which a search proved or the fullest step.
    """
    residences = tuple(
        msgspec.structs.replace(residence, offset=offset * packing.alignment)
        for residence, offset in zip(plan.residences or (), offsets, strict=True)
    )
    certificate = Certificate(
        "arena_bytes", packing.arena_bytes(packing.items, offsets), bound, "cp" if by_search else "analytic", "address"
    )
    instructions = tuple(_untimed(instruction) for instruction in plan.instructions)
    return Decision(msgspec.structs.replace(plan, instructions=instructions, residences=residences), certificate, note)


def _untimed(instruction: Instruction) -> Instruction:
    return msgspec.structs.replace(instruction, engine="", start_s=None, finish_s=None)


def check_fullest_step(packing: Packing) -> int:
    """The arena's lower bound in bytes.

    Raises:
        PlacementError: it exceeds the capacity: some residences of one step do not fit, in whatever places.
    """
    bound, together = packing.fullest_step()
    if bound <= packing.capacity:
        return max(bound, packing.least_end(packing.items))
    conflict = list(together)
    for item in sorted(together, key=lambda i: (packing.units[i], i)):
        without = [i for i in conflict if i != item]
        if packing.together_bytes(without) > packing.capacity:
            conflict = without
    raise no_placement(packing, conflict, proven=True, required_bytes=bound)


def no_placement(packing: Packing, conflict: Sequence[int], *, proven: bool, required_bytes: int) -> PlacementError:
    """The error for residences ``conflict``; ``required_bytes`` is the least arena known to hold them all."""
    ranked = sorted(conflict, key=lambda i: (-packing.nbytes[i], i))
    first_few = ", ".join(
        described(packing, i, f"steps {packing.begins[i]} to {packing.ends[i] - 1}") for i in ranked[:LISTED]
    )
    more = f" and {len(ranked) - LISTED} more" if len(ranked) > LISTED else ""
    begin, end = min(packing.begins[i] for i in ranked), max(packing.ends[i] for i in ranked)
    verdict = "cannot be placed together" if proven else "were not placed together"
    banks = f", banks of {listed(b - a for a, b in packing.banks)}" if len(packing.banks) > 1 else ""
    best = (
        f"; the best placement known takes {required_bytes:,} bytes, {required_bytes - packing.capacity:,} too many"
        if required_bytes > packing.capacity and not banks
        else ""
    )
    return PlacementError(
        f"{len(ranked)} residences of steps {begin} to {end - 1} {verdict} in {packing.capacity:,} bytes{banks}: "
        f"{first_few}{more}{best}",
        conflict=tuple(sorted(ranked)),
        proven=proven,
        required_bytes=required_bytes,
        available_bytes=packing.capacity,
    )


def described(packing: Packing, item: int, *remarks: str) -> str:
    """Name, bytes and pin of an item, as messages give them, with ``remarks``."""
    pin = packing.pins.get(packing.names[item])
    parts = [f"{packing.nbytes[item]:,} bytes", *remarks]
    if pin is not None and pin.bank is not None:
        parts.append(f"pinned to bank {pin.bank}")
    if pin is not None and pin.offset is not None:
        parts.append(f"pinned to byte {pin.offset:,}")
    return f"{packing.names[item]!r} ({', '.join(parts)})"


def listed(sizes: Iterable[int]) -> str:
    """Sizes as a sentence has them: 1, 2 and 3."""
    *most, last = (f"{size:,}" for size in sizes)
    return f"{', '.join(most)} and {last}" if most else last
