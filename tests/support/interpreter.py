"""The corrected interpreter, which ships with the bench: `opweave.kernels.bench.interpreter`."""

from __future__ import annotations

from opweave.kernels.bench.interpreter import correct

__all__ = ["correct"]
