"""The comparison with a reference tells different from equal, and inputs that cannot be read are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from opweave.compiler.graph import Graph
from opweave.compiler.runtime.reference import RELATIVE_TOLERANCE, compare, random_inputs, read_inputs
from opweave.errors import OptionError

NAN, INF = float("nan"), float("inf")


def equal(output: torch.Tensor, expected: torch.Tensor) -> bool:
    (comparison,) = compare(["y"], [output], [expected])
    return comparison.equal


@pytest.mark.parametrize(
    ("output", "expected", "verdict"),
    [
        ([1.0, NAN, INF, -INF], [1.0, NAN, INF, -INF], True),
        ([1.0, 0.0], [1.0, NAN], False),
        ([1.0, NAN], [1.0, 0.0], False),
        ([1.0, -INF], [1.0, INF], False),
        ([1.0, 3.4e38], [1.0, INF], False),
        ([NAN], [NAN], True),
        ([], [], True),
    ],
)
def test_what_is_not_finite_is_compared_too(output: list[float], expected: list[float], verdict: bool) -> None:
    assert equal(torch.tensor(output), torch.tensor(expected)) == verdict


@pytest.mark.parametrize("dtype", [*RELATIVE_TOLERANCE, torch.int8, torch.bool])
def test_errors_beyond_the_dtypes_tolerance_are_differences(dtype: torch.dtype) -> None:
    reference = torch.tensor([0, 1], dtype=dtype)
    assert equal(reference, reference.clone())
    off = 1 + 4 * RELATIVE_TOLERANCE.get(dtype, 0.0)
    assert not equal((reference.double() * off).to(dtype) if off > 1 else reference.flip(0), reference)


def test_shape_and_dtype_count() -> None:
    assert not equal(torch.zeros(2, 1), torch.zeros(2))
    assert not equal(torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int64))


def test_inputs_by_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.arange(3))
    assert read_inputs(tmp_path / "x.npz")["x"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["missing.npz", "cut.npz", "array.npy", "text.npz", "empty.npz", "objects.npz"])
def test_files_that_hold_no_arrays_by_name_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "text.npz").write_text("x = 1")
    (tmp_path / "empty.npz").touch()
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object))
    with pytest.raises(OptionError, match="cannot read inputs"):
        read_inputs(tmp_path / name)


def test_seeds_beyond_64_bits_are_refused() -> None:
    with pytest.raises(OptionError, match="seed"):
        random_inputs(Graph("empty", (), (), ()), (), 2**64)
