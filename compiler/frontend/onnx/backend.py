"""The onnx Backend interface (``onnx.backend.base``) over opweave's importer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx
import torch
from onnx.backend.base import Backend, BackendRep

from ....errors import ModelError, OptionError
from ...runtime.custom_ops import tensor_from_numpy, tensor_to_numpy
from .fallback import type_proto
from .model import ImportedModel, load
from .node import Value
from .types import stored_dtype_of
from .wellformed import require_tensors

__all__ = ["Executable", "OpweaveBackend", "OpweaveRep", "Planner", "run_eagerly"]

Executable = Callable[[Sequence[np.ndarray[Any, Any]]], Sequence[np.ndarray[Any, Any]]]
#: Makes an imported model runnable: a function of the inputs as arrays, in the model's order.
Planner = Callable[[ImportedModel], Executable]


def run_eagerly(imported: ImportedModel) -> Executable:
    """The planner that plans nothing: the module as it is, in eager torch."""
    weights = list(imported.weights.values())

    def execute(inputs: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        with torch.no_grad():
            outputs = imported.module(*map(tensor_from_numpy, inputs), *weights)
        return [tensor_to_numpy(output) for output in outputs]

    return execute


class OpweaveRep(BackendRep):
    """A prepared model; ``run`` takes the inputs as arrays, in the model's order.

    Where an operator needs the value of an input to know its shapes, the model is imported for the values of the first
    run, and again when a later run brings other values.
    """

    def __init__(self, model: onnx.ModelProto, planner: Planner, options: Mapping[str, Any]) -> None:
        self._model = model
        self._planner = planner
        self._options = dict(options)
        self._imported: ImportedModel | None = None
        self._executable: Executable | None = None

    @property
    def imported(self) -> ImportedModel | None:
        """What the last run executed; ``None`` before the first."""
        return self._imported

    def run(self, inputs: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The outputs as arrays. ``inputs`` is a sequence in the model's order, or a mapping by name."""
        del kwargs
        values = self._ordered(inputs)
        require_tensors(self._model.graph)
        arrays = [np.asarray(value) for value in values]
        if not self._serves(arrays):
            self._import_for(arrays)
        assert self._executable is not None
        return tuple(self._executable(arrays))

    def _names(self) -> list[str]:
        initializers = {tensor.name for tensor in self._model.graph.initializer}
        return [info.name for info in self._model.graph.input if info.name not in initializers]

    def _ordered(self, inputs: Any) -> list[Any]:
        names = self._names()
        if isinstance(inputs, Mapping):
            missing = [name for name in names if name not in inputs]
            if missing:
                raise OptionError(f"input {missing[0]!r} is not given", hint=f"the inputs are: {', '.join(names)}")
            return [inputs[name] for name in names]
        values = [inputs] if isinstance(inputs, np.ndarray) else list(inputs)
        if len(values) != len(names):
            raise OptionError(f"{len(values)} inputs given, the model takes {len(names)}: {', '.join(names)}")
        return values

    def _serves(self, arrays: Sequence[np.ndarray[Any, Any]]) -> bool:
        if self._imported is None:
            return False
        for spec, array in zip(self._imported.input_specs, arrays, strict=True):
            if spec.shape != array.shape:
                return False
            expected = self._imported.specialized.get(spec.name)
            if expected is not None and tensor_to_numpy(expected).tobytes() != array.tobytes():
                return False
        return True

    def _import_for(self, arrays: Sequence[np.ndarray[Any, Any]]) -> None:
        for info in self._model.graph.input:
            stored_dtype_of(info.type.tensor_type.elem_type, f"graph input {info.name!r}")
        examples = {name: tensor_from_numpy(array) for name, array in zip(self._names(), arrays, strict=True)}
        self._imported = load(self._model, examples=examples, **self._options)
        self._executable = self._planner(self._imported)


class OpweaveBackend(Backend):
    """``onnx.backend.base.Backend``: prepare, run_model, run_node. Subclasses with a ``planner`` plan for real."""

    planner: ClassVar[Planner] = staticmethod(run_eagerly)

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """Only the CPU."""
        return device.split(":")[0].upper() == "CPU"

    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> OpweaveRep:
        """A model ready to run. ``kwargs``: ``planner``, and what ``load`` takes (dims, definitions, strict)."""
        if not cls.supports_device(device):
            raise OptionError(f"device {device!r} is not supported", hint="the ONNX backend runs on CPU")
        if not isinstance(model, onnx.ModelProto):
            raise ModelError(f"prepare expects a ModelProto, was given {type(model).__name__}")
        planner = kwargs.pop("planner", None) or cls.planner
        return OpweaveRep(model, planner, kwargs)

    @classmethod
    def run_model(cls, model: onnx.ModelProto, inputs: Any, device: str = "CPU", **kwargs: Any) -> tuple[Any, ...]:
        """Prepare and run once."""
        return cls.prepare(model, device, **kwargs).run(inputs)

    @classmethod
    def run_node(
        cls, node: onnx.NodeProto, inputs: Any, device: str = "CPU", outputs_info: Any = None, **kwargs: Any
    ) -> tuple[Any, ...]:
        """Run a single node; ``kwargs``: ``opset`` (the newest by default), and what ``prepare`` takes."""
        opset = kwargs.pop("opset", onnx.defs.onnx_opset_version())
        names = [name for name in node.input if name]
        values = [inputs[name] for name in names] if isinstance(inputs, Mapping) else list(inputs)
        infos = [
            onnx.helper.make_value_info(name, type_proto(Value(name, None, tensor_from_numpy(np.asarray(value)))))
            for name, value in zip(names, values, strict=True)
        ]
        outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
        for info, (dtype, shape) in zip(outputs, outputs_info or (), strict=False):
            kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
            info.CopyFrom(onnx.helper.make_tensor_value_info(info.name, kind, shape))
        graph = onnx.helper.make_graph([node], "node", infos, outputs)
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid(node.domain, opset)])
        return cls.run_model(model, values, device, **kwargs)
