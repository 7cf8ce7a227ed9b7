"""Fallbacks: counted, named, warned of once, and errors under ``strict``."""

from __future__ import annotations

import logging
import threading
import warnings
from collections import Counter
from collections.abc import Mapping

from ....errors import ExecutionError

__all__ = ["Fallbacks", "OpweaveFallbackWarning"]

log = logging.getLogger("opweave.fallback")


class OpweaveFallbackWarning(UserWarning):
    """A graph, or a part of one, does not run as it should have; the message says what runs instead, and why."""


class Fallbacks:
    """Counts fallbacks by what happened and why, not by graph; safe to use from several threads."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def note(self, where: str, what: str, why: str, *, strict: bool) -> str:
        """Count a fallback and warn of the first with this reason; returns it as one sentence.

        ``where`` is the graph it happens to, ``what`` runs instead, and ``why``.

        Raises:
            ExecutionError: ``strict``.
        """
        sentence, kind = f"{where} {what}: {why}", f"{what}: {why}"
        if strict:
            raise ExecutionError(sentence, hint="without strict=True it would only be counted and warned of")
        with self._lock:
            self._counts[kind] += 1
            first = self._counts[kind] == 1
        log.info(sentence)
        if first:
            warnings.warn(sentence, OpweaveFallbackWarning, stacklevel=2)
        return sentence

    @property
    def counts(self) -> Mapping[str, int]:
        """How often each has happened."""
        with self._lock:
            return dict(self._counts)

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._counts.clear()
