"""What can be wrong with a plan over several engines: a closed enumeration, and one finding of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["RaceFault", "RaceFinding"]


class RaceFault(StrEnum):
    """Everything that can be wrong with a plan over several engines. Closed: each has a test that makes exactly it."""

    WAITS_MALFORMED = "waits are malformed"
    ENGINE_MISSING = "engine missing"
    CALL_MISSING = "call missing"
    CALL_UNKNOWN = "call unknown"
    NO_ADDRESS = "no address"
    UNORDERED_ACCESS = "unordered accesses to the same bytes"
    UNORDERED_EFFECTS = "effects out of order"
    UNORDERED_REUSE = "memory handed on while in use"
    WRONG_VALUE = "wrong value"


@dataclass(frozen=True)
class RaceFinding:
    """One fault: ``message`` names what is concerned; ``step`` is an instruction's index."""

    fault: RaceFault
    message: str
    step: int | None = None

    def __str__(self) -> str:
        where = "" if self.step is None else f" at step {self.step}"
        return f"{self.fault.value}{where}: {self.message}"
