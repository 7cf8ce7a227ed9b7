"""Networks made here, as ONNX models with random weights, for the demo and for checks that need no download."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["darts_cifar"]

#: The second-order cells of Liu et al., "DARTS: Differentiable Architecture Search", ICLR 2019, figures 4 and 5: two
#: (operation, state) pairs for each of four intermediate nodes.
NORMAL = ("sep", 0), ("sep", 1), ("sep", 0), ("sep", 1), ("sep", 1), ("skip", 0), ("skip", 0), ("dil", 2)
REDUCTION = ("max", 0), ("max", 1), ("skip", 2), ("max", 1), ("max", 0), ("skip", 2), ("skip", 2), ("max", 1)


class _Builder:
    """Appends nodes and initializers; every method returns the name of the value it makes."""

    def __init__(self, seed: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.channels: dict[str, int] = {}
        self._random = np.random.default_rng(seed)

    def node(self, kind: str, inputs: list[str], channels: int, **attributes: Any) -> str:
        name = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        self.channels[name] = channels
        return name

    def weight(self, shape: tuple[int, ...], scale: float) -> str:
        name = f"weight_{len(self.weights)}"
        values = (self._random.standard_normal(shape) * scale).astype(np.float32)
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def conv(self, x: str, channels: int, kernel: int, stride: int = 1, dilation: int = 1, groups: int = 1) -> str:
        """Convolution with bias: batch normalisation is folded into it, as deployment toolchains do."""
        fan_in = self.channels[x] // groups * kernel * kernel
        weight = self.weight((channels, self.channels[x] // groups, kernel, kernel), (2 / fan_in) ** 0.5)
        pad = dilation * (kernel // 2)
        return self.node(
            "Conv",
            [x, weight, self.weight((channels,), 0.1)],
            channels,
            kernel_shape=[kernel, kernel],
            pads=[pad] * 4,
            strides=[stride] * 2,
            dilations=[dilation] * 2,
            group=groups,
        )

    def relu(self, x: str) -> str:
        return self.node("Relu", [x], self.channels[x])

    def operation(self, kind: str, x: str, channels: int, stride: int) -> str:
        """One edge of a cell: separable or dilated convolution, pooling, or a skip."""
        if kind == "skip":
            return x if stride == 1 else self.conv(self.relu(x), channels, 1, 2)
        if kind == "max":
            pads = {"kernel_shape": [3, 3], "pads": [1] * 4, "strides": [stride] * 2}
            return self.node("MaxPool", [x], channels, **pads)
        repeats, dilation = (2, 1) if kind == "sep" else (1, 2)
        for repeat in range(repeats):
            step = stride if repeat == 0 else 1
            depthwise = self.conv(self.relu(x), channels, 3, step, dilation, groups=channels)
            x = self.conv(depthwise, channels, 1)
        return x

    def cell(self, before: str, last: str, channels: int, *, reduction: bool, halve: bool) -> str:
        """One cell over the two states before it; ``halve`` brings the older one down to the newer one's size."""
        states = [
            self.conv(self.relu(before), channels, 1, 2 if halve else 1),
            self.conv(self.relu(last), channels, 1),
        ]
        genotype = REDUCTION if reduction else NORMAL
        for left, right in zip(genotype[::2], genotype[1::2], strict=True):
            ends = [self.operation(k, states[s], channels, 2 if reduction and s < 2 else 1) for k, s in (left, right)]
            states.append(self.node("Add", ends, channels))
        return self.node("Concat", states[2:], 4 * channels, axis=1)


def darts_cifar(cells: int = 6, channels: int = 16, image: int = 32, seed: int = 0) -> onnx.ModelProto:
    """The searched DARTS network at CIFAR size: ``cells`` cells, reductions at one and two thirds; random weights.

    Input ``image``: float32 [1, 3, image, image]; output ``logits``: float32 [1, 10].
    """
    build = _Builder(seed)
    build.channels["image"] = 3
    before = last = build.conv("image", 3 * channels, 3)
    halve = False
    for number in range(cells):
        reduction = number in (cells // 3, 2 * cells // 3)
        channels *= 2 if reduction else 1
        before, last = last, build.cell(before, last, channels, reduction=reduction, halve=halve)
        halve = reduction
    pooled = build.node("GlobalAveragePool", [last], 4 * channels)
    flat = build.node("Flatten", [pooled], 4 * channels)
    matrix = build.weight((4 * channels, 10), (4 * channels) ** -0.5)
    build.nodes.append(helper.make_node("Gemm", [flat, matrix, build.weight((10,), 0.1)], ["logits"], name="logits"))
    graph = helper.make_graph(
        build.nodes,
        "darts_cifar",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, image, image])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 10])],
        build.weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model
