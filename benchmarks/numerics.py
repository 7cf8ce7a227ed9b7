"""How results are judged equal: one training or inference run as named tensors, and the comparison of two such runs.

The judgement is that of PyTorch's own benchmarks (``torch._dynamo.utils.same``): first ``allclose`` within the dtype's
tolerance, else the root-mean-square error against a float64 run may be at most a small multiple of eager's own. Two
things differ. Theirs compares gradients of any size with one absolute tolerance, which a gradient below it always
passes; here the absolute tolerance is relative to the tensor's own root mean square. And their third way, a cosine
similarity of 0.99, accepts a wrong scale and one wrong value among many: it is reported, never accepted.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opweave.errors import OptionError

__all__ = ["Comparison", "Result", "compare", "result", "result64", "seeded", "tolerance"]

#: Named tensors of one run: ``output.<i>``, and after a training step ``loss``, ``gradient.<parameter>`` and
#: ``buffer.<name>``.
Result = Mapping[str, Tensor]

#: float32: what ``torch._dynamo.utils.same`` takes when not told (PyTorch's benchmarks tell it 1e-3 for inference, 1e-2
#: for training). 16 bits: about one rounding unit; beyond it the float64 run decides.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 1e-2}

#: A tensor that is zero but for rounding (the bias before a normalisation has no gradient) is noise of the others'
#: size: nothing is compared finer than this share of the largest root mean square in its group.
FLOOR = 1e-2

#: A gradient jumps where an activation lies within rounding of a kink (ReLU clips, pooling picks the greatest): eager's
#: own, on inputs changed by 1e-7, were seen to differ by up to 5e-3 in root mean square (MobileNetV2). PyTorch's
#: benchmarks allow 4e-2 for training MobileNetV3 and Inception v3.
KINK = 2e-2


@dataclass(frozen=True)
class Comparison:
    """The judgement of one run against another.

    ``worst`` is the tensor that differs or, if equal, the farthest; empty if none is off at all.
    ``error`` is the largest root-mean-square error over all tensors, relative to the tensor's expected root mean
    square (not below the floor of its group); ``cosine`` the least cosine similarity of those above that floor.
    """

    equal: bool
    worst: str
    error: float
    cosine: float
    reason: str = ""


def tolerance(dtype: torch.dtype) -> float:
    """The relative tolerance for results computed in ``dtype``; 0 for integers and booleans, which must be equal.

    Raises ``OptionError`` for floating dtypes of less than 16 bits, which no model here computes in.
    """
    if not dtype.is_floating_point:
        return 0.0
    if dtype not in TOLERANCES:
        known = ", ".join(str(each) for each in TOLERANCES)
        raise OptionError(f"no tolerance for {dtype}", hint=f"compare in one of {known}")
    return TOLERANCES[dtype]


def result(
    model: nn.Module,
    inputs: Sequence[Tensor],
    loss: Callable[[tuple[Tensor, ...]], Tensor] | None = None,
    *,
    call: Callable[..., Tensor | tuple[Tensor, ...]] | None = None,
    seed: int = 0,
) -> Result:
    """Run ``model`` once on ``inputs``: without ``loss`` under ``no_grad``, with it as a training step.

    ``call`` is what is called in the model's place, as ``torch.compile(model)``, which shares its parameters.
    Gradients are cleared before, and torch's generators seeded with ``seed`` in a fork; buffers (running statistics)
    move on in training, so runs to be compared start from copies of one model. A parameter without gradient has no
    entry.
    """
    call = model if call is None else call
    with seeded(seed, {tensor.device for tensor in inputs}):
        if loss is None:
            with torch.no_grad():
                return _named(call(*inputs))
        model.zero_grad(set_to_none=True)
        outputs = call(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        scalar = loss(outputs)
        torch.autograd.backward(scalar)
    gradients = {f"gradient.{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    buffers = {f"buffer.{n}": b.detach().clone() for n, b in model.named_buffers()}
    return {**_named(outputs), "loss": scalar.detach().clone(), **gradients, **buffers}


@contextmanager
def seeded(seed: int, devices: Collection[torch.device]) -> Iterator[None]:
    """Random numbers on the CPU and on ``devices`` follow ``seed`` inside, and go on after as if nothing had been."""
    graphical = [device for device in devices if device.type == "cuda"]
    with torch.random.fork_rng(devices=graphical):
        # Not torch.manual_seed: it would seed the other devices too, whose states nobody puts back.
        torch.default_generator.manual_seed(seed)
        for device in graphical:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def result64(
    model: nn.Module, inputs: Sequence[Tensor], loss: Callable[[tuple[Tensor, ...]], Tensor] | None = None
) -> Result:
    """``result`` of a float64 copy of ``model`` on float64 copies of the floating inputs: the third run to judge by.

    A model that computes in float32 by itself somewhere (normalisations often do) is exact only up to that.
    """
    return result(copy.deepcopy(model).double(), [t.double() if t.is_floating_point() else t for t in inputs], loss)


def compare(actual: Result, expected: Result, reference64: Result | None = None, *, kinks: bool = False) -> Comparison:
    """Judge ``actual`` against ``expected``, two runs in the same dtypes; ``reference64`` settles what is in doubt.

    Names, shapes and dtypes must be the same and every value finite. Integers must be equal. Floats must be within
    ``tolerance`` of the expected value, relative to it or to the tensor's root mean square. Where they are not,
    and there is a ``reference64``, the error against it may be at most twice eager's own (three times in 16 bits and
    for fewer than 1,000 elements, where noise decides) plus a tenth of the tolerance.
    ``kinks`` says that the model's gradients jump: theirs may be off by 2e-2 in root mean square.
    """
    if actual.keys() != expected.keys():
        names = ", ".join(sorted(actual.keys() ^ expected.keys()))
        return Comparison(False, names, math.inf, math.nan, f"only one of the runs has {names}")
    floors = _floors(expected)
    worst, error, cosine = "", 0.0, 1.0
    for name, want in expected.items():
        got = actual[name]
        reason = _incomparable(got, want)
        if reason:
            return Comparison(False, name, math.inf, math.nan, f"{name}: {reason}")
        scale = max(_rms(want), floors[_group(name)])
        relative = _rms(got.double() - want.double()) / scale if scale else 0.0
        similar = _cosine(got, want, scale) if scale and _rms(want) == scale else 1.0
        cosine = min(cosine, similar)
        if relative > error:
            worst, error = name, relative
        reference = None if reference64 is None else reference64.get(name)
        reason = _different(got, want, reference, scale)
        if reason and not (kinks and _group(name) == "gradient" and relative <= KINK):
            return Comparison(False, name, relative, similar, f"{name}: {reason}")
    return Comparison(True, worst, error, cosine)


def _named(outputs: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # Copies: a backend that replays a CUDA graph writes its next outputs and gradients where these lie.
    return {f"output.{number}": output.detach().clone() for number, output in enumerate(outputs)}


def _group(name: str) -> str:
    return name.partition(".")[0]


def _floors(expected: Result) -> dict[str, float]:
    floors: dict[str, float] = {}
    for name, tensor in expected.items():
        floors[_group(name)] = max(floors.get(_group(name), 0.0), FLOOR * _rms(tensor))
    return floors


def _rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt()) if tensor.numel() else 0.0


def _cosine(got: Tensor, want: Tensor, scale: float) -> float:
    # Scaled first, because torch adds a constant to the norms that it divides by.
    ours, theirs = (tensor.double().flatten() / scale for tensor in (got, want))
    return float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0))


def _incomparable(got: Tensor, want: Tensor) -> str:
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{got.dtype} {tuple(got.shape)} where {want.dtype} {tuple(want.shape)} was expected"
    for which, tensor in (("expected", want), ("actual", got)):
        if not bool(torch.isfinite(tensor).all()):
            return f"the {which} values are not all finite"
    return ""


def _different(got: Tensor, want: Tensor, reference: Tensor | None, scale: float) -> str:
    relative = tolerance(want.dtype)
    if not want.is_floating_point():
        return "" if torch.equal(got, want) else "integers differ"
    if torch.allclose(got.double(), want.double(), rtol=relative, atol=relative * scale):
        return ""
    if reference is None:
        farthest = float((got.double() - want.double()).abs().max())
        return f"off by up to {farthest:.3g} where the root mean square is {scale:.3g} (tolerance {relative:g})"
    ours, theirs = (_rms(tensor.double() - reference) for tensor in (got, want))
    multiple = 3.0 if want.dtype in (torch.float16, torch.bfloat16) or want.numel() < 1000 else 2.0
    if ours <= multiple * theirs + relative * scale / 10:
        return ""
    return f"error against float64 is {ours:.3g}, more than {multiple:g} times eager's own {theirs:.3g}"
