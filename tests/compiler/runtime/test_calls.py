"""Bodies are read back as they were written, compute what they say, and can do nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opweave.compiler.runtime.calls import Call, InputRef, evaluate, format_call, parse_call, resolve
from opweave.errors import ExecutionError, UnsupportedOperator

SYMBOLS = [torch.float32, torch.bfloat16, torch.int64, torch.strided, torch.contiguous_format, torch.channels_last]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.complex_numbers(allow_nan=False),
    st.text(),
    st.sampled_from(SYMBOLS),
    st.builds(InputRef, st.integers(0, 99)),
)
ARGUMENTS = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.lists(inner).map(tuple), max_leaves=8)
KEYWORDS = st.dictionaries(st.sampled_from(["alpha", "dtype", "layout", "out_dtype"]), ARGUMENTS)


@given(st.lists(ARGUMENTS), KEYWORDS)
def test_a_body_reads_back_as_it_was_written(arguments: list[Any], keywords: dict[str, Any]) -> None:
    body = format_call("aten.some_op.overload_1", arguments, keywords)
    call = parse_call(body)
    assert repr(call) == repr(Call("aten.some_op.overload_1", tuple(arguments), tuple(keywords.items())))
    assert call == Call("aten.some_op.overload_1", tuple(arguments), tuple(keywords.items()))


@given(st.text())
def test_a_percent_sign_only_ever_means_an_operand(text: str) -> None:
    assert "%" not in format_call("aten.f.default", [text + "%0"])


@given(st.text(alphabet="%~0123(),=[]'\"\\ torch.f-jinae#"))
def test_any_text_is_a_call_or_one_clear_error(rest: str) -> None:
    """Whatever is accepted means the same once written again; nothing escapes as another exception."""
    body = f"aten.f.default({rest})"
    try:
        call = parse_call(body)
    except ExecutionError:
        return
    again = parse_call(format_call(call.target, call.arguments, dict(call.keywords)))
    assert repr(again) == repr(call)


def test_not_a_number_reads_back() -> None:
    (value,) = parse_call("aten.f.default(nan)").arguments
    assert math.isnan(value)


def test_operands_may_be_any_objects() -> None:
    x, y = object(), object()
    index = {id(x): 0, id(y): 1}
    body = format_call("aten.cat.default", [[x, y], 1], {}, lambda value: index.get(id(value)))
    assert body == "aten.cat.default([%0, %1], 1)"


def test_a_device_is_left_out() -> None:
    """Where a tensor lives is the plan's business; a positional device cannot be left out and becomes its type."""
    keywords = {"dtype": torch.float32, "device": torch.device("cuda", 1)}
    assert format_call("aten.zeros.default", [[2]], keywords) == "aten.zeros.default([2], dtype=torch.float32)"
    assert format_call("aten.to.device", [InputRef(0), torch.device("cpu")]) == "aten.to.device(%0, 'cpu')"


def test_an_operator_that_has_to_be_told_its_device_is_told() -> None:
    """What Inductor decomposes ``arange`` to."""
    body = "prims.iota.default(3, start=0, step=1, dtype=torch.int64, requires_grad=False)"
    (numbers,) = evaluate(body, ())
    assert numbers.tolist() == [0, 1, 2]


def test_an_argument_without_a_text_form_is_named() -> None:
    with pytest.raises(UnsupportedOperator, match=r"aten\.f\.default has an argument of type object"):
        format_call("aten.f.default", [object()])
    with pytest.raises(UnsupportedOperator, match="namespace"):
        format_call("relu", [])


MALFORMED = [
    "aten.f.default",
    "aten.f.default(",
    "aten.f.default(%0))",
    "aten.f.default(%0)(%1)",
    "aten.f.default(%0).x",
    "aten.f.default(%0)  # more",
    "aten.f.default(%0, ~1)",
    "aten.f.default(%x)",
    "aten.f.default(%0x1)",
    "aten.f.default('%0')",
    "aten.f.default('100%')",
    "aten.f.default(7 %3)",
    "aten.f.default(*%0)",
    "aten.f.default(**{})",
    "aten.f.default(a=1, a=2)",
    "aten.f.default(1 + 1)",
    "aten.f.default(--1)",
    "aten.f.default(-True)",
    "aten.f.default(b'x')",
    "aten.f.default(f'{1}')",
    "aten.f.default(...)",
    "aten.f.default(lambda: 0)",
    "aten.f.default(torch.load)",
    "aten.f.default(torch.ops)",
    "aten.f.default(os.path)",
    "aten.f.default(__import__('os'))",
    "aten.f.default([x for x in (1, 2)])",
    "aten.f.default(\n%0)",
    "aten.f.default('\x00')",
    "aten.f.default('\ud800')",
    "f(%0)",
    "aten.f(%0)",
    "aten.f.g.h(%0)",
    "(%0)",
    "aten.f.default(" + "[" * 5000 + "]" * 5000 + ")",
    "aten.f.default(" + "-" * 100_000 + "1)",
    "aten.f.default(" + "9" * 10_000 + ")",
]


@pytest.mark.parametrize("body", MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_body_is_refused(body: str) -> None:
    with pytest.raises(ExecutionError, match="malformed operator body"):
        parse_call(body)


def test_a_malformed_body_says_where() -> None:
    with pytest.raises(ExecutionError, match=r"at character 20: '1 \+ 1\)'"):
        parse_call("aten.f.default('é', 1 + 1)")


def test_an_empty_body_can_only_be_planned() -> None:
    with pytest.raises(ExecutionError, match="no body"):
        evaluate("", [])


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("aten.no_such_operator.default", "does not exist"),
        ("aten.relu.no_such_overload", "does not exist"),
        ("aten.__class__.mro", "does not exist"),
        ("aten.relu.__class__", "does not exist"),
        ("aten._dir.append", "does not exist"),
        ("torchvision.nms.default", "namespace 'torchvision'"),
        ("os.system.default", "namespace 'os'"),
        ("aten.from_file.default", "beyond its operands"),
        ("aten._print.default", "beyond its operands"),
        ("aten.batch_norm_update_stats.default", "beyond its operands"),
        ("aten.save.default", "beyond its operands"),
        ("aten.set_data.default", "writes its operands"),
        ("aten.add_.Tensor", "writes its operands"),
        ("aten.add.out", "writes its operands"),
    ],
)
def test_operators_with_other_effects_are_refused(target: str, reason: str) -> None:
    with pytest.raises(ExecutionError, match=reason) as raised:
        resolve(target)
    assert target in str(raised.value)


def test_bodies_compute() -> None:
    x, y = torch.arange(6.0).reshape(2, 3), torch.ones(2, 3)
    (total,) = evaluate("aten.add.Tensor(%0, %1, alpha=2)", [x, y])
    assert torch.equal(total, x + 2 * y)
    (joined,) = evaluate("aten.cat.default([%0, %1, %0], 1)", [x, y])
    assert torch.equal(joined, torch.cat([x, y, x], 1))
    (made,) = evaluate("aten.full.default([2], -inf, dtype=torch.float64)", [])
    assert torch.equal(made, torch.full([2], -math.inf, dtype=torch.float64))
    (picked,) = evaluate("aten.index.Tensor(%0, [None, %1])", [x, torch.tensor([2, 0])])
    assert torch.equal(picked, x[:, [2, 0]])
    (primitive,) = evaluate("prims.convert_element_type.default(%0, torch.int32)", [x])
    assert torch.equal(primitive, x.to(torch.int32))


def test_several_results_are_flattened_and_absent_ones_left_out() -> None:
    x = torch.arange(6.0)
    values, indices = evaluate("aten.topk.default(%0, 2)", [x])
    assert values.tolist() == [5, 4]
    assert indices.tolist() == [5, 4]
    assert [part.tolist() for part in evaluate("aten.split_with_sizes_copy.default(%0, [1, 2, 3])", [x])] == [
        [0],
        [1, 2],
        [3, 4, 5],
    ]
    gradients = evaluate(
        "aten.native_layer_norm_backward.default(%0, %0, [6], %1, %1, None, None, [True, False, False])",
        [x.reshape(1, 6), torch.ones(1, 1)],
    )
    assert len(gradients) == 1


def test_what_torch_rejects_names_the_operator_and_its_operands() -> None:
    with pytest.raises(ExecutionError, match=r"aten\.mm\.default on operands \(float32\[2, 3\], float32\[2, 3\]\)"):
        evaluate("aten.mm.default(%0, %1)", [torch.ones(2, 3), torch.ones(2, 3)])
    with pytest.raises(ExecutionError, match="%1 but the operator has 1"):
        evaluate("aten.mm.default(%0, %1)", [torch.ones(2, 3)])


@pytest.mark.parametrize(
    "body", ["aten._nested_tensor_from_tensor_list.default([%0])", "aten._efficientzerotensor.default([4])"]
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_tensors_without_elements_of_their_own_are_refused(body: str) -> None:
    """They have no shape or no storage, and asking for it raises whatever torch likes."""
    with pytest.raises(ExecutionError, match="without plain elements"):
        evaluate(body, [torch.ones(4)])


def test_running_statistics_are_not_written_behind_the_graphs_back() -> None:
    """``batch_norm`` changes two operands in training, though its schema says that it changes none."""
    x, mean, variance = torch.randn(4, 3), torch.zeros(3), torch.ones(3)
    body = "aten.batch_norm.default(%0, None, None, %1, %2, {}, 0.1, 1e-05, False)"
    with pytest.raises(ExecutionError, match="running statistics"):
        evaluate(body.format(True), [x, mean, variance])
    (inference,) = evaluate(body.format(False), [x, mean, variance])
    torch.testing.assert_close(inference, x / (1 + 1e-5) ** 0.5)
    (alone,) = evaluate("aten.batch_norm.default(%0, None, None, None, None, True, 0.1, 1e-05, False)", [x])
    assert alone.mean(0).abs().max() < 1e-6
