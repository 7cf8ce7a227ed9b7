"""Reference runs to compare an executed plan with: seeded inputs, onnxruntime's outputs, tolerances by dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile, ZipFile

import torch

from ...errors import ExecutionError, OptionError
from ..graph import Graph

if TYPE_CHECKING:
    import numpy
    import onnx

    from ..compiled import CompiledModel

__all__ = [
    "RELATIVE_TOLERANCE",
    "Comparison",
    "against_onnxruntime",
    "compare",
    "random_inputs",
    "read_inputs",
    "run_onnxruntime",
    "write_outputs",
]

#: Allowed error relative to the largest reference value: two runtimes sum in different orders, a deep network adds up.
RELATIVE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
INTEGER_RANGE = 8  # small enough to be an index into any embedding of a real model


@dataclass(frozen=True)
class Comparison:
    """One output against its reference: largest absolute error, the largest error allowed, and the verdict."""

    name: str
    max_error: float
    allowed: float
    equal: bool
    reason: str = ""


def random_inputs(graph: Graph, names: Sequence[str], seed: int) -> list[torch.Tensor]:
    """Seeded values for the graph's inputs: normal for floats, 0 to 7 for integers, coin flips for booleans."""
    if not -(2**63) <= seed < 2**63:
        raise OptionError(f"seed is {seed}; it takes whole numbers of 64 bits")
    generator = torch.Generator().manual_seed(seed)
    values: list[torch.Tensor] = []
    for name in names:
        tensor = graph.tensor[name]
        dtype = getattr(torch, tensor.dtype)
        if dtype.is_floating_point or dtype.is_complex:
            wide = torch.complex64 if dtype.is_complex else torch.float32
            values.append(torch.randn(tensor.shape, generator=generator, dtype=wide).to(dtype))
        else:
            high = 2 if dtype is torch.bool else INTEGER_RANGE
            values.append(torch.randint(0, high, tensor.shape, generator=generator).to(dtype))
    return values


def read_inputs(path: Path) -> dict[str, numpy.ndarray[Any, Any]]:
    """Arrays by name from an ``.npz`` file; nothing in it is unpickled. Raises OptionError."""
    import numpy

    try:
        with path.open("rb") as file, numpy.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (
        OSError,
        ValueError,
        TypeError,
        EOFError,
        BadZipFile,
    ) as error:  # an .npy file is no context; a cut one no zip
        raise OptionError(f"cannot read inputs {str(path)!r}: {error}", hint="write them with numpy.savez") from error


def write_outputs(path: Path, outputs: Mapping[str, torch.Tensor]) -> None:
    """Write tensors by name into an ``.npz`` file, where numpy lacks the type (bfloat16, float8) exactly as float32.

    ``numpy.savez`` takes names as keywords, some of which it keeps for itself. Raises OptionError.
    """
    import numpy

    native = (torch.float16, torch.float32, torch.float64)
    try:
        with ZipFile(path, "w") as archive:
            for name, value in outputs.items():
                exact = value.float() if value.is_floating_point() and value.dtype not in native else value
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    numpy.lib.format.write_array(file, exact.numpy(), allow_pickle=False)
    except OSError as error:
        raise OptionError(f"cannot write outputs {str(path)!r}: {error.strerror}") from error


def run_onnxruntime(model: str | Path | onnx.ModelProto, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs of onnxruntime's CPU provider, one thread, on positional ``inputs``.

    Raises:
        ExecutionError: onnxruntime is not installed, or does not run this model; says why.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ExecutionError("onnxruntime is not installed", hint="pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    source: Any = str(model) if isinstance(model, str | Path) else model.SerializeToString()
    try:
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        feeds = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, feeds)]
    except Exception as error:  # onnxruntime's own exceptions share no base class
        raise ExecutionError(f"onnxruntime does not run this model: {str(error).splitlines()[0]}") from error


def compare(
    names: Sequence[str], outputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]
) -> tuple[Comparison, ...]:
    """Compare outputs with a reference: shape and dtype exactly, values within the dtype's tolerance, NaN with NaN."""
    return tuple(_compare(n, o, e) for n, o, e in zip(names, outputs, expected, strict=True))


def against_onnxruntime(
    compiled: CompiledModel, model: Path, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
) -> dict[str, Any]:
    """Outputs against onnxruntime's on the same weights, random ones included: ``comparison``, one entry an output.

    Where onnxruntime is missing or does not run the model, ``not_compared`` says why instead.
    """
    import onnx

    from ..frontend.onnx import randomize_weights

    seed = compiled.plan.source.fill_seed
    try:
        expected = run_onnxruntime(model if seed is None else randomize_weights(onnx.load(model), seed), inputs)
    except ExecutionError as error:
        return {"not_compared": error.message}
    return {"comparison": [asdict(c) for c in compare(compiled.output_names, outputs, expected)]}


def _compare(name: str, output: torch.Tensor, expected: torch.Tensor) -> Comparison:
    if output.shape != expected.shape or output.dtype != expected.dtype:
        got, wanted = (f"{t.dtype} {list(t.shape)}" for t in (output, expected))
        return Comparison(name, float("inf"), 0.0, False, f"is {got}, the reference {wanted}")
    tolerance = RELATIVE_TOLERANCE.get(output.dtype, 0.0)
    if output.is_complex():
        output, expected, tolerance = torch.view_as_real(output), torch.view_as_real(expected), 1e-4
    got64, wanted64 = output.double(), expected.double()
    finite = torch.isfinite(wanted64)
    if not torch.isclose(got64[~finite], wanted64[~finite], rtol=0.0, atol=0.0, equal_nan=True).all():
        return Comparison(name, float("inf"), 0.0, False, "differs where the reference is not finite")
    if not finite.any():
        return Comparison(name, 0.0, 0.0, True)
    error = (got64 - wanted64)[finite].abs().max().item()
    allowed = tolerance * wanted64[finite].abs().max().item()
    return Comparison(name, error, allowed, error <= allowed)
