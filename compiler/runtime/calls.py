r"""Operator bodies: the text of one ATen call, written, read back without ``eval``, and evaluated on tensors.

The grammar is ``namespace.name.overload(argument, ..., keyword=argument, ...)`` where an argument is ``%i`` (operand
``i`` of the operator), a Python literal (``None``, booleans, integers, floats with ``inf`` and ``nan``,
``complex(re, im)``, strings, lists and tuples of these), or a symbol such as ``torch.float32``, ``torch.strided``,
``torch.channels_last``. Inside strings ``%`` is written ``\x25``, so that a ``%`` in a body always means an operand.

Bodies come from plan files, which may be hostile: a body can only call a functional operator of the namespaces
``aten``, ``prims`` and ``opweave``, and none that reaches beyond its operands.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from types import MappingProxyType
from typing import Any

import torch

from ...errors import ExecutionError, OpweaveError, UnsupportedOperator

__all__ = ["Call", "InputRef", "evaluate", "format_call", "parse_call", "resolve"]

_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*){2}", re.ASCII)
_OPERAND = re.compile(r"%(?=[0-9])")
_SYMBOLS: Mapping[str, Any] = MappingProxyType(
    {k: v for k, v in vars(torch).items() if isinstance(v, torch.dtype | torch.memory_format | torch.layout)}
)
_NUMBERS = MappingProxyType({"inf": math.inf, "nan": math.nan})
_NAMESPACES = ("aten", "opweave", "prims")
#: Functional by their schema, and yet they reach files or the terminal, or write their running statistics.
_REFUSED = frozenset({"aten.from_file", "aten._print", "aten.batch_norm_update_stats"})
#: Write their running statistics, which their schema does not say, when this argument is true.
_TRAINING_FLAG: Mapping[str, str] = MappingProxyType(
    {
        "aten.batch_norm.default": "training",
        "aten.native_batch_norm.default": "training",
        "aten._batch_norm_impl_index.default": "training",
        "aten.instance_norm.default": "use_input_stats",
    }
)


@dataclass(frozen=True, slots=True)
class InputRef:
    """Operand ``index`` of the operator; written ``%index``."""

    index: int


@dataclass(frozen=True, slots=True)
class Call:
    """One parsed body: what it calls, and its arguments with an ``InputRef`` for each operand."""

    target: str
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...] = ()


def format_call(
    target: str,
    arguments: Sequence[Any],
    keywords: Mapping[str, Any] | None = None,
    index_of: Callable[[Any], int | None] | None = None,
) -> str:
    """The body that calls ``target``, such as ``aten.add.Tensor``; ``parse_call`` reads it back.

    Args:
        target: namespace, name and overload, joined by dots; ``str()`` of a ``torch._ops.OpOverload``.
        arguments: positional arguments.
        keywords: keyword arguments. Those that are a ``torch.device`` are left out: the plan decides where things are.
        index_of: operand index of a value that is an operand, ``None`` for any other value. An ``InputRef`` is
            understood without it.

    Raises:
        UnsupportedOperator: an argument is neither an operand nor a literal, for example a symbolic size.
    """
    if not _TARGET.fullmatch(target):
        raise UnsupportedOperator(f"{target!r} is not of the form namespace.name.overload")
    words = [_format(value, target, index_of) for value in arguments]
    for key, value in (keywords or {}).items():
        if not isinstance(value, torch.device):
            words.append(f"{key}={_format(value, target, index_of)}")
    return f"{target}({', '.join(words)})"


def _format(value: Any, target: str, index_of: Callable[[Any], int | None] | None) -> str:
    index = value.index if isinstance(value, InputRef) else index_of(value) if index_of is not None else None
    if index is not None:
        return f"%{index}"
    if value is None or isinstance(value, bool):
        return repr(value)
    if type(value) in (int, float):
        return repr(value)
    if type(value) is complex:
        return f"complex({value.real!r}, {value.imag!r})"
    if isinstance(value, str):
        return repr(str(value)).replace("%", "\\x25")
    if isinstance(value, torch.device):
        return repr(value.type)
    if isinstance(value, torch.dtype | torch.memory_format | torch.layout):
        return str(value)
    if isinstance(value, Sequence):
        words = ", ".join(_format(item, target, index_of) for item in value)
        if isinstance(value, tuple) and not isinstance(value, torch.Size):
            return f"({words},)" if len(value) == 1 else f"({words})"
        return f"[{words}]"
    raise UnsupportedOperator(
        f"operator {target} has an argument of type {type(value).__name__} ({value!s:.80}), which is neither a tensor "
        f"of the graph nor a literal",
        hint="sizes must be plain integers: export the model with static shapes",
    )


@lru_cache(maxsize=8192)
def parse_call(body: str) -> Call:
    """Read a body; the inverse of ``format_call``.

    Raises:
        ExecutionError: the body does not follow the grammar; says where.
    """
    target, _, rest = body.partition("(")
    if not body:
        raise ExecutionError("an operator has no body: it can be planned, not executed")
    if not _TARGET.fullmatch(target) or "\n" in body or "\r" in body:
        raise _malformed(body, 0)
    try:
        # Both marks are one byte, so that positions in the syntax tree are positions in `written`.
        written = f"_({rest}".encode()
        tree = ast.parse(_OPERAND.sub("~", f"_({rest}"), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _malformed(body, 0) from error
    if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name) or tree.end_col_offset != len(written):
        raise _malformed(body, 0)
    reader = _Reader(body, written, len(target) - 1)
    arguments = tuple(reader.value(node) for node in tree.args)
    keywords = tuple((k.arg, reader.value(k.value)) for k in tree.keywords if k.arg is not None)
    if len(dict(keywords)) != len(tree.keywords):
        raise _malformed(body, len(target))
    return Call(target, arguments, keywords)


def _malformed(body: str, position: int) -> ExecutionError:
    return ExecutionError(
        f"malformed operator body at character {position}: {body[position : position + 60]!r}",
        hint="a body reads namespace.name.overload(%0, 1, [2, 3], keyword=torch.float32)",
    )


@dataclass(frozen=True)
class _Reader:
    """Turns whitelisted syntax into values. ``written`` is the text the tree was parsed from, before substitution."""

    body: str
    written: bytes
    shift: int

    def value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=str() as text) if b"%" not in self.written[node.col_offset : node.end_col_offset]:
                return text
            case ast.Constant(value=None | bool() | int() | float() as literal):
                return literal
            case ast.UnaryOp(op=ast.Invert(), operand=ast.Constant()):
                return self._operand(node)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant() | ast.Name()):
                return -self._number(node.operand)
            case ast.Name(id=name) if name in _NUMBERS:
                return _NUMBERS[name]
            case ast.Attribute(value=ast.Name(id="torch"), attr=name) if name in _SYMBOLS:
                return _SYMBOLS[name]
            case ast.List(elts=items):
                return [self.value(item) for item in items]
            case ast.Tuple(elts=items):
                return tuple(self.value(item) for item in items)
            case ast.Call(func=ast.Name(id="complex"), args=[real, imaginary], keywords=[]):
                return complex(self._number(real), self._number(imaginary))
        raise self._refusal(node)

    def _operand(self, node: ast.UnaryOp) -> InputRef:
        digits = self.written[node.col_offset + 1 : node.end_col_offset]
        if self.written[node.col_offset : node.col_offset + 1] != b"%" or not digits.isdigit():
            raise self._refusal(node)
        return InputRef(int(digits))

    def _number(self, node: ast.expr) -> Any:
        number = self.value(node)
        if type(number) not in (int, float):
            raise self._refusal(node)
        return number

    def _refusal(self, node: ast.expr) -> ExecutionError:
        return _malformed(self.body, len(self.written[: node.col_offset].decode()) + self.shift)


@cache
def resolve(target: str) -> Callable[..., Any]:
    """The operator that ``target`` names, such as ``aten.relu.default``.

    Raises:
        ExecutionError: another namespace, an unknown operator, or one that writes its operands or reaches beyond them.
    """
    namespace, _, rest = target.partition(".")
    name, _, overload = rest.partition(".")
    if namespace not in _NAMESPACES:
        raise ExecutionError(
            f"operator {target} is not executable: namespace {namespace!r} is none of {', '.join(_NAMESPACES)}"
        )
    if namespace == "opweave":
        from . import custom_ops  # noqa: F401 - registers the operators
    try:
        operator = getattr(getattr(getattr(torch.ops, namespace), name), overload)
        schema = operator._schema
    except (AttributeError, RuntimeError) as error:
        raise ExecutionError(f"operator {target} does not exist in torch {torch.__version__}") from error
    # TorchScript's builtins (aten::save, aten::set_data) are visible here too; only the dispatcher's are operators.
    if not torch._C._dispatch_has_kernel(operator.name()) or f"{namespace}.{name}" in _REFUSED:
        raise ExecutionError(f"operator {target} is refused: it reaches beyond its operands")
    if schema.is_mutable:
        raise ExecutionError(f"operator {target} is refused: it writes its operands", hint="use its functional form")
    return operator  # type: ignore[no-any-return]


def evaluate(body: str, operands: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The tensors that ``body`` returns for ``operands``, in order; lists are flattened and ``None`` left out.

    Raises:
        ExecutionError: the body is malformed or refused, names an operand that is not there, or torch rejects the call.
    """
    call = parse_call(body)
    operator: Any = resolve(call.target)
    arguments = [_bind(value, operands, call) for value in call.arguments]
    keywords = {key: _bind(value, operands, call) for key, value in call.keywords}
    if call.target in _TRAINING_FLAG:
        _refuse_training(call, operator)
    left = operator._schema.arguments[len(arguments) :]
    if any(argument.name == "device" and not argument.has_default_value() for argument in left):
        keywords.setdefault("device", operands[0].device if operands else torch.get_default_device())  # as aten does
    try:
        return tuple(_tensors(operator(*arguments, **keywords)))
    except OpweaveError:
        raise
    except Exception as error:  # torch and registered operators raise whatever they like
        shapes = ", ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in operands)
        raise ExecutionError(f"operator {call.target} on operands ({shapes}) failed: {error}") from error


def _refuse_training(call: Call, operator: Any) -> None:
    names = (argument.name for argument in operator._schema.arguments)
    given = dict(zip(names, call.arguments, strict=False)) | dict(call.keywords)
    if given.get("running_mean") is not None and given.get(_TRAINING_FLAG[call.target]):
        raise ExecutionError(
            f"operator {call.target} is refused: in training it writes its running statistics",
            hint="use aten._native_batch_norm_legit_functional, which returns them",
        )


def _bind(value: Any, operands: Sequence[torch.Tensor], call: Call) -> Any:
    if isinstance(value, InputRef):
        if value.index >= len(operands):
            raise ExecutionError(f"{call.target} uses operand %{value.index} but the operator has {len(operands)}")
        return operands[value.index]
    if isinstance(value, list | tuple):
        return type(value)(_bind(item, operands, call) for item in value)
    return value


def _tensors(result: Any) -> Iterator[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        if result.is_nested or result._is_zerotensor():
            raise ExecutionError(f"it returns a {type(result).__name__} without plain elements")
        yield result
    elif isinstance(result, list | tuple):
        for item in result:
            yield from _tensors(item)
