"""What can be wrong with a plan: a closed enumeration, and one finding of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Fault", "Finding"]


class Fault(StrEnum):
    """Everything a plan can get wrong. Closed: each member has a test that makes exactly it."""

    OPERATOR_MISSING = "operator missing"
    OPERATOR_REPEATED = "operator repeated"
    OPERATOR_UNKNOWN = "operator unknown"
    DEPENDENCY_VIOLATED = "dependency violated"

    COLLECTIVE_NOT_STARTED = "collective not started"
    COLLECTIVE_NOT_WAITED = "collective not waited for"
    COLLECTIVE_ORDER_DIFFERS = "ranks issue collectives of one group in different orders"
    RANKS_WAIT_FOR_EACH_OTHER = "ranks wait for each other"
    ENDS_BEFORE_RANKS_START = "collective ends before all ranks have started it"

    BUFFER_UNKNOWN = "buffer unknown"
    MEMORY_UNKNOWN = "memory unknown"
    NOT_THE_SCRATCHPAD = "memory is not the scratchpad"
    ENGINE_UNKNOWN = "engine unknown"
    ENGINE_OF_WRONG_KIND = "engine of the wrong kind"
    STREAMED_ILLEGALLY = "streamed illegally"
    PARTLY_DECIDED = "partly decided"

    RESIDENCE_OUT_OF_RANGE = "residence out of range"
    RESIDENCE_UNEXPLAINED = "residence begins unexplained"
    RESIDENCE_REPEATED = "residence overlaps another of its buffer in time"
    ZERO_BYTES_MOVED = "zero-byte buffer loaded, stored or resident"
    NOT_RESIDENT_WHEN_READ = "not resident when read"
    NOT_RESIDENT_WHEN_WRITTEN = "not resident when written"
    VALUE_LOST = "value lost"

    RECOMPUTED_BEFORE_RUN = "recomputed before it ran"
    RECOMPUTED_ILLEGALLY = "recomputed illegally"
    RECOMPUTE_OF_RESIDENT = "recompute of a resident buffer"
    OPERAND_UPDATED = "operand updated since the operator ran"

    LOAD_OF_RESIDENT = "load of a resident buffer"
    LOAD_WITHOUT_RESIDENCE = "load without a residence"
    LOAD_WITHOUT_COPY = "load without a backing copy"
    LOAD_OF_STALE_COPY = "load of a stale copy"
    STORE_NOT_RESIDENT = "store of a buffer that is not resident"
    OUTPUT_NOT_STORED = "output not stored"

    CAPACITY_EXCEEDED = "capacity exceeded"
    OUT_OF_BOUNDS = "region out of bounds"
    MISALIGNED = "region misaligned"
    REGIONS_OVERLAP = "regions overlap"
    BANK_CROSSED = "region crosses a bank boundary"

    PIN_MOVED = "pinned buffer lies elsewhere"
    PIN_RELEASED = "pinned buffer leaves the scratchpad"

    TIME_MALFORMED = "time malformed"
    FASTER_THAN_MACHINE = "faster than the machine"
    ENGINE_OVERLAP = "engine runs two instructions at once"
    STARTS_BEFORE_OPERANDS = "starts before its operands"
    STARTS_BEFORE_REGION_FREE = "starts before its region is free"

    CLAIM_REFUTED = "claim refuted"


@dataclass(frozen=True)
class Finding:
    """One fault: ``message`` names what is concerned and what was expected; ``step`` is an instruction's index."""

    fault: Fault
    message: str
    step: int | None = None

    def __str__(self) -> str:
        where = "" if self.step is None else f" at step {self.step}"
        return f"{self.fault.value}{where}: {self.message}"
