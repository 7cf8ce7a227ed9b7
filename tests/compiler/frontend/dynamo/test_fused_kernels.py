"""Fused kernels in graphs of torch.compile: launched where they fit, on a CPU by reference, and the same values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton", reason="Triton exists for Linux only")

import opweave
from opweave import torch_backend
from opweave.compiler.frontend.dynamo import launches
from opweave.compiler.frontend.dynamo.launches import matched
from opweave.compiler.fusion import Cost, Match, Uses
from opweave.compiler.graph import Graph
from opweave.errors import ExecutionError, OptionError
from tests.compiler.frontend.dynamo.contract import check, compiled, reports, same


class Block(nn.Module):
    """A residual addition, a normalisation and a linear layer: between two transformer blocks."""

    def __init__(self, columns: int = 16) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(columns)
        self.up = nn.Linear(columns, 2 * columns)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum, and what the linear layer makes of its normalisation."""
        hidden = x + residual
        return hidden, self.up(self.norm(hidden))


def inputs(*shape: int, gradients: bool = False) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(len(shape))
    return tuple(torch.randn(shape, generator=generator, requires_grad=gradients) for _ in range(2))


def launched() -> list[str]:
    """Kernels of all graphs compiled since the test began."""
    return [kernel for report in reports() for kernel, _ in report.launches]


@torch.no_grad()
def test_inference_launches_a_kernel_over_planned_memory() -> None:
    """Its results are written where the plan says, in the poisoned arena: the operator that writes is called."""
    check(Block(), lambda: inputs(2, 3, 16), kernels="add_rms_norm")
    assert launched() == ["add_rms_norm"]
    (report,) = reports()
    assert report.operators["opweave.add_rms_norm_out.default"] == 1
    assert "add" in report.launches[0][1]
    assert "mean" in report.launches[0][1]


def test_training_leaves_what_the_backward_needs() -> None:
    check(Block(), lambda: inputs(2, 3, 16, gradients=True), gradients=True, kernels="add_rms_norm")
    forward = next(report for report in reports() if report.phase == "forward")
    assert [kernel for kernel, _ in forward.launches] == ["add_rms_norm"]


@torch.no_grad()
def test_all_sizes_may_be_symbols() -> None:
    block = Block()
    function = compiled(block, dynamic=True, kernels="add_rms_norm")
    for tokens in (3, 5, 8, 16):
        given = inputs(tokens, 2, 16)
        same(function(*given), block(*given))
    assert launched() == ["add_rms_norm"]


@torch.no_grad()
def test_on_a_cpu_none_is_launched_that_was_not_asked_for() -> None:
    check(Block(), lambda: inputs(2, 3, 16))
    check(Block(), lambda: inputs(2, 3, 16), kernels="off")
    assert launched() == []


@torch.no_grad()
def test_a_launch_that_its_kernel_refuses_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a kernel may that is given operands on two devices, which the operator graph does not show."""

    def refuse(self: object) -> None:
        raise ExecutionError("kernel add_rms_norm needs weight on cuda")

    monkeypatch.setattr(launches._Placing, "insert", refuse)
    check(Block(), lambda: inputs(2, 3, 16), kernels="add_rms_norm")
    assert launched() == []


@torch.no_grad()
def test_an_explanation_names_the_kernel_and_what_it_replaces() -> None:
    explanation = opweave.explain(Block(), inputs(2, 3, 16), kernels="add_rms_norm")
    assert "fused        add_rms_norm instead of add, " in str(explanation)


@pytest.mark.parametrize(
    ("kernels", "message"),
    [
        ("add_rms_norm,nrm", "kernels is 'add_rms_norm,nrm'; there is no 'nrm'; it takes 'auto', 'all'"),
        *(("", "kernels is ''"), ("auto,off", "kernels is 'auto,off'")),
    ],
)
def test_names_that_are_no_kernels_are_refused(kernels: str, message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        torch_backend.explain(Block(), inputs(2, 3, 16), kernels=kernels)
    assert "add_rms_norm" in caught.value.hint


@torch.no_grad()
def test_every_other_kernel_may_fit_as_well() -> None:
    """Whatever is launched, alone or beside others, computes what eager PyTorch does."""
    check(Block(), lambda: inputs(2, 3, 16), kernels="all", tolerance=1e-4)
    assert launched()


def doubled(module: torch.fx.GraphModule, static: int) -> list[Match]:
    """What a rule matches that takes a sum for its own if it has ``static`` rows, under sizes that are symbols."""

    def rule(graph: Graph) -> list[Match]:
        found = []
        for op in graph.ops:
            out = graph.tensor[op.outputs[0]]
            if op.target == "aten.add.Tensor" and out.shape[0] == static:
                operands = [graph.tensor[name] for name in op.inputs]
                uses = Uses(graph)
                before = uses.place(uses.replaced([out], operands), operands, [out])
                assert before is not None
                found.append(Match("k", (op.name,), before, {"x": operands[0]}, (out,), Cost(0, 0)))
        return found

    return matched(module, rule)[1]


def test_sizes_that_are_equal_by_chance_are_no_match() -> None:
    """With four rows in the example, only a rule that holds for any number of rows may take a symbolic graph."""
    seen: list[list[Match]] = []

    def backend(module: torch.fx.GraphModule, examples: Any) -> Any:
        from torch._dynamo.backends.common import aot_autograd

        def compile_inner(traced: torch.fx.GraphModule, inputs: object) -> Any:
            seen.append(doubled(traced, 4))
            return traced.forward

        return aot_autograd(fw_compiler=compile_inner)(module, examples)

    for dynamic, count in ((False, 1), (True, 0)):
        torch._dynamo.reset()
        seen.clear()
        torch.compile(lambda x: x + x.sin(), backend=backend, dynamic=dynamic)(torch.randn(4, 3))
        assert [len(matches) for matches in seen] == [count]


@torch.no_grad()
def test_an_operator_that_a_model_calls_itself_writes_planned_memory() -> None:
    """The functional operator would allocate for itself; the plan places what it writes, whatever ``kernels`` says."""
    from opweave.kernels.add_rms_norm import KERNEL

    weight = torch.rand(16)
    check(lambda x, residual: KERNEL(x, residual, weight, 1e-5)[1] * 2, lambda: inputs(2, 3, 16), kernels="off")
    (report,) = reports()
    assert report.operators == {"opweave.add_rms_norm_out.default": 1}


def test_a_kernel_with_gradients_is_launched_before_autograd_divides_the_graph() -> None:
    """Its backward half calls the kernel's own, instead of what the forward half would have to save."""
    check(Block(), lambda: inputs(2, 3, 16, gradients=True), gradients=True, kernels="add_rms_norm")
    operators = {report.phase: report.operators for report in reports()}
    assert any("add_rms_norm_backward" in name for name in operators["backward"])
    assert not any(report.launches for report in reports() if report.phase == "backward")


def test_autocast_leaves_training_to_pytorch() -> None:
    """Which casts autocast inserts depends on operators that a launch would replace."""
    block, twin = Block(), Block()
    twin.load_state_dict(block.state_dict())
    function = compiled(block, kernels="add_rms_norm")
    with torch.autocast("cpu", torch.bfloat16):
        same(function(*inputs(2, 3, 16)), twin(*inputs(2, 3, 16)), 0.02)
    assert {report.phase for report in reports()} == {"forward", "backward"}


class Attention(nn.Module):
    """What must come through tracing unchanged: dropout that is switched off, a buffer that moves, a view returned."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.dropout = Block(), nn.Dropout(0.0)
        self.count = nn.Buffer(torch.zeros(1))

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Block`, transposed."""
        self.count.add_(1)
        hidden, up = self.block(self.dropout(x), residual)
        return hidden.transpose(0, 1), up


def test_buffers_that_move_and_views_survive_the_earlier_tracing() -> None:
    check(Attention(), lambda: inputs(2, 3, 16, gradients=True), gradients=True, kernels="add_rms_norm")
    assert "add_rms_norm" in launched()


def test_sizes_may_be_symbols_in_training() -> None:
    block = Block()
    function = compiled(block, dynamic=True, kernels="add_rms_norm")
    for tokens in (3, 5, 8):
        given = inputs(tokens, 2, 16, gradients=True)
        found = function(*given)
        (found[1].sum() + found[0].square().sum()).backward()
        gradients = [tensor.grad for tensor in given]
        same(found, block(*given))
        twins = [tensor.detach().requires_grad_() for tensor in given]
        expected = block(*twins)
        (expected[1].sum() + expected[0].square().sum()).backward()
        same(gradients, [tensor.grad for tensor in twins])
    assert "add_rms_norm" in launched()


class Scaled(Block):
    """A block whose sum is scaled in place behind its normalisation: a backward may have saved it before."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The scaled sum, and what the linear layer makes of a normalisation of it before."""
        hidden = x + residual
        normalized = torch.nn.functional.rms_norm(hidden.detach(), (16,))
        hidden.mul_(2)
        return hidden, self.up(self.norm(normalized + residual)).mul_(0.5)


def test_results_that_are_changed_in_place_afterwards() -> None:
    check(Scaled(), lambda: inputs(2, 3, 16, gradients=True), gradients=True, kernels="all", tolerance=1e-4)


class LanguageModel(nn.Module):
    """A gated feed-forward block between a normalisation and a head, and its loss, as many write it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(16)
        self.gate, self.up, self.down = nn.Linear(16, 24, False), nn.Linear(16, 24, False), nn.Linear(24, 16, False)
        self.head = nn.Linear(16, 1000, False)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy of made-up targets."""
        hidden = self.norm(x + residual)
        hidden = self.down(nn.functional.silu(self.gate(hidden)) * self.up(hidden))
        logits = self.head(hidden).flatten(0, 1)
        target = torch.arange(logits.shape[0], device=x.device) * 7 % 1000
        return nn.functional.cross_entropy(logits, target)


def test_a_training_step_of_a_language_model_keeps_no_logits() -> None:
    """Norm, gated layer and loss are launched with their backward; the peak is below the logits' own bytes."""
    check(
        LanguageModel(),
        lambda: inputs(8, 32, 16, gradients=True),
        gradients=True,
        kernels="add_rms_norm,gated_linear,linear_cross_entropy",
    )
    forward, backward = reports()
    assert [kernel for kernel, _ in forward.launches] == ["add_rms_norm", "gated_linear", "linear_cross_entropy"]
    called = set(backward.operators)
    for name in ("add_rms_norm_backward", "gated_activation_backward", "linear_cross_entropy_backward"):
        assert f"opweave.{name}_out.default" in called
    assert not any("as_strided" in kernel for kernel in backward.kernels)
    logits_bytes = 8 * 32 * 1000 * 4
    assert forward.peak_bytes < logits_bytes / 4
    torch._dynamo.reset()
    check(LanguageModel(), lambda: inputs(8, 32, 16, gradients=True), gradients=True, kernels="off")
    assert reports()[2].peak_bytes > logits_bytes


def _gated(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(x @ gate) * (x @ up)


def factors() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 16), (16, 8), (16, 8))
    return tuple(torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes)


def without_gradients(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        product = _gated(x, gate, up)
    return product * x.sum()


def of_a_constant(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        x = x * 2
    return _gated(x, gate, up)


def half_without_gradients(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        passed = x @ up
    return torch.nn.functional.silu(x @ gate) * passed


def detached_operand(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(x @ gate) * (x.detach() @ up)


def detached_between(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    opened = torch.nn.functional.silu((x @ gate).detach())
    return opened * (x @ up), opened


def changed_between(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    value = x @ gate
    share = torch.sigmoid(value)
    value.add_(1)
    return share * value * (x @ up), share


@pytest.mark.parametrize(
    "function",
    [without_gradients, of_a_constant, half_without_gradients, detached_operand, detached_between, changed_between],
)
def test_what_is_detached_or_changed_in_place_keeps_its_gradients(function: Any) -> None:
    check(function, factors, gradients=True, kernels="gated_linear", tolerance=1e-4)
    check(lambda *given: (function(*given), _gated(*given)), factors, gradients=True, kernels="all", tolerance=1e-4)


def test_gradients_may_be_off_elsewhere() -> None:
    def function(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = x.detach().abs().max().view(1)
        return _gated(x * scale, gate, up) * scale

    check(function, factors, gradients=True, kernels="gated_linear", tolerance=1e-4)
    assert "gated_linear" in launched()


class _Reversed(torch.autograd.Function):
    """A function with a gradient that its values do not say."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """Twice ``x``."""
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """As if it were subtracted."""
        return -gradient


def with_another_gradient(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    reverse: Any = _Reversed.apply
    product: torch.Tensor = reverse(_gated(x, gate, up))
    return product


def with_a_checkpoint(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = checkpoint(_gated, x, gate, up, use_reentrant=False)
    return product + _gated(x, up, gate)


def with_data(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return _gated(x, gate, up) + x.data.sum()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # PyTorch's own tracing does
@pytest.mark.parametrize("function", [with_another_gradient, with_a_checkpoint, with_data])
def test_what_earlier_tracing_would_lose(function: Any) -> None:
    check(function, factors, gradients=True, kernels="gated_linear", tolerance=1e-4)
