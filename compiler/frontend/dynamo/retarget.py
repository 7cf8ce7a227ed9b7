"""A graph of Dynamo's for a model on the host, made one for another device before AOTAutograd traces it.

Its inputs become (fake) tensors on the device, and whatever names the host names the device instead. What runs it is
given the tensors on the host and returns some there (``runtime.device.host``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.utils import _device

from ....errors import ModelError, OptionError

__all__ = ["retarget"]

_HOST = "cpu"
#: Namespaces of operators that only the host has.
_HOST_ONLY = ("mkl", "mkldnn", "mkldnn_prepacked", "onednn", "quantized", "quantized_decomposed_cpu")
#: Functions that take no tensor to the device, but from or to other libraries on the host.
_FOREIGN = ("from_numpy", "from_dlpack", "frombuffer", "from_file", "numpy", "tolist")


def retarget(
    module: torch.fx.GraphModule, inputs: Sequence[Any], device: torch.device
) -> tuple[torch.fx.GraphModule, list[Any]]:
    """``module``, changed in place, and its example ``inputs``, on ``device``; for inference.

    Raises:
        OptionError: gradients are wanted, or an input is on another device than the host.
        ModelError: an operator works on the host only, or draws from a generator of the host's; the message names it.
    """
    _check_inputs(module, inputs)
    if device.type == _HOST:
        return module, list(inputs)
    for graph_module in module.modules():
        if isinstance(graph_module, torch.fx.GraphModule):
            _Rewriting(graph_module, device).run()
    # Dynamo's own fake tensors have the symbols of its shapes; what it passes may be the real ones.
    known = [node.meta.get("example_value") for node in module.graph.find_nodes(op="placeholder")]
    traced = [fake if isinstance(fake, torch.Tensor) else item for fake, item in zip(known, inputs, strict=True)]
    return module, [_moved(item, traced, device) for item in traced]


def _check_inputs(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> None:
    names = [node.name for node in module.graph.find_nodes(op="placeholder")]
    for name, item in zip(names, inputs, strict=True):
        if not isinstance(item, torch.Tensor):
            continue
        if item.device.type != _HOST:
            raise OptionError(
                f"option 'device' runs a model that is on the host, but {name!r} is on {item.device}",
                hint="leave the option away for a model on a device, or move everything to the host",
            )
        if item.requires_grad and torch.is_grad_enabled():
            raise OptionError(
                f"option 'device' is for inference, but {name!r} requires a gradient",
                hint="call the model under torch.no_grad() or torch.inference_mode()",
            )


def _moved(item: Any, inputs: Sequence[Any], device: torch.device) -> Any:
    """A fake tensor like ``item``, laid out the same, on ``device``; anything else as it is."""
    if not isinstance(item, torch.Tensor):
        return item
    fake = detect_fake_mode(inputs)
    if fake is None:
        raise ModelError("a graph to be moved to a device comes without fake tensors", hint="please report this")
    with fake:
        return torch.empty_strided(item.shape, item.stride(), dtype=item.dtype, device=device)


class _Rewriting:
    """Names the device wherever one graph names the host, or says nothing and means it."""

    def __init__(self, module: torch.fx.GraphModule, device: torch.device) -> None:
        self.module, self.device = module, device
        self.constructors: frozenset[Any] = frozenset(_device._device_constructors())

    def run(self) -> None:
        """Rewrite all nodes, and move constants."""
        for node in self.module.graph.nodes:
            if node.op in ("call_function", "call_method"):
                self._check(node)
                self._rewrite(node)
            elif node.op == "get_attr":
                self._move_constant(node)
        self.module.recompile()

    def _check(self, node: torch.fx.Node) -> None:
        name = _name(node.target)
        if isinstance(node.kwargs.get("generator"), torch.Generator | torch.fx.Node):
            raise ModelError(
                f"{name} draws random numbers from a generator of the host's, which {self.device} cannot use",
                hint="let it draw from the default generator",
            )
        namespace = (
            getattr(node.target, "namespace", "") or getattr(node.target, "_qualified_op_name", "").partition("::")[0]
        )
        if namespace in _HOST_ONLY or name.rpartition(".")[2] in _FOREIGN:
            raise ModelError(
                f"{name} works on the host only, so the model cannot run on {self.device}",
                hint="leave the option 'device' away, or keep that part out of torch.compile",
            )

    def _rewrite(self, node: torch.fx.Node) -> None:
        if node.op == "call_method" and node.target == "cpu":
            node.target, node.args, node.kwargs = "to", (node.args[0], self.device), {}
            return
        if _name(node.target).endswith("_enter_autocast"):
            self._rewrite_autocast(node)
            return
        by_text = node.op == "call_method" and node.target == "to"
        node.args = tuple(self._device(item, text=by_text) for item in node.args)
        node.kwargs = {key: self._device(value, text=key == "device") for key, value in node.kwargs.items()}
        if node.op == "call_function" and node.target in self.constructors and node.kwargs.get("device") is None:
            node.kwargs = {**node.kwargs, "device": self.device}

    def _rewrite_autocast(self, node: torch.fx.Node) -> None:
        kind, dtype, *rest = node.args
        if kind == _HOST:  # the dtype that it stands for on the host, where none is given
            node.args = (self.device.type, dtype or torch.get_autocast_dtype(_HOST), *rest)

    def _device(self, item: Any, *, text: bool) -> Any:
        """``item``, or the device where it is the host."""
        if isinstance(item, torch.device):
            return self.device if item.type == _HOST else item
        if text and isinstance(item, str) and item.partition(":")[0] == _HOST:
            return self.device
        return item

    def _move_constant(self, node: torch.fx.Node) -> None:
        owner: Any = self.module
        *path, last = str(node.target).split(".")
        for part in path:
            owner = getattr(owner, part)
        value = getattr(owner, last)
        if isinstance(value, torch.nn.Parameter):
            setattr(owner, last, torch.nn.Parameter(value.detach().to(self.device), value.requires_grad))
        elif isinstance(value, torch.Tensor):
            setattr(owner, last, value.to(self.device))


def _name(target: Callable[..., Any] | str) -> str:
    if isinstance(target, str):
        return f"torch.Tensor.{target}"
    module = getattr(target, "__module__", None) or "torch"
    return f"{module}.{getattr(target, '__name__', target)}"
