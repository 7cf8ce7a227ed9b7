"""How the corrections are put in place, and taken back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

__all__ = ["Patch", "patching"]

_ABSENT = object()


class Patch(Protocol):
    """What pytest's ``monkeypatch`` does."""

    def setattr(self, target: Any, name: str, value: Any, raising: bool = True, /) -> None:
        """Set an attribute until the patch is undone; one that is not there is an error if ``raising``."""


class _Patches:
    """The same without pytest."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def setattr(self, target: Any, name: str, value: Any, raising: bool = True, /) -> None:
        """As `Patch`."""
        before = vars(target).get(name, _ABSENT)
        if raising and not hasattr(target, name):
            raise AttributeError(f"{target!r} has no attribute {name!r}")
        self._before.append((target, name, before))
        setattr(target, name, value)

    def undo(self) -> None:
        """Take everything back, the last first."""
        for target, name, before in reversed(self._before):
            delattr(target, name) if before is _ABSENT else setattr(target, name, before)
        self._before.clear()


@contextmanager
def patching() -> Iterator[Patch]:
    """A patch that is undone at the end."""
    patches = _Patches()
    try:
        yield patches
    finally:
        patches.undo()
