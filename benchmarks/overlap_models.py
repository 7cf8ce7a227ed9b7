"""Prefill of published models on one of several tensor-parallel ranks, as operator graphs, whole or split by tokens.

The operators are those that vLLM launches (0.8, which TokenWeave builds on): a normalisation that adds the residual,
one product each for queries with keys and values and for gate with up, rotary embeddings, the write to the key-value
cache, attention, and all-reduces behind attention and behind the MLP. Experts: router, choice of the top, three small
kernels that sort tokens by expert, two grouped products and the sum. A part of a split attends to the keys of those
before it through the cache, in one kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from opweave.compiler.graph import Collective, CollectiveKind, Graph, Op, OpKind, Role, Tensor

__all__ = ["LLAMA_70B", "MIXTRAL_8X22B", "QWEN25_72B", "QWEN3_235B", "Model", "mlp_graph", "prefill_graph"]

DTYPE = "bfloat16"
GROUP = "tp"


@dataclass(frozen=True)
class Model:
    """Sizes of a decoder; with ``experts``, ``inner`` is the inner size of one, and ``active`` of them see a token."""

    name: str
    layers: int
    hidden: int
    heads: int
    key_heads: int
    inner: int
    vocabulary: int
    experts: int = 0
    active: int = 0
    head_norms: bool = False
    head_size: int = 128


LLAMA_70B = Model("Llama-3.3-70B", 80, 8192, 64, 8, 28672, 128256)
QWEN25_72B = Model("Qwen2.5-72B", 80, 8192, 64, 8, 29568, 152064)
MIXTRAL_8X22B = Model("Mixtral-8x22B", 56, 6144, 48, 8, 16384, 32768, experts=8, active=2)
QWEN3_235B = Model("Qwen3-235B-A22B", 94, 4096, 64, 4, 1536, 151936, experts=128, active=8, head_norms=True)


def prefill_graph(model: Model, tokens: Sequence[int], ranks: int) -> tuple[Graph, dict[str, int]]:
    """One sequence of ``sum(tokens)`` tokens through ``model``, in parts of ``tokens``; and the part of each operator.

    A part's operators stand behind those of the parts before it, layer by layer, as TokenWeave issues them.
    """
    writer = _Writer(model, tuple(tokens), ranks)
    return writer.whole(), writer.parts


def mlp_graph(model: Model, tokens: int, ranks: int) -> Graph:
    """The products and the activation of one dense MLP, without its all-reduce: what TokenWeave's figure 9 times."""
    writer = _Writer(model, (tokens,), ranks)
    out = writer.mlp(0, 0, writer.source("x", (tokens, model.hidden)))
    return writer.graph([out])


@dataclass
class _Writer:
    """Writes operators down; names of values are those of the tensors that they produce."""

    model: Model
    tokens: tuple[int, ...]
    ranks: int
    tensors: list[Tensor] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    parts: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def source(self, name: str, shape: tuple[int, ...], role: Role = Role.INPUT, dtype: str = DTYPE) -> str:
        """A tensor that exists; asked for again, the same."""
        if name not in self.shapes:
            self.tensors.append(Tensor(name, shape, dtype, role))
            self.shapes[name] = shape
        return name

    def view(self, name: str, of: str, shape: tuple[int, ...], offset: int, strides: tuple[int, ...]) -> str:
        """A view that begins ``offset`` elements into tensor ``of``."""
        self.tensors.append(Tensor(name, shape, DTYPE, buffer=of, strides=strides, offset_bytes=2 * offset))
        self.shapes[name] = shape
        return name

    def op(
        self,
        part: int,
        name: str,
        call: str,
        inputs: Sequence[str],
        shape: tuple[int, ...],
        flops: int = 0,
        *,
        updates: str = "",
        dtype: str = DTYPE,
        collective: Collective | None = None,
    ) -> str:
        """One operator that makes a tensor of ``shape``, or, with ``updates``, a new version of that one."""
        name = f"{name}.{part}"
        kind = OpKind.COLLECTIVE if collective else OpKind.COMPUTE
        self.tensors.append(Tensor(name, shape, dtype, buffer=updates))
        self.shapes[name] = shape
        self.ops.append(Op(name, tuple(inputs), (name,), kind, flops, call, collective=collective))
        self.parts[name] = part
        return name

    def graph(self, outputs: Sequence[str]) -> Graph:
        """All that was written."""
        return Graph(self.model.name, tuple(self.tensors), tuple(self.ops), tuple(outputs))

    def whole(self) -> Graph:
        """Embedding, all layers, and the logits of the last token."""
        model, count = self.model, len(self.tokens)
        table = self.source("embedding", (model.vocabulary // self.ranks, model.hidden), Role.WEIGHT)
        residual: list[str | None] = [None] * count
        x = []
        for part in range(count):
            ids = self.source(f"ids.{part}", (self.tokens[part],), dtype="int64")
            call = "aten.embedding.default(%0, %1)"
            found = self.op(part, "embedded", call, [table, ids], (self.tokens[part], model.hidden))
            x.append(self.all_reduce(part, "embedded_all", found))
        for layer in range(model.layers):
            for part in range(count):
                h, residual[part] = self.norm(part, f"l{layer}.norm1", x[part], residual[part])
                x[part] = self.all_reduce(part, f"l{layer}.attention_all", self.attention(layer, part, h))
            for part in range(count):
                h, residual[part] = self.norm(part, f"l{layer}.norm2", x[part], residual[part])
                block = self.experts(layer, part, h) if model.experts else self.mlp(layer, part, h)
                x[part] = self.all_reduce(part, f"l{layer}.mlp_all", block)
        last = count - 1
        for part in range(count):
            h, _ = self.norm(part, "norm", x[part], residual[part])
        self.view("last", h, (1, model.hidden), (self.tokens[last] - 1) * model.hidden, (model.hidden, 1))
        return self.graph([self.product(last, "logits", "last", "head", model.vocabulary // self.ranks)])

    def all_reduce(self, part: int, name: str, x: str) -> str:
        """The sum of ``x`` over all ranks."""
        shape = self.shapes[x]
        message = Collective(CollectiveKind.ALL_REDUCE, GROUP, tuple(range(self.ranks)), 2 * shape[0] * shape[1])
        call = "_c10d_functional.all_reduce.default(%0, 'sum', 'tp')"
        return self.op(part, name, call, [x], shape, collective=message)

    def norm(self, part: int, name: str, x: str, residual: str | None) -> tuple[str, str]:
        """``x`` added to the residual and normalised, and the new residual."""
        shape, weight = self.shapes[x], self.source(f"{name}.weight", (self.shapes[x][1],), Role.WEIGHT)
        elements = shape[0] * shape[1]
        if residual is not None:
            x = self.op(part, f"{name}.sum", "aten.add.Tensor(%0, %1)", [x, residual], shape, elements)
        call = "aten._fused_rms_norm.default(%0, [], %1, 1e-05)"
        return self.op(part, name, call, [x, weight], shape, 4 * elements), x

    def product(self, part: int, name: str, x: str, weight: str, columns: int) -> str:
        """``x`` times a weight with this many columns."""
        rows, inner = self.shapes[x]
        made = self.source(f"{name}.{weight}", (inner, columns), Role.WEIGHT)
        return self.op(part, name, "aten.mm.default(%0, %1)", [x, made], (rows, columns), 2 * rows * inner * columns)

    def attention(self, layer: int, part: int, x: str) -> str:
        """Queries, keys and values, rotary embeddings, the cache, attention and its output's product."""
        model, tokens, name = self.model, self.tokens[part], f"l{layer}"
        size, heads = model.head_size, model.heads // self.ranks
        key_heads = max(1, model.key_heads // self.ranks)
        width = (heads + 2 * key_heads) * size
        qkv = self.product(part, f"{name}.qkv", x, "w", width)
        roped = (heads + key_heads) * size
        for call in ("head_norm", "rope") if model.head_norms else ("rope",):
            self.view(f"{name}.{call}.in.{part}", qkv, (tokens, roped), 0, (width, 1))
            body = "aten.mul.Tensor(%0, %0)" if call == "rope" else "aten.rms_norm.default(%0, [], None)"
            inputs = [f"{name}.{call}.in.{part}"]
            qkv = self.op(part, f"{name}.{call}", body, inputs, (tokens, roped), 6 * tokens * roped)
            width = roped
        written = self.cache(layer, part, qkv, width, key_heads * size)
        end = sum(self.tokens[: part + 1])
        self.view(f"{name}.keys.{part}", f"{name}.cache", (1, end, key_heads, size), 0, (0, key_heads * size, size, 1))
        self.view(f"{name}.queries.{part}", qkv, (1, tokens, heads, size), 0, (0, width, size, 1))
        seen = end * tokens - tokens * (tokens - 1) // 2
        call = f"aten._flash_attention_forward.default(%0, %1, %1, None, None, {tokens}, {end}, 0.0, True, False)"
        inputs = [f"{name}.queries.{part}", f"{name}.keys.{part}", written]
        mixed = self.op(part, f"{name}.mix", call, inputs, (tokens, heads * size), 4 * seen * heads * size)
        return self.product(part, f"{name}.out", mixed, "w", model.hidden)

    def cache(self, layer: int, part: int, keys: str, width: int, columns: int) -> str:
        """Keys and values, written to their place in the cache."""
        tokens, end = self.tokens[part], sum(self.tokens[: part + 1])
        cache = self.source(f"l{layer}.cache", (2, sum(self.tokens), columns))
        self.view(f"l{layer}.stored.{part}", keys, (tokens, columns), width - columns, (width, 1))
        name, before = f"l{layer}.store.{part}", (end - tokens) * columns
        self.tensors.append(
            Tensor(
                name,
                (2, tokens, columns),
                DTYPE,
                Role.ACTIVATION,
                cache,
                (sum(self.tokens) * columns, columns, 1),
                2 * before,
            )
        )
        call = "aten.index_put.default(%0, [], %0)"
        self.ops.append(Op(name, (f"l{layer}.stored.{part}",), (name,), OpKind.COMPUTE, 0, call))
        self.parts[name] = part
        return name

    def mlp(self, layer: int, part: int, x: str) -> str:
        """Gate and up in one product, the activation, and down."""
        name = f"l{layer}"
        both = self.product(part, f"{name}.gate_up", x, "w", 2 * self.model.inner // self.ranks)
        return self.product(part, f"{name}.down", self.activation(part, name, both), "w", self.model.hidden)

    def activation(self, part: int, name: str, both: str) -> str:
        """The gate's activation times what it gates."""
        rows, columns = self.shapes[both]
        half = columns // 2
        for index, side in enumerate(("gate", "up")):
            self.view(f"{name}.{side}.{part}", both, (rows, half), index * half, (columns, 1))
        gate = f"{name}.gate.{part}"
        opened = self.op(part, f"{name}.silu", "aten.silu.default(%0)", [gate], (rows, half), 4 * rows * half)
        inputs = [opened, f"{name}.up.{part}"]
        return self.op(part, f"{name}.gated", "aten.mul.Tensor(%0, %1)", inputs, (rows, half), rows * half)

    def experts(self, layer: int, part: int, x: str) -> str:
        """Router, the top experts of each token, tokens by expert, two grouped products, and the sum."""
        model, name = self.model, f"l{layer}"
        rows, hidden = self.shapes[x]
        routed, inner = rows * model.active, model.inner // self.ranks
        scores = self.product(part, f"{name}.router", x, "w", model.experts)
        top = self.op(part, f"{name}.top", "aten.topk.default(%0, 2)", [scores], (rows, model.active), rows)
        for step in ("renormed", "filled", "aligned", "sorted"):
            call = "aten.div.Tensor(%0, %0)" if step == "renormed" else "aten.sort.default(%0)"
            top = self.op(part, f"{name}.{step}", call, [top], (rows, model.active), routed)
        up = self.grouped(part, f"{name}.experts_up", [x, top], (model.experts, hidden, 2 * inner), routed)
        gated = self.activation(part, name, up)
        down = self.grouped(part, f"{name}.experts_down", [gated, top], (model.experts, inner, hidden), routed)
        call = "aten.sum.dim_IntList(%0, [1])"
        return self.op(part, f"{name}.combined", call, [down], (rows, hidden), routed * hidden)

    def grouped(self, part: int, name: str, inputs: Sequence[str], shape: tuple[int, ...], rows: int) -> str:
        """Each expert's product with the rows routed to it, ``rows`` in all."""
        _, inner, columns = shape
        weight = self.source(f"{name}.w", shape, Role.WEIGHT)
        call = "aten._grouped_mm.default(%0, %1, %2)"
        return self.op(part, name, call, [inputs[0], weight, inputs[1]], (rows, columns), 2 * rows * inner * columns)
