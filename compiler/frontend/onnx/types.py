"""Element types: which ONNX types opweave computes with, and how their values become torch tensors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper

from ....errors import ModelError, UnsupportedOperator
from ...runtime.custom_ops import tensor_from_numpy

__all__ = [
    "MAX_CONSTANT_BYTES",
    "TORCH_DTYPES",
    "dtype_of",
    "onnx_type_of",
    "shape_elements",
    "stored_dtype_of",
    "tensor_from_proto",
]

#: No single constant computed or read while importing may be larger than this.
MAX_CONSTANT_BYTES = 8 * 2**30
#: No tensor of a model may have more elements than this; a larger shape is an attack or a mistake.
MAX_ELEMENTS = 2**40

TORCH_DTYPES: Mapping[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.UINT8: torch.uint8,
    TensorProto.INT8: torch.int8,
    TensorProto.UINT16: torch.uint16,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.BOOL: torch.bool,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.UINT32: torch.uint32,
    TensorProto.UINT64: torch.uint64,
    TensorProto.COMPLEX64: torch.complex64,
    TensorProto.COMPLEX128: torch.complex128,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
    TensorProto.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    TensorProto.FLOAT8E5M2: torch.float8_e5m2,
    TensorProto.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
}
#: Types of less than 8 bits are held in a wider type: they may be stored, moved and dequantised, not computed with.
PACKED_DTYPES: Mapping[int, torch.dtype] = {
    TensorProto.INT4: torch.int8,
    TensorProto.UINT4: torch.uint8,
    TensorProto.FLOAT4E2M1: torch.float32,
    **{
        code: torch.int8 if name == "INT2" else torch.uint8
        for name, code in TensorProto.DataType.items()
        if name in ("INT2", "UINT2")
    },
}
_ONNX_TYPES = {dtype: code for code, dtype in TORCH_DTYPES.items()}


def type_name(code: int) -> str:
    """The name of an ONNX element type, such as ``FLOAT``, for messages."""
    try:
        return str(TensorProto.DataType.Name(code))
    except ValueError:
        return f"element type {code}"


def dtype_of(code: int, what: str) -> torch.dtype:
    """The torch dtype of ONNX element type ``code``; ``what`` names the value in the UnsupportedOperator otherwise."""
    dtype = TORCH_DTYPES.get(code)
    if dtype is None:
        raise UnsupportedOperator(
            f"{what} has element type {type_name(code)}, which opweave does not compute with",
            hint="supported are float, double, float16, bfloat16, float8, complex, bool and 8 to 64-bit integers",
        )
    return dtype


def stored_dtype_of(code: int, what: str) -> tuple[torch.dtype, str]:
    """The torch dtype that holds ONNX element type ``code``, and its name if it is one of less than 8 bits."""
    return (PACKED_DTYPES[code], type_name(code)) if code in PACKED_DTYPES else (dtype_of(code, what), "")


def onnx_type_of(dtype: torch.dtype) -> int:
    """The ONNX element type of a torch dtype."""
    return _ONNX_TYPES[dtype]


def shape_elements(shape: tuple[int, ...], what: str) -> int:
    """The number of elements of ``shape``; raises ModelError for negative sizes and beyond 2**40 elements."""
    elements = 1
    for size in shape:
        if size < 0:
            raise ModelError(f"{what} has shape {list(shape)}: a size is negative")
        elements *= size
    if elements > MAX_ELEMENTS or any(size > MAX_ELEMENTS for size in shape):
        raise ModelError(f"{what} has shape {list(shape)}: more than 2**40 elements")
    return elements


def bits_of(code: int, what: str) -> int:
    """How many bits one element of ONNX type ``code`` takes in a file."""
    narrow = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}.get(type_name(code))
    if narrow is not None:
        return narrow
    try:
        return int(onnx.helper.tensor_dtype_to_np_dtype(code).itemsize * 8)
    except KeyError:
        raise ModelError(f"{what} has {type_name(code)}, which onnx does not know") from None


def _stored_elements(proto: onnx.TensorProto, elements: int, bits: int) -> int:
    """How many elements ``proto`` really stores, without allocating anything."""
    if proto.HasField("raw_data"):
        return elements if len(proto.raw_data) == (elements * bits + 7) // 8 else len(proto.raw_data) * 8 // bits
    per_element = 2 if proto.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128) else 1
    fields = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")
    stored = sum(len(getattr(proto, field)) for field in fields)
    if bits < 8:
        return elements if stored == (elements * bits + 7) // 8 else stored
    return stored // per_element


def array_from_proto(proto: onnx.TensorProto, what: str) -> np.ndarray:
    """The value of ``proto`` as a numpy array; raises ModelError where dims, type and data contradict each other."""
    elements = shape_elements(tuple(proto.dims), what)
    if proto.data_type == TensorProto.STRING:
        raise UnsupportedOperator(f"{what} has element type STRING, which opweave does not compute with")
    name, bits = type_name(proto.data_type), bits_of(proto.data_type, what)
    stored = _stored_elements(proto, elements, bits)
    if stored != elements:
        raise ModelError(f"{what} has shape {list(proto.dims)} of {name} but stores {stored} elements, not {elements}")
    if elements * bits // 8 > MAX_CONSTANT_BYTES:
        raise ModelError(f"{what} is larger than {MAX_CONSTANT_BYTES} bytes")
    try:
        return np.asarray(numpy_helper.to_array(proto))
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{what} cannot be read: {error}") from None


def tensor_from_proto(proto: onnx.TensorProto, what: str) -> torch.Tensor:
    """The value of ``proto`` as a contiguous torch tensor that owns writable memory."""
    stored_dtype_of(proto.data_type, what)
    return tensor_from_numpy(array_from_proto(proto, what))
