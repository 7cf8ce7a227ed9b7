"""Damaged and foreign ``.tflite`` files end in one clear error."""

from __future__ import annotations

import contextlib
import random

import pytest

from opweave.compiler.export.flatbuffer import add_metadata, read_tflite
from opweave.errors import ModelError
from tests.compiler.export.tflite_files import sample


@pytest.mark.parametrize("spoil", range(40))
def test_damaged_files_end_in_one_clear_error(spoil: int) -> None:
    """Truncated or with a byte changed: refused, or read as another model, but never a traceback."""
    draw = random.Random(spoil)
    whole = bytearray(sample())
    if spoil % 2:
        whole = whole[: draw.randrange(len(whole))]
    else:
        for _ in range(4):
            whole[draw.randrange(len(whole))] = draw.randrange(256)
    for use in (read_tflite, lambda data: add_metadata(data, "name", b"1234")):
        with contextlib.suppress(ModelError):
            assert use(bytes(whole))


def test_files_without_one_subgraph_are_refused() -> None:
    with pytest.raises(ModelError, match="2 subgraphs"):
        read_tflite(sample(subgraphs=2))
    with pytest.raises(ModelError, match="identifier 'TFL3' is missing"):
        read_tflite(b"not a model")
