"""Random programs of the families of rules, traced to graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

_ATEN = torch.ops.aten
TOKENS, BATCH, WIDTH = 12, 2, 3
#: Lengths of parts that make units of several tokens and of one, and a part of one token.
SIZES = ((6, 6), (4, 8), (1, 11), (3, 3, 6), (5, 7), (2, 1, 4, 5))


@dataclass
class Program:
    """A function of tensors drawn as numbers: each step takes an operation and its operands from ``numbers``."""

    numbers: Sequence[int]
    families: Sequence[str]
    place: int = 0
    log: list[str] = field(default_factory=list)

    def choose(self, count: int) -> int:
        """The next number below ``count``."""
        self.place += 1
        return self.numbers[(self.place - 1) % len(self.numbers)] % count

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """All values computed, the inputs aside. Numbers are read from the beginning."""
        self.place = 0
        self.log.clear()
        pool = list(inputs)
        operations = [operation for family in self.families for operation in FAMILIES[family]]
        for _ in range(len(self.numbers) // 4):
            operation = operations[self.choose(len(operations))]
            for value in operation(self, pool):
                if 0 < value.numel() <= 4000 and value.dim() <= 5:
                    pool.append(value)
                    self.log.append(f"{operation.__name__} {list(value.shape)}")
        return tuple(pool[len(inputs) :])

    def pick(self, pool: Sequence[Tensor], wanted: Callable[[Tensor], bool] = lambda _: True) -> Tensor:
        """Some tensor of ``pool`` that is ``wanted``, later ones and earlier ones alike; some tensor if none is."""
        fitting = [value for value in pool if wanted(value)] or list(pool)
        return fitting[self.choose(len(fitting))]

    def dim(self, value: Tensor) -> int:
        """Some dimension of ``value``."""
        return self.choose(max(value.dim(), 1))


Operation = Callable[[Program, Sequence[Tensor]], Sequence[Tensor]]


def _floats(value: Tensor) -> bool:
    return value.dtype == torch.float64


def _ranked(program: Program, pool: Sequence[Tensor]) -> Tensor:
    return program.pick(pool, lambda value: value.dim() > 0 and _floats(value))


def unary(program: Program, pool: Sequence[Tensor]) -> Sequence[Tensor]:
    value = program.pick(pool, _floats)
    functions = (
        torch.neg,
        torch.tanh,
        torch.sigmoid,
        torch.clone,
        lambda x: x * 0.5,
        lambda x: x.pow(2) + 1,
        torch.sin,
    )
    return [functions[program.choose(len(functions))](value)]


def binary(program: Program, pool: Sequence[Tensor]) -> Sequence[Tensor]:
    first = program.pick(pool, _floats)

    def fits(value: Tensor) -> bool:
        pairs = zip(reversed(first.shape), reversed(value.shape), strict=False)
        return _floats(value) and all(a == b or 1 in (a, b) for a, b in pairs)

    second = program.pick(pool, fits)
    functions = (torch.add, torch.sub, torch.mul, torch.maximum, lambda a, b: torch.where(a > b, a, b))
    return [functions[program.choose(len(functions))](first, second)] if fits(second) else []


def scaled(program: Program, pool: Sequence[Tensor]) -> Sequence[Tensor]:
    first, second = program.pick(pool, _floats), program.pick(pool, lambda value: _floats(value) and value.numel() == 1)
    return [torch.div(first, second.square() + 1)] if second.numel() == 1 else []


def product(program: Program, pool: Sequence[Tensor]) -> Sequence[Tensor]:
    first = program.pick(pool, lambda value: value.dim() == 2)
    second = program.pick(
        pool, lambda value: value.dim() == 2 and first.dim() == 2 and value.shape[0] == first.shape[1]
    )
    fits = first.dim() == second.dim() == 2 and first.shape[1] == second.shape[0]
    return [torch.mm(first, second) / 4] if fits else []


def gradient(program: Program, pool: Sequence[Tensor]) -> Sequence[Tensor]:
    first = program.pick(pool, lambda value: value.dim() == 2)
    second = program.pick(pool, lambda value: value.dim() == 2 and value.shape[0] == first.shape[0])
    fits = first.dim() == second.dim() == 2 and first.shape[0] == second.shape[0]
    return [torch.mm(first.t(), second) / 4] if fits else []


def batched(program: Program, pool: Sequence[Tensor]) -> Sequence[Tensor]:
    first = program.pick(pool, lambda value: value.dim() == 3)
    if first.dim() != 3:
        return []
    return [torch.bmm(first, first.transpose(1, 2)) / 4, torch.bmm(first.transpose(1, 2), first) / 4]


def biased(program: Program, pool: Sequence[Tensor]) -> Sequence[Tensor]:
    first = program.pick(pool, lambda value: value.dim() == 2)
    if first.dim() != 2:
        return []
    bias = program.pick(pool, lambda value: value.dim() == 1 and value.shape[0] == first.shape[1] and _floats(value))
    fits = _floats(bias) and bias.dim() == 1 and bias.shape[0] == first.shape[1]
    return [_ATEN.addmm.default(bias, first.t(), first, beta=0.5, alpha=0.25)] if fits else []


def reduced(program: Program, pool: Sequence[Tensor]) -> Sequence[Tensor]:
    value = _ranked(program, pool)
    dim, keep = program.dim(value), bool(program.choose(2))
    if not value.dim():
        return []
    functions = (
        lambda: torch.sum(value, dim, keep) / 4,
        lambda: torch.mean(value, dim, keep),
        lambda: torch.amax(value, dim, keep),
        lambda: torch.softmax(value, dim),
        lambda: value.mean(),
        lambda: value.sum() / 16,
        lambda: torch.max(value, dim).values,
        lambda: torch.cumsum(value, dim) / 4,
        lambda: torch.nn.functional.layer_norm(value, value.shape[-1:]),
    )
    return [functions[program.choose(len(functions))]()]


def reshaped(program: Program, pool: Sequence[Tensor]) -> Sequence[Tensor]:
    """Neighbouring dimensions merged, or one taken apart."""
    value = _ranked(program, pool)
    if not value.dim():
        return []
    dim, shape = program.dim(value), list(value.shape)
    if program.choose(2) and dim + 1 < value.dim():
        return [value.reshape(*shape[:dim], shape[dim] * shape[dim + 1], *shape[dim + 2 :])]
    factors = [factor for factor in range(1, shape[dim] + 1) if shape[dim] % factor == 0]
    factor = factors[program.choose(len(factors))]
    return [value.reshape(*shape[:dim], factor, shape[dim] // factor, *shape[dim + 1 :])]


def permuted(program: Program, pool: Sequence[Tensor]) -> Sequence[Tensor]:
    value = _ranked(program, pool)
    if value.dim() < 2:
        return []
    order = list(range(value.dim()))
    first, second = program.dim(value), program.dim(value)
    order.insert(second, order.pop(first))
    return [value.permute(order), value.transpose(first, second)]


def padded(program: Program, pool: Sequence[Tensor]) -> Sequence[Tensor]:
    value = _ranked(program, pool)
    if not value.dim():
        return []
    dim = program.dim(value)
    functions = (
        lambda: value.unsqueeze(dim),
        lambda: value.squeeze(),
        lambda: value.squeeze(dim),
        lambda: value.expand(2, *value.shape),
        lambda: value.unsqueeze(dim).expand(*value.shape[:dim], 3, *value.shape[dim:]),
        lambda: value.repeat(*[2 if place == dim else 1 for place in range(value.dim())]),
        lambda: torch.flip(value, [dim]),
        lambda: _ATEN.repeat_interleave.self_int(value, 2, dim),
        lambda: torch.tril(value, 1) if value.dim() > 1 else torch.roll(value, 1),
        lambda: torch.triu(value, -2) if value.dim() > 1 else torch.roll(value, 0, 0),
        lambda: torch.view_as_real(torch.complex(value, value.cos())),
        lambda: torch.view_as_complex(torch.stack([value, value], -1)).imag * 2,
        lambda: torch.nn.functional.pad(value, (1, 0)),
    )
    return [functions[program.choose(len(functions))]()]


def sliced(program: Program, pool: Sequence[Tensor]) -> Sequence[Tensor]:
    value = _ranked(program, pool)
    if not value.dim():
        return []
    dim = program.dim(value)
    extent = value.shape[dim]
    start = program.choose(extent)
    end = start + 1 + program.choose(extent - start)
    functions = (
        lambda: [value.narrow(dim, start, end - start)],
        lambda: [value.select(dim, start)],
        lambda: value.chunk(1 + program.choose(3), dim),
        lambda: value.unbind(dim)[:3],
        lambda: torch.split_with_sizes(value, [start, extent - start], dim),
    )
    return functions[program.choose(len(functions))]()


def beside(program: Program, pool: Sequence[Tensor]) -> Sequence[Tensor]:
    first = _ranked(program, pool)
    second = program.pick(pool, lambda value: value.shape == first.shape and _floats(value))
    if first.shape != second.shape or not first.dim():
        return []
    dim = program.dim(first)
    return [torch.stack([first, second], dim) if program.choose(2) else torch.cat([first, second, first], dim)]


def looked_up(program: Program, pool: Sequence[Tensor]) -> Sequence[Tensor]:
    table = program.pick(pool, lambda value: value.dim() == 2 and _floats(value))
    index = program.pick(pool, lambda value: value.dtype == torch.int64)
    if table.dim() != 2 or index.dtype != torch.int64:
        return []
    bounded = index % table.shape[0]
    found = [torch.nn.functional.embedding(bounded, table), table[bounded]]
    if index.dim() == 1:
        found.append(torch.index_select(table, 0, bounded))
    if index.dim() == 2 and index.shape[1] <= table.shape[1]:
        found.append(torch.gather(table, 0, bounded))
    return [found[program.choose(len(found))]]


def created(program: Program, pool: Sequence[Tensor]) -> Sequence[Tensor]:
    value = _ranked(program, pool)
    functions = (
        lambda: torch.zeros_like(value),
        lambda: torch.full_like(value, 0.5),
        lambda: value.new_ones(2, WIDTH),
        lambda: torch.full((TOKENS, WIDTH), 0.25, dtype=torch.float64),
        lambda: value.new_zeros(1, WIDTH).expand(TOKENS, WIDTH) + 0.5,
        lambda: torch.arange(TOKENS),
        lambda: torch.arange(TOKENS, dtype=torch.float64).unsqueeze(1) / TOKENS,
    )
    return [functions[program.choose(len(functions))]()]


FAMILIES: dict[str, tuple[Operation, ...]] = {
    "elementwise": (unary, binary, scaled),
    "matmul": (product, gradient, batched, biased),
    "reduction": (reduced,),
    "views": (reshaped, permuted, padded),
    "pieces": (sliced, beside, looked_up),
    "creation": (created,),
}


def numbers(steps: int) -> st.SearchStrategy[list[int]]:
    """What a program of about ``steps`` steps reads."""
    return st.lists(st.integers(0, 2**16), min_size=4, max_size=4 * steps)


def inputs(seed: int = 0) -> tuple[Tensor, ...]:
    """Tokens in front, in the middle, behind a merge, as indices; and three weights that have none."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    ids = torch.randint(0, WIDTH, (TOKENS,), generator=generator)
    shapes = ((TOKENS, WIDTH), (BATCH, TOKENS, WIDTH), (2 * TOKENS,), (WIDTH, WIDTH), (WIDTH,), (1, TOKENS))
    return (*(drawn(*shape) for shape in shapes), ids)


#: The placeholders of ``traced`` that carry tokens.
AXES = {"arg0_1": 0, "arg1_1": 1, "arg2_1": 0, "arg6_1": 0}


def traced(function: Callable[..., object], given: Sequence[Tensor]) -> GraphModule:
    """The graph of ``function``, with placeholders arg0_1, arg1_1 ..."""

    def positional(*inputs: Tensor) -> object:
        return function(*inputs)

    return make_fx(positional, tracing_mode="fake")(*given)
