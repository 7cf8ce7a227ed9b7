"""Networks made here, for the demo and for checks that need no download: ONNX models, and graphs of any size."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from opweave.compiler.graph import Graph, Op, Role, Tensor

__all__ = ["darts_cifar", "layered"]

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


class _Layers:
    """Appends operators over int8 tensors of some bytes; every method returns the name of the tensor it makes."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.ops: list[Op] = []

    def source(self, name: str, nbytes: int) -> str:
        self.tensors[name] = Tensor(name, (nbytes,), "int8", Role.INPUT)
        return name

    def op(self, inputs: list[str], nbytes: int) -> str:
        name = f"t{len(self.ops)}"
        self.tensors[name] = Tensor(name, (nbytes,), "int8")
        self.ops.append(Op(f"op{len(self.ops)}", tuple(dict.fromkeys(inputs)), (name,)))
        return name


def layered(ops: int, width: int, seed: int) -> Graph:
    """Stacked cells of ``width`` branches, as searched networks have them; exactly ``ops`` operators, no bodies.

    A branch is a chain from one of the two cells before, which widens and narrows. Branches are added in pairs, and the
    sums joined to the cell's result. Tensors have 16 to a few hundred KiB.
    """
    draw = random.Random(seed)
    build = _Layers()
    before = last = build.source("x", 200 << 10)
    while len(build.ops) < ops:
        size = draw.choice((16, 24, 32, 48)) << 10
        ends: list[str] = []
        for _ in range(width):
            end = draw.choice((before, last))
            for _ in range(draw.randint(2, 5)):
                end = build.op([end], size * draw.choice((1, 1, 1, 2, 3)))
            ends.append(build.op([end], size))
        sums = [build.op([a, b], size) for a, b in zip(ends[::2], ends[1::2], strict=False)]
        before, last = last, build.op([*sums, *ends[2 * len(sums) :]], size * max(1, width // 2))
    del build.ops[ops:]
    kept = {"x", *(op.outputs[0] for op in build.ops)}
    read = {name for op in build.ops for name in op.inputs}
    outputs = tuple(op.outputs[0] for op in build.ops if op.outputs[0] not in read)
    tensors = tuple(tensor for name, tensor in build.tensors.items() if name in kept)
    return Graph(f"layered_{ops}", tensors, tuple(build.ops), outputs)
