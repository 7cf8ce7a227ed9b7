"""Recording: the torch.fx graph under construction, its origins and its weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, track_tensor_tree
from torch.utils._python_dispatch import _disable_current_modes

from ....errors import ModelError

__all__ = ["Recorder", "untraced"]


#: All weights of one model together; beyond it a model is an attack, or needs another machine than this one.
MAX_WEIGHT_BYTES = 64 * 2**30


def identifier(name: str) -> str:
    """``name`` as a Python identifier, readable, for an fx node."""
    cleaned = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_") or "value"
    return f"v_{cleaned}" if cleaned[0].isdigit() else cleaned


@contextmanager
def untraced() -> Iterator[None]:
    """Compute with real tensors, leaving no trace in the graph."""
    with _disable_current_modes(), torch.no_grad():
        yield


class Recorder:
    """Adds weights to the graph being traced and labels its nodes; lives as long as one trace.

    ``weights`` maps the placeholder nodes added for constants to their values.
    """

    def __init__(self) -> None:
        mode = get_proxy_mode()
        assert mode is not None, "a Recorder is made while tracing"
        self._tracer = mode.tracer
        self.graph: torch.fx.Graph = mode.tracer.graph
        self._last_placeholder: torch.fx.Node | None = None
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self._last_placeholder = node
        self._labelled: torch.fx.Node = self.graph._root
        self._bytes = 0
        self.weights: dict[torch.fx.Node, torch.Tensor] = {}

    def add_weight(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """A placeholder for the constant ``value``, as a fake tensor that tracing follows."""
        self._bytes += value.numel() * value.dtype.itemsize
        if self._bytes > MAX_WEIGHT_BYTES:
            raise ModelError(f"the weights of the model exceed {MAX_WEIGHT_BYTES} bytes (at {name!r})")
        with untraced():
            value = value.contiguous()
        if self._last_placeholder is None:
            before = self.graph.inserting_before(next(iter(self.graph.nodes), self.graph._root))
        else:
            before = self.graph.inserting_after(self._last_placeholder)
        with before:
            proxy = self._tracer.create_proxy("placeholder", identifier(name), (), {})
        proxy.node.target = proxy.node.name  # unique, where two weights have similar names
        proxy.node.meta["origin"] = name
        self._last_placeholder = proxy.node
        with disable_proxy_modes_tracing():
            fake = torch.empty(value.shape, dtype=value.dtype)
        track_tensor_tree(fake, proxy, constant=None, tracer=self._tracer)
        self.weights[proxy.node] = value
        return fake

    def label(self, origin: str) -> None:
        """Give every node recorded since the last call the ONNX node that it came from."""
        node = self.graph._root.prev
        newest = node
        while node is not self._labelled and node is not self.graph._root and "origin" not in node.meta:
            node.meta["origin"] = origin
            node = node.prev
        self._labelled = newest
