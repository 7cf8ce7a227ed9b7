"""``and``, ``or`` and ``not`` on blocks under Triton's interpreter.

Triton compiles them element by element; Python asks a block for its one truth value, which the interpreter answers
with True. Kernels are rewritten before they run, as the interpreter does for assignments.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import ASTTransformer, FunctionRewriter, InterpretedFunction

from ._patch import Patch

__all__ = ["correct_syntax"]

_AND, _OR, _NOT = "_elementwise_and", "_elementwise_or", "_elementwise_not"


def correct_syntax(patch: Patch) -> None:
    """Make ``and``, ``or`` and ``not`` elementwise under the interpreter until ``patch`` is undone."""
    for name, function in ((_AND, _elementwise_and), (_OR, _elementwise_or), (_NOT, _elementwise_not)):
        patch.setattr(interpreter, name, function, False)  # what a rewritten kernel sees besides its own names
    patch.setattr(FunctionRewriter, "ast_transformer", _Elementwise())
    patch.setattr(InterpretedFunction, "rewritten_fn", {})


def _elementwise_and(left: Any, right: Callable[[], Any]) -> Any:
    if not isinstance(left, tl.tensor):
        return left and right()
    semantic = interpreter.interpreter_semantic
    return semantic.logical_and(left, semantic.to_tensor(right()))


def _elementwise_or(left: Any, right: Callable[[], Any]) -> Any:
    if not isinstance(left, tl.tensor):
        return left or right()
    semantic = interpreter.interpreter_semantic
    return semantic.logical_or(left, semantic.to_tensor(right()))


def _elementwise_not(value: Any) -> Any:
    return interpreter.interpreter_semantic.not_(value) if isinstance(value, tl.tensor) else not value


def _call(function: str, *operands: ast.expr) -> ast.Call:
    return ast.Call(func=ast.Name(id=function, ctx=ast.Load()), args=list(operands), keywords=[])


def _later(value: ast.expr) -> ast.Lambda:
    """What is on the right is evaluated only where Python would."""
    nothing = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
    return ast.Lambda(args=nothing, body=value)


class _Elementwise(ASTTransformer):  # type: ignore[misc] # triton ships no types
    def visit_Assign(self, node: ast.Assign) -> ast.AST:  # noqa: N802 # ast's name
        """Triton's own visitor leaves alone what is assigned."""
        node.value = self.visit(node.value)
        result: ast.AST = super().visit_Assign(node)
        return result

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:  # noqa: N802
        """From the left, as Python groups them."""
        self.generic_visit(node)
        result, *others = node.values
        for value in others:
            result = _call(_AND if isinstance(node.op, ast.And) else _OR, result, _later(value))
        return result

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:  # noqa: N802
        """Only ``not``: the signs are methods of the operand."""
        self.generic_visit(node)
        return _call(_NOT, node.operand) if isinstance(node.op, ast.Not) else node
