"""Plans for other programs: a C header for firmware, offsets for TensorFlow Lite Micro."""

from __future__ import annotations

from .c_header import c_header, save_c_header

__all__ = ["c_header", "save_c_header"]
