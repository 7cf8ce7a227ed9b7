"""Routing traces: which experts each token went to in each layer, as files and as counts."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ModelError, OptionError

__all__ = ["RoutingTrace", "read_trace", "zipf_trace"]

MAX_EXPERTS = 1 << 16


@dataclass(frozen=True)
class RoutingTrace:
    """``chosen``: int64 of shape [tokens, layers, top_k], the numbers of the experts, 0 to ``experts`` - 1.

    Raises:
        ModelError: another shape, no tokens, or a number outside the experts; says where.
    """

    chosen: NDArray[np.int64]
    experts: int

    def __post_init__(self) -> None:
        if self.chosen.ndim != 3 or 0 in self.chosen.shape:
            raise ModelError(
                f"a routing trace has shape {list(self.chosen.shape)}; expected [tokens, layers, top_k], none of them 0"
            )
        if not 1 <= self.experts <= MAX_EXPERTS:
            raise ModelError(f"a routing trace is of {self.experts} experts; expected 1 to {MAX_EXPERTS}")
        wrong = np.argwhere((self.chosen < 0) | (self.chosen >= self.experts))
        if len(wrong):
            token, layer, place = (int(i) for i in wrong[0])
            raise ModelError(
                f"a routing trace sends token {token} in layer {layer} to expert "
                f"{int(self.chosen[token, layer, place])} of {self.experts}",
                hint="experts are counted from 0; 'experts' in the file says how many there are",
            )

    @property
    def layers(self) -> int:
        """How many layers have experts."""
        return int(self.chosen.shape[1])

    @cached_property
    def load(self) -> NDArray[np.int64]:
        """Tokens that each expert gets, [layers, experts]."""
        rows = [np.bincount(self.chosen[:, layer].ravel(), minlength=self.experts) for layer in range(self.layers)]
        return np.stack(rows).astype(np.int64)

    @cached_property
    def flow(self) -> NDArray[np.int64]:
        """Tokens that go from an expert of one layer to one of the next, [layers - 1, experts, experts].

        A token with ``top_k`` experts in each of the two counts for every pair of them.
        """
        result = np.zeros((self.layers - 1, self.experts, self.experts), np.int64)
        for layer in range(self.layers - 1):
            pairs = self.chosen[:, layer, :, None] * self.experts + self.chosen[:, layer + 1, None, :]
            counts = np.bincount(pairs.ravel(), minlength=self.experts**2)
            result[layer] = counts.reshape(self.experts, self.experts)
        return result


def read_trace(path: Path) -> RoutingTrace:
    """Read ``path``: .npz or .json with ``experts`` (a number) and ``chosen`` ([tokens, layers, top_k] numbers).

    Without ``experts`` there are as many as the largest number asks for.

    Raises:
        ModelError: the file cannot be read, or is no routing trace.
        OptionError: a name that ends in neither.
    """
    if path.suffix not in (".npz", ".json"):
        raise OptionError(f"a routing trace is read from {path.name!r}; expected a name that ends in .npz or .json")
    try:
        fields = _npz(path) if path.suffix == ".npz" else json.loads(path.read_text())
    except OSError as error:
        raise ModelError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    except (ValueError, EOFError, RecursionError, zipfile.BadZipFile) as error:
        raise ModelError(f"{str(path)!r} is no routing trace: {error}") from error
    if not isinstance(fields, dict) or "chosen" not in fields:
        raise ModelError(f"{str(path)!r} is no routing trace: it has no 'chosen', numbers by token, layer and choice")
    chosen = _whole_numbers(fields["chosen"], str(path))
    experts = fields.get("experts", int(chosen.max()) + 1 if chosen.size else 0)
    numbers = _whole_numbers(experts, str(path), "experts")
    if numbers.ndim:
        raise ModelError(f"'experts' in {str(path)!r} has shape {list(numbers.shape)}; expected one number")
    return RoutingTrace(chosen, int(numbers))


def _npz(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _whole_numbers(value: Any, path: str, name: str = "chosen") -> NDArray[np.int64]:
    try:
        array = np.asarray(value)
    except ValueError as error:  # lists of different lengths
        raise ModelError(f"'{name}' in {path!r} has rows of different lengths: {error}") from error
    if array.dtype.kind not in "iu" or (array.dtype.kind == "u" and array.size and int(array.max()) >= 1 << 63):
        raise ModelError(f"'{name}' in {path!r} is of type {array.dtype}; expected whole numbers")
    return array.astype(np.int64)


def zipf_trace(
    tokens: int, layers: int, experts: int, top_k: int, *, skew: float = 1.0, follow: float = 0.5, seed: int = 0
) -> RoutingTrace:
    """A synthetic trace: popularity by Zipf's law in an order of its own for each layer, and layers that hang together.

    Expert number ``r`` of a layer's order is chosen in proportion to ``(r + 1) ** -skew``. With the probability
    ``follow``, a choice is instead the partner, in a random pairing of the layers' experts, of what the token chose
    before. Real traces are unlike this in many ways; it is for trials and tests.

    Raises:
        OptionError: ``top_k`` above the number of experts, or something else that makes no trace.
    """
    if min(tokens, layers, experts, top_k) < 1 or top_k > experts or not 0 <= follow <= 1 or skew < 0:
        raise OptionError(f"no trace has {tokens} tokens, {layers} layers and {top_k} of {experts} experts")
    random = np.random.default_rng(seed)
    popular = np.arange(1, experts + 1) ** -float(skew)
    chosen = np.empty((tokens, layers, top_k), np.int64)
    for layer in range(layers):
        order = random.permutation(experts)
        # The k largest of log weight plus Gumbel noise are k draws without replacement in proportion to the weights.
        score = np.empty((tokens, experts))
        score[:, order] = np.log(popular / popular.sum()) + random.gumbel(size=(tokens, experts))
        if layer:
            partners = random.permutation(experts)[chosen[:, layer - 1]]
            kept = np.where(random.random((tokens, top_k)) < follow, np.inf, -np.inf)
            followed = np.maximum(np.take_along_axis(score, partners, 1), kept)
            np.put_along_axis(score, partners, followed, 1)
        chosen[:, layer] = np.argpartition(-score, top_k - 1, axis=1)[:, :top_k]
    return RoutingTrace(chosen, experts)
