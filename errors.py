"""Every deliberate error of opweave: one class a cause, each with a stable code, an exit code and a hint.

An error says what was needed, what there was, and what would help. Anything else that escapes is a bug.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "ExecutionError",
    "Infeasible",
    "InternalError",
    "MachineError",
    "ModelError",
    "OptionError",
    "OpweaveError",
    "PlanError",
    "SplitRefused",
    "UnsupportedOperator",
    "VerificationError",
]


class OpweaveError(Exception):
    """Base of all deliberate errors.

    ``code`` is stable across releases and safe to match on; ``exit_code`` is what the command line returns;
    ``hint`` says what would help, in one sentence, and may be empty.
    """

    code: ClassVar[str] = "opweave"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class OptionError(OpweaveError):
    """An option, pass name or argument is unknown or has a value outside its range."""

    code = "option"
    exit_code = 2


class ModelError(OpweaveError):
    """The model cannot be read: malformed, truncated, cyclic, hostile, or of unknown shape."""

    code = "model"
    exit_code = 3


class UnsupportedOperator(ModelError):
    """The model uses an operator that has no lowering here and no registered definition."""

    code = "unsupported-operator"
    exit_code = 3


class MachineError(OpweaveError):
    """A machine description is unknown, malformed, or has a field outside its range."""

    code = "machine"
    exit_code = 4


class Infeasible(OpweaveError):
    """No plan exists within the capacity; says what is short, by how many bytes, and the least that works.

    ``required_bytes`` is the smallest capacity known to work for the whole model, ``available_bytes`` what there was.
    """

    code = "infeasible"
    exit_code = 5

    def __init__(self, message: str, *, required_bytes: int, available_bytes: int, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.required_bytes = required_bytes
        self.available_bytes = available_bytes


class PlanError(OpweaveError):
    """A plan file cannot be read: not JSON, another schema version, or fields that contradict each other."""

    code = "plan"
    exit_code = 6


class VerificationError(OpweaveError):
    """A plan that could be read claims something that is not so; the message lists the faults."""

    code = "verification"
    exit_code = 7


class ExecutionError(OpweaveError):
    """A plan cannot be executed: an operand is not resident, a value is missing, an operator has no definition."""

    code = "execution"
    exit_code = 8


class SplitRefused(OpweaveError):
    """A graph cannot be split as asked: ``node`` calls ``target``, which cannot be divided, for ``reason``."""

    code = "split"
    exit_code = 9

    def __init__(self, node: str, target: str, reason: str, *, hint: str = "") -> None:
        super().__init__(f"cannot split {node!r}, which calls {target}: {reason}", hint=hint)
        self.node = node
        self.target = target
        self.reason = reason


class InternalError(OpweaveError):
    """opweave contradicts itself, as when a pass reports an objective that the verifier's recount refutes."""

    code = "internal"
    exit_code = 70
