"""Recurrent networks, unrolled over the sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..node import CannotLower, Lowered, Lowering, Node

__all__ = ["TABLE"]

_MAX_STEPS = 512
State = tuple[torch.Tensor, ...]
Activation = Callable[[torch.Tensor], torch.Tensor]

_ACTIVATIONS: Mapping[str, Activation] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "softsign": torch.nn.functional.softsign,
    "softplus": torch.nn.functional.softplus,
}


@dataclass(frozen=True)
class Cell:
    """One direction's parameters: input and recurrent weights, their biases, peepholes, activations."""

    weight: torch.Tensor
    recurrence: torch.Tensor
    weight_bias: torch.Tensor | None
    recurrence_bias: torch.Tensor | None
    peepholes: torch.Tensor | None
    activations: tuple[Activation, ...]


Step = Callable[[Node, Cell, torch.Tensor, State], State]


def _activations(node: Node, defaults: Sequence[str], direction: int) -> tuple[Activation, ...]:
    count = len(defaults)
    names = [str(name, "utf-8").lower() for name in node.attributes["activations"].strings] \
        if node.given("activations") else []  # fmt: skip
    chosen = names[direction * count : (direction + 1) * count] or list(defaults)
    if node.given("activation_alpha") or node.given("activation_beta") or not set(chosen) <= set(_ACTIVATIONS):
        raise CannotLower(f"activations {chosen} with parameters")
    return tuple(_ACTIVATIONS[name] for name in chosen)


def _both_biases(cell: Cell, total: torch.Tensor) -> torch.Tensor:
    for bias in (cell.weight_bias, cell.recurrence_bias):
        total = total if bias is None else total + bias
    return total


def _rnn_step(node: Node, cell: Cell, x: torch.Tensor, state: State) -> State:
    del node
    total = torch.matmul(x, cell.weight.t()) + torch.matmul(state[0], cell.recurrence.t())
    return (cell.activations[0](_both_biases(cell, total)),)


def _gru_step(node: Node, cell: Cell, x: torch.Tensor, state: State) -> State:
    (hidden,) = state
    gate, act = cell.activations
    inputs = torch.matmul(x, cell.weight.t())
    inputs = inputs if cell.weight_bias is None else inputs + cell.weight_bias
    xz, xr, xh = torch.chunk(inputs, 3, -1)
    rz, rr, rh = torch.chunk(cell.recurrence, 3, 0)
    bz, br, bh = torch.chunk(cell.recurrence_bias, 3, 0) if cell.recurrence_bias is not None else (0, 0, 0)
    update = gate(xz + torch.matmul(hidden, rz.t()) + bz)
    reset = gate(xr + torch.matmul(hidden, rr.t()) + br)
    if node.flag("linear_before_reset"):
        new = act(xh + reset * (torch.matmul(hidden, rh.t()) + bh))
    else:
        new = act(xh + torch.matmul(reset * hidden, rh.t()) + bh)
    return ((1 - update) * new + update * hidden,)


def _lstm_step(node: Node, cell: Cell, x: torch.Tensor, state: State) -> State:
    hidden, memory = state
    gate, candidate, output = cell.activations
    total = _both_biases(cell, torch.matmul(x, cell.weight.t()) + torch.matmul(hidden, cell.recurrence.t()))
    i, o, f, c = torch.chunk(total, 4, -1)
    pi, po, pf = torch.chunk(cell.peepholes, 3, 0) if cell.peepholes is not None else (None, None, None)
    i = i if pi is None else i + pi * memory
    f = f if pf is None else f + pf * memory
    forget = 1 - gate(i) if node.flag("input_forget") else gate(f)
    memory = forget * memory + gate(i) * candidate(c)
    o = o if po is None else o + po * memory
    return gate(o) * output(memory), memory


def _run(node: Node, cell: Cell, x: torch.Tensor, state: State, step: Step, *, reverse: bool,
         lengths: torch.Tensor | None) -> tuple[list[torch.Tensor], State]:  # fmt: skip
    """The hidden states in the sequence's order, and the last state; past a sequence's end the state stands still."""
    outputs: list[torch.Tensor] = [x] * x.shape[0]
    order = range(x.shape[0])
    for time in reversed(order) if reverse else order:
        after = step(node, cell, x[time], state)
        if lengths is not None:
            alive = (lengths > time).unsqueeze(-1)
            outputs[time] = torch.where(alive, after[0], torch.zeros_like(after[0]))
            after = tuple(torch.where(alive, new, old) for new, old in zip(after, state, strict=True))
        else:
            outputs[time] = after[0]
        state = after
    return outputs, state


def _cell(node: Node, direction: int, defaults: Sequence[str]) -> Cell:
    bias = node.optional(3)
    halves = (None, None) if bias is None else tuple(torch.chunk(bias[direction], 2, 0))
    given = node.optional(7) if node.op_type == "LSTM" else None
    peepholes = None if given is None else given[direction]
    activations = _activations(node, defaults, direction)
    return Cell(node.tensor(1)[direction], node.tensor(2)[direction], halves[0], halves[1], peepholes, activations)


def _recurrent(step: Step, defaults: Sequence[str], states: int) -> Lowering:
    def lower(node: Node) -> Sequence[Lowered]:
        x, hidden_size = node.tensor(0), node.integer("hidden_size", node.value(2).shape[-1])
        batch_first = node.flag("layout")
        if node.given("clip") or x.shape[1 if batch_first else 0] > _MAX_STEPS:
            raise CannotLower("clipping, or a sequence of more than 512 steps")
        x = x.transpose(0, 1) if batch_first else x
        directions = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[
            node.string("direction", "forward")
        ]
        outputs, finals = [], []
        for direction, reverse in enumerate(directions):
            zeros = torch.zeros(x.shape[1], hidden_size, dtype=x.dtype)
            initial = []
            for index in range(states):
                given = node.optional(5 + index)
                if given is not None:
                    given = given[:, direction] if batch_first else given[direction]
                initial.append(zeros if given is None else given)
            rows, final = _run(node, _cell(node, direction, defaults), x, tuple(initial), step, reverse=reverse,
                               lengths=node.optional(4))  # fmt: skip
            outputs.append(torch.stack(rows, 0))
            finals.append(final)
        y = torch.stack(outputs, 2 if batch_first else 1)
        y = y.transpose(0, 1) if batch_first else y
        last = [torch.stack([final[index] for final in finals], 1 if batch_first else 0) for index in range(states)]
        return [y, *last]

    return lower


TABLE: Mapping[str, Lowering] = {
    "RNN": _recurrent(_rnn_step, ["tanh"], 1),
    "GRU": _recurrent(_gru_step, ["sigmoid", "tanh"], 1),
    "LSTM": _recurrent(_lstm_step, ["sigmoid", "tanh", "tanh"], 2),
}
