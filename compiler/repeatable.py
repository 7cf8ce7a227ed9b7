"""Whether an operator gives the same bytes every time it runs on the same operands."""

from __future__ import annotations

import re

from .graph import Op

__all__ = ["is_repeatable"]

# Calls that draw random numbers, may draw some depending on their arguments, or return memory that nobody wrote;
# in aten, prims and the ONNX nodes that opweave's own operators quote. A test compares them with torch's tags.
_NOT_REPEATABLE = re.compile(
    r"dropout|rand|bernoulli|multinomial|normal(?!i[sz])|uniform|exponential|geometric|cauchy|poisson|binomial"
    r"|dirichlet|standard_gamma|rrelu|attention|rnn|gru|lstm|empty",
    re.IGNORECASE,
)


def is_repeatable(op: Op) -> bool:
    """Whether running ``op`` again on the same operands gives the same bytes, by what it says and its body calls.

    An operator without a body computes nothing that could differ.
    """
    return op.repeatable and not _NOT_REPEATABLE.search(op.body)
