"""A plan with its model's weights: something to call, look at and save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ExecutionError
from .plan import Plan
from .verify import Verification, verify

if TYPE_CHECKING:
    import numpy
    import torch

    from .frontend.program import ImportedGraph
    from .runtime.scratchpad import ExecutionResult

__all__ = ["CompiledModel"]

_NO_BODIES = "an operator graph without bodies can be planned, not executed"
_EXECUTABLE = "an .onnx model, an exported program or an nn.Module has what is needed"


@dataclass(frozen=True)
class CompiledModel:
    """A plan with the model's weights: call it to execute, look at it, save it.

    ``program`` is ``None`` for a plan that was loaded without its model; it can be shown and verified, not called.
    """

    plan: Plan
    program: ImportedGraph | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Execute the plan in a scratchpad of exactly the machine's size.

        Takes what the model takes, as torch tensors or numpy arrays, and returns what it returns, as the same kind.
        Tensors that the model updates in place are updated.

        Raises:
            ExecutionError: an input has the wrong shape or dtype, or an operator has no executable definition.
        """
        import numpy
        import torch.utils._pytree as pytree

        from .runtime.custom_ops import tensor_from_numpy, tensor_to_numpy

        program = self._program()
        if program.flatten is None or program.unflatten is None:
            raise ExecutionError(_NO_BODIES, hint=_EXECUTABLE)
        as_numpy = any(isinstance(value, numpy.ndarray) for value in pytree.tree_leaves((args, kwargs)))
        if as_numpy:
            args, kwargs = pytree.tree_map_only(numpy.ndarray, tensor_from_numpy, (args, kwargs))
        values = program.flatten(args, kwargs)
        result = self.execute(values)
        for name, value in zip(program.input_names, values, strict=True):
            if name in result.updated:
                value.copy_(result.updated[name])
        for name in result.updated.keys() & program.weights.keys():
            program.weights[name].data.copy_(result.updated[name])
        outputs: list[Any] = list(map(tensor_to_numpy, result.outputs) if as_numpy else result.outputs)
        return program.unflatten(outputs)

    def execute(self, inputs: Sequence[torch.Tensor]) -> ExecutionResult:
        """Execute on flat ``inputs`` and return outputs with the bytes that moved. Raises ExecutionError."""
        from .runtime.scratchpad import execute

        program = self._program()
        if program.flatten is None:
            raise ExecutionError(_NO_BODIES, hint=_EXECUTABLE)
        names = program.input_names
        if len(inputs) != len(names):
            raise ExecutionError(f"the model takes {len(names)} tensors ({', '.join(names)}), got {len(inputs)}")
        return execute(self.plan, dict(zip(names, inputs, strict=True)), program.weights)

    def _program(self) -> ImportedGraph:
        if self.program is None:
            raise ExecutionError("the plan has no weights", hint="load it with its model: load_plan(path, model)")
        return self.program

    def verify(self) -> Verification:
        """Let the verifier recount the plan."""
        return verify(self.plan)

    def summary(self) -> str:
        """The plan in words and figures."""
        from .report.text import summary

        return summary(self.plan)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; the weights stay with the model."""
        self.plan.save(path)

    def report(self, folder: str | Path) -> dict[str, Path]:
        """Write ``plan.json``, ``index.html``, ``trace.json`` and PNGs into ``folder``; returns their paths by name."""
        from .report import write_report

        self.save(Path(folder) / "plan.json")
        return {"plan.json": Path(folder) / "plan.json", **write_report(self.plan, Path(folder))}

    @property
    def output_names(self) -> tuple[str, ...]:
        """What the model calls its outputs, in order."""
        return (self.program.output_names if self.program else ()) or self.plan.graph.outputs

    def random_inputs(self, seed: int = 0) -> list[torch.Tensor]:
        """Seeded values for the model's inputs, in call order."""
        from .runtime.reference import random_inputs

        return random_inputs(self.plan.graph, self._program().input_names, seed)

    def named_inputs(self, arrays: Mapping[str, numpy.ndarray[Any, Any]]) -> list[torch.Tensor]:
        """The model's inputs in call order from ``arrays`` by name. Raises ExecutionError for a missing one."""
        from .runtime.custom_ops import tensor_from_numpy

        names = self._program().input_names
        missing = [name for name in names if name not in arrays]
        if missing:
            raise ExecutionError(f"no input {missing[0]!r}; given are {', '.join(arrays)}, needed {', '.join(names)}")
        try:
            return [tensor_from_numpy(arrays[name]) for name in names]
        except TypeError as error:  # strings, dates, objects
            raise ExecutionError(f"an input is of no type to compute with: {error}") from error
