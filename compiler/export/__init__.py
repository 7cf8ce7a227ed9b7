"""Plans for other programs: a C header for firmware, offsets for TensorFlow Lite Micro."""

from __future__ import annotations

from .c_header import c_header, save_c_header
from .tflite import offline_memory_allocation, planned_tflite, tensor_offsets, whole_life

__all__ = [
    "c_header",
    "offline_memory_allocation",
    "planned_tflite",
    "save_c_header",
    "tensor_offsets",
    "whole_life",
]
