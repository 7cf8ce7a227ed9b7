"""Passes by name: a pass's name is its path under ``passes/``, such as ``order/beam`` or ``residency/ilp``.

A module is a method when it defines a class with an ``apply`` method and lists it in ``__all__``; everything else in
a folder is a helper. Names are found by reading source, so that listing them imports no solver; only the pass that
was asked for is imported.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast, get_type_hints

import msgspec

from ..compiler.pipeline import Pass
from ..errors import OptionError

__all__ = ["Description", "Option", "describe", "make", "names"]


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a pass: its name, its type as Python writes it, and its default."""

    name: str
    type: str
    default: object


@dataclasses.dataclass(frozen=True)
class Description:
    """What a pass is: its path name, the first paragraph of its docstring, and its options."""

    name: str
    summary: str
    options: tuple[Option, ...]


def names() -> tuple[str, ...]:
    """Names of all passes, sorted. Imports none of them."""
    return tuple(sorted(_methods()))


def make(spec: str) -> Pass:
    """The pass that ``spec`` asks for: a name, or a name with options such as ``order/beam(width=64)``.

    Values are Python literals; a bare word is a string.

    Raises:
        OptionError: ``spec`` cannot be read, or names a pass or an option that does not exist, or gives an option
            a value of the wrong type or outside its range.
    """
    name, values = _parse(spec)
    kind = _class_of(name)
    hints = _option_types(kind)
    for option in values:
        if option not in hints:
            raise OptionError(
                f"pass {name!r} has no option {option!r}; it has {', '.join(hints) or 'none'}",
                hint=_did_you_mean(option, hints),
            )
    return cast(Pass, kind(**{option: _converted(name, option, value, hints) for option, value in values.items()}))


def describe(name: str) -> Description:
    """What the pass ``name`` does and which options it takes. Raises OptionError for a name that does not exist."""
    kind = _class_of(name)
    summary = " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())
    options = tuple(
        Option(field.name, field.type if isinstance(field.type, str) else str(field.type), _default(field))
        for field in _options(kind)
    )
    return Description(name, summary, options)


def _options(kind: type[Any]) -> list[dataclasses.Field[Any]]:
    """Fields that users may set; the others pass something between passes."""
    return [field for field in dataclasses.fields(kind) if not field.metadata.get("internal")]


def _default(field: dataclasses.Field[Any]) -> object:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _methods() -> dict[str, str]:
    """Full module name of each pass, by its path name."""
    package = importlib.import_module(__package__ or "")
    found: dict[str, str] = {}
    for folder in pkgutil.iter_modules(package.__path__):
        if not folder.ispkg or folder.name.startswith("_"):
            continue
        path = f"{package.__name__}.{folder.name}"
        for module in pkgutil.iter_modules([str(Path(root) / folder.name) for root in package.__path__]):
            if any(_method_classes(package.__path__, folder.name, module.name)):
                found[f"{folder.name}/{module.name}"] = f"{path}.{module.name}"
    return found


def _method_classes(roots: Iterable[str], folder: str, module: str) -> Iterator[str]:
    """Names of the classes in a module's source that are listed in its ``__all__`` and have a method ``apply``."""
    for root in roots:
        source = Path(root) / folder / f"{module}.py"
        if source.is_file():
            yield from _classes_in(source)


@functools.cache  # parsing every pass takes longer than making one, and sources stay as they are while a process runs
def _classes_in(source: Path) -> tuple[str, ...]:
    tree = ast.parse(source.read_bytes())
    public = _public_names(tree)
    classes = (node for node in tree.body if isinstance(node, ast.ClassDef))
    return tuple(node.name for node in classes if node.name in public and _defines_apply(node))


def _public_names(tree: ast.Module) -> frozenset[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return frozenset(ast.literal_eval(node.value))
    return frozenset()


def _defines_apply(node: ast.ClassDef) -> bool:
    return any(isinstance(item, ast.FunctionDef) and item.name == "apply" for item in node.body)


def _class_of(name: str) -> type[Any]:
    methods = _methods()
    if name not in methods:
        raise OptionError(
            f"there is no pass {name!r}; there are {', '.join(sorted(methods))}", hint=_did_you_mean(name, methods)
        )
    package = importlib.import_module(__package__ or "")
    folder, _, stem = name.partition("/")
    module = importlib.import_module(methods[name])
    classes = list(_method_classes(package.__path__, folder, stem))
    return cast(type[Any], getattr(module, classes[0]))


def _option_types(kind: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in _options(kind)}


def _did_you_mean(word: str, known: dict[str, Any]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else ""


def _parse(spec: str) -> tuple[str, dict[str, object]]:
    """Path name and option values of a spec such as ``order/beam(width=64)``."""
    name, bracket, rest = spec.strip().partition("(")
    name = name.strip()
    if not bracket:
        return name, {}
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise SyntaxError
        if any(keyword.arg is None for keyword in call.keywords):
            raise SyntaxError
        return name, {str(keyword.arg): _literal(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError):
        raise OptionError(
            f"cannot read the pass {spec!r}", hint="options are written as in 'order/beam(width=64)'"
        ) from None


def _literal(node: ast.expr) -> object:
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


def _converted(name: str, option: str, value: object, hints: dict[str, Any]) -> object:
    try:
        return msgspec.convert(value, hints[option])
    except msgspec.ValidationError as error:
        reason = str(error).replace("`", "").replace("Expected", "expected")
        raise OptionError(f"option {option!r} of pass {name!r} cannot be {value!r}: {reason}") from None
