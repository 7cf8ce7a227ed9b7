"""Values of initializers: from the model itself, or from files in its folder and nowhere else."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import onnx
import torch
from onnx import TensorProto

from ....errors import ModelError
from .types import MAX_CONSTANT_BYTES, bits_of, shape_elements, tensor_from_proto

__all__ = ["embed_external_data", "parse_file", "read_tensor"]


def parse_file(path: Path) -> onnx.ModelProto:
    """The model in the file, its external data not read; ModelError if it is not an ONNX model."""
    if not path.is_file():
        raise ModelError(f"there is no file {str(path)!r}")
    try:
        return onnx.load_model(path, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError, which has no type stubs, and whatever onnx adds
        raise ModelError(
            f"{str(path)!r} is not a readable ONNX model: {error}",
            hint="is it an ONNX file, and was it copied completely?",
        ) from None


def read_tensor(proto: onnx.TensorProto, folder: Path | None, what: str) -> torch.Tensor:
    """The value of an initializer or tensor attribute, from the model itself or from a file in ``folder``."""
    return tensor_from_proto(_inline(proto, folder, what), what)


def _inline(proto: onnx.TensorProto, folder: Path | None, what: str) -> onnx.TensorProto:
    """``proto`` with its data in it; ModelError where the data is not where the model says."""
    if proto.data_location != TensorProto.EXTERNAL:
        return proto
    entries = {entry.key: entry.value for entry in proto.external_data}
    if folder is None:
        raise ModelError(
            f"{what} lies in an external file, and a model in memory has no folder to look in",
            hint="load the model by its path, or with onnx.load, which reads external data",
        )
    path = _external_path(folder, entries.get("location", ""), what)
    size = (shape_elements(tuple(proto.dims), what) * bits_of(proto.data_type, what) + 7) // 8
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries.get("length", str(size)))
    except ValueError:
        raise ModelError(f"{what} gives an offset or length that is not a number") from None
    if length != size or offset < 0 or size > MAX_CONSTANT_BYTES:
        raise ModelError(f"{what} needs {size} bytes, its external data has offset {offset} and length {length}")
    with path.open("rb") as file:
        available = os.fstat(file.fileno()).st_size
        if offset + size > available:
            raise ModelError(f"{what} needs bytes {offset} to {offset + size} of {path.name!r}, which has {available}")
        file.seek(offset)
        data = file.read(size)
    return TensorProto(dims=proto.dims, data_type=proto.data_type, name=proto.name, raw_data=data)


def _external_path(folder: Path, location: str, what: str) -> Path:
    """The file that ``location`` names, which must lie in the model's folder after all links are followed."""
    if not location or "\0" in location:
        raise ModelError(f"{what} lies in an external file but does not name it")
    if Path(location).is_absolute() or ".." in Path(location.replace("\\", "/")).parts:
        raise ModelError(f"{what} asks for the file {location!r}, which is outside the model's folder")
    path = (folder / location).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ModelError(f"{what} asks for the file {location!r}, a link that leads outside the model's folder")
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
    except OSError:
        regular = False
    if not regular:
        raise ModelError(f"{what} asks for the file {location!r}, which is not in the model's folder")
    return path


def embed_external_data(source: str | Path | onnx.ModelProto) -> onnx.ModelProto:
    """The model as one message; tensors in external files become part of it, read with the same care."""
    if isinstance(source, onnx.ModelProto):
        return source
    model = parse_file(Path(source))
    folder = Path(source).resolve().parent
    for tensor in model.graph.initializer:
        tensor.CopyFrom(_inline(tensor, folder, f"initializer {tensor.name!r}"))
    return model
