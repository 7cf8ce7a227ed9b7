"""Which operators must keep their order among themselves, whatever tensors they touch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

__all__ = ["has_effect"]

#: Operators that draw random numbers, or act outside their tensors, beside those that torch tags.
_EFFECTS = re.compile(r"rand|bernoulli|dropout|normal|seed|multinomial|exponential|geometric|poisson|c10d|print")


def has_effect(target: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call to the operator ``target`` draws random numbers, or acts outside its tensors."""
    if _EFFECTS.search(target) is not None:
        return True
    namespace, _, rest = target.partition(".")
    name, _, overload = rest.partition(".")
    operator: Any = getattr(getattr(getattr(torch.ops, namespace, None), name, None), overload, None)
    if operator is None or torch.Tag.nondeterministic_seeded not in operator.tags:
        return False
    for position, argument in enumerate(operator._schema.arguments):
        if argument.name == "dropout_p":  # attention draws numbers only where it drops something out
            given = args[position] if position < len(args) else kwargs.get("dropout_p", argument.default_value)
            return bool(given != 0)
    return True
