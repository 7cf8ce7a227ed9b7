"""What torch has made of a schedule: each rank's list with its sends and receives, and FSDP's gathers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ....errors import VerificationError
from ...pipelining.schedule import Action, ActionKind

__all__ = ["COMPUTES", "RECEIVES", "SENDS", "WAITS", "Step", "parsed"]

#: Kinds that compute.
COMPUTES = ("F", "I", "W", "B")
#: Kinds that send, with what they follow on the same stage.
SENDS: Mapping[str, tuple[str, ...]] = {"SEND_F": ("F",), "SEND_B": ("I", "B")}
#: Kinds that receive, with what needs them on the same stage.
RECEIVES: Mapping[str, tuple[str, ...]] = {"RECV_F": ("F",), "RECV_B": ("I", "B")}

#: What waits until something is done, from torch 2.15 on, with what it waits for on the same rank and stage.
WAITS: Mapping[str, str] = {f"WAIT_{kind}": kind for kind in ("SEND_F", "SEND_B", "REDUCE_GRAD")}

_OF_A_MICROBATCH = re.compile(r"(\d+)((?:WAIT_)?SEND_F|(?:WAIT_)?SEND_B|RECV_F|RECV_B|F|I|W|B)(\d+)")
_OF_A_STAGE = re.compile(r"(\d+)(UNSHARD|RESHARD|(?:WAIT_)?REDUCE_GRAD)")


@dataclass(frozen=True, slots=True)
class Step:
    """One entry of a rank's list; ``microbatch`` is -1 for what concerns a whole stage."""

    stage: int
    kind: str
    microbatch: int = -1

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch if self.microbatch >= 0 else ''}"

    @property
    def action(self) -> Action:
        """The schedule's action that it is; only of what computes."""
        return Action(self.stage, ActionKind(self.kind), self.microbatch)

    @property
    def other_end(self) -> Step:
        """The receive that a send meets, or the send that a receive meets."""
        ahead = 1 if self.kind in ("SEND_F", "RECV_B") else -1
        kind = self.kind.replace("SEND", "RECV") if self.kind in SENDS else self.kind.replace("RECV", "SEND")
        return Step(self.stage + ahead, kind, self.microbatch)


def parsed(lowered: Mapping[int, Sequence[str]]) -> dict[int, tuple[Step, ...]]:
    """The lists of all ranks, by rank.

    Raises:
        VerificationError: torch's runtime does something here that is not known, such as two actions in one.
    """
    return {rank: tuple(_steps(rank, texts)) for rank, texts in sorted(lowered.items())}


def _steps(rank: int, texts: Iterable[str]) -> Iterable[Step]:
    for text in texts:
        match = _OF_A_MICROBATCH.fullmatch(text) or _OF_A_STAGE.fullmatch(text)
        if match is None:
            raise VerificationError(
                f"rank {rank} would do {text!r}, which is not known here",
                hint="emit the schedule's computing actions one by one, and let torch add the communication",
            )
        yield Step(int(match[1]), match[2], int(match[3]) if match.lastindex == 3 else -1)
