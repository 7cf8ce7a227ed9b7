"""Does opweave compute what ONNX says? The node cases of onnx itself, each with its expected outputs.

``python -m benchmarks.conformance [--filter RE] [--json FILE] [--list] [--limit N] [--without-onnxruntime]`` runs every
case of ``onnx.backend.test.case.node.collect_testcases`` through opweave (imported, planned for the least scratchpad
that works, verified, executed in it) and through onnxruntime. Dtypes and shapes are
compared strictly, values to the case's tolerance (16-bit results to two units in the last place). A case passes
natively if every node went through opweave's own lowerings, by fallback if onnx's reference implementation computed at
least one. A wrong answer is ``failed``, never ``unsupported``. The exit status is 1 if opweave failed a case, 2 if
nothing could be measured.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import opweave
from opweave.errors import InternalError, OpweaveError, VerificationError

#: Two units in the last place, for 16-bit results: what onnx's own runner allows bfloat16.
TWO_ULPS = {"bfloat16": 2.0**-6, "float16": 2.0**-9}
#: Not a failure: the answer is right to the precision of its type, not to the case's tolerance.
LAST_PLACES = "agrees to two units in the last place, not to the case's tolerance"
NATIVE, FALLBACK, FAILED, UNSUPPORTED = "native", "fallback", "failed", "unsupported"


@dataclass(frozen=True)
class Verdict:
    """How one case went with one provider; ``reason`` says why it failed or is unsupported."""

    case: str
    operator: str
    provider: str
    verdict: str
    reason: str = ""
    fallbacks: tuple[str, ...] = ()


class Unsupported(Exception):
    """The provider declines the case."""


def execute(model: onnx.ModelProto, inputs: Sequence[Any]) -> tuple[Sequence[Any], Sequence[str]]:
    """Plan ``model`` for the least scratchpad, verify the plan, and execute it there byte for byte.

    Returns the outputs, and the operators that went through the reference implementation.
    """
    prepared = opweave.onnx_backend.prepare(model)
    outputs = prepared.run(inputs)
    assert prepared.imported is not None
    return outputs, sorted(prepared.imported.fallbacks)


def with_opweave(model: onnx.ModelProto, inputs: Sequence[Any]) -> tuple[Sequence[Any], Sequence[str]]:
    """As ``execute``, with opweave's refusals turned into ``Unsupported``; contradictions of its own are failures."""
    try:
        return execute(model, inputs)
    except (InternalError, VerificationError):
        raise
    except OpweaveError as error:
        raise Unsupported(f"{error.code}: {error.message}") from error


def with_onnxruntime(model: onnx.ModelProto, inputs: Sequence[Any]) -> tuple[Sequence[Any], Sequence[str]]:
    """Run ``model`` with onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        names = [entry.name for entry in session.get_inputs()]
        return session.run(None, dict(zip(names, inputs, strict=True))), ()
    except Exception as error:  # onnxruntime raises many types; all mean that it does not run the case
        raise Unsupported(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error


def plain(value: Any) -> Any:
    """A case's input or output as numpy; some cases give a TensorProto."""
    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def difference(found: Any, expected: Any, rtol: float, atol: float) -> str:
    """Why ``found`` is not ``expected``; empty if it is. Sequences are compared element by element."""
    if isinstance(expected, list | tuple) or isinstance(found, list | tuple):
        if not (isinstance(expected, list | tuple) and isinstance(found, list | tuple)) or len(found) != len(expected):
            return "a sequence of another length"
        return next(filter(None, (difference(f, e, rtol, atol) for f, e in zip(found, expected, strict=True))), "")
    if expected is None or found is None:
        return "" if found is expected else "an optional that should be the other way"
    left, right = np.asarray(found), np.asarray(expected)
    if left.shape != right.shape:
        return f"shape {list(left.shape)}, expected {list(right.shape)}"
    if left.dtype != right.dtype:
        return f"dtype {left.dtype}, expected {right.dtype}"
    if left.dtype.kind in "OUS":
        return "" if bool(np.all(left == right)) else "other strings"
    if left.dtype.kind not in "fiubc":  # bfloat16 and narrower
        left, right = left.astype(np.float32), right.astype(np.float32)
    if np.allclose(left, right, rtol=rtol, atol=atol, equal_nan=True):
        return ""
    ulps = TWO_ULPS.get(np.asarray(found).dtype.name, 0.0)
    if np.allclose(left, right, rtol=max(rtol, ulps), atol=atol, equal_nan=True):
        return LAST_PLACES
    with np.errstate(all="ignore"):
        worst = np.abs(left.astype(np.complex128) - right.astype(np.complex128)).max()
    return f"values differ by up to {worst:.3g} (rtol {rtol:g}, atol {atol:g})"


Runner = Callable[[onnx.ModelProto, Sequence[Any]], tuple[Sequence[Any], Sequence[str]]]


def judge(case: Any, provider: str, runner: Runner) -> Verdict:
    """Run one case and compare all its data sets."""
    operator = operator_of(case)
    fallbacks: set[str] = set()
    note = ""
    try:
        for raw_inputs, raw_expected in case.data_sets:
            inputs, expected = [plain(value) for value in raw_inputs], [plain(value) for value in raw_expected]
            outputs, used = runner(case.model, inputs)
            fallbacks.update(used)
            if len(outputs) != len(expected):
                reason = f"{len(outputs)} outputs, expected {len(expected)}"
                return Verdict(case.name, operator, provider, FAILED, reason)
            for info, found, wanted in zip(case.model.graph.output, outputs, expected, strict=True):
                reason = difference(found, wanted, case.rtol, case.atol)
                if reason == LAST_PLACES:
                    note = reason
                elif reason:
                    return Verdict(case.name, operator, provider, FAILED, f"{info.name}: {reason}", tuple(fallbacks))
    except Unsupported as refusal:
        return Verdict(case.name, operator, provider, UNSUPPORTED, str(refusal))
    except Exception as error:  # a crash is worse than a refusal and must not end the run
        return Verdict(case.name, operator, provider, FAILED, f"{type(error).__name__}: {error}"[:300])
    return Verdict(case.name, operator, provider, FALLBACK if fallbacks else NATIVE, note, tuple(sorted(fallbacks)))


def operator_of(case: Any) -> str:
    """The operator that the case is about: its only node, or what its name says for expanded functions."""
    nodes = case.model.graph.node
    if len(nodes) == 1:
        return f"{nodes[0].domain}::{nodes[0].op_type}" if nodes[0].domain else str(nodes[0].op_type)
    return "(expanded functions)" if "_expanded" in case.name else "(several nodes)"


def table(verdicts: Sequence[Verdict], provider: str) -> list[str]:
    """One line an operator type: how many cases went which way, beside the other provider's passes."""
    ours = [v for v in verdicts if v.provider == provider]
    others = [v for v in verdicts if v.provider != provider]
    peers = sorted({v.provider for v in others})
    head = f"{'operator':38}{'native':>8}{'fallback':>10}{'failed':>8}{'unsupported':>13}"
    lines = [head + "".join(f"{peer:>14}" for peer in peers)]
    for operator in sorted({v.operator for v in ours}):
        counts = Counter(v.verdict for v in ours if v.operator == operator)
        line = f"{operator:38}{counts[NATIVE]:>8}{counts[FALLBACK]:>10}{counts[FAILED]:>8}{counts[UNSUPPORTED]:>13}"
        for peer in peers:
            passed = sum(v.verdict == NATIVE for v in others if v.operator == operator and v.provider == peer)
            line += f"{passed:>14}"
        lines.append(line)
    return lines


def reasons(verdicts: Sequence[Verdict]) -> list[str]:
    """Every case with something to say about it: why it did not pass, or how narrowly it did."""
    bad = [v for v in verdicts if v.reason]
    return [f"{v.verdict:12}{v.case}: {v.reason.splitlines()[0][:160] if v.reason else ''}" for v in bad]


def summary(verdicts: Sequence[Verdict]) -> str:
    """The counts of one provider in one line; only opweave has two ways to pass."""
    counts = Counter(v.verdict for v in verdicts)
    native = f" ({counts[NATIVE]} native)" if all(v.provider == "opweave" for v in verdicts) else ""
    return (
        f"{counts[NATIVE] + counts[FALLBACK]} passed{native}, {counts[FAILED]} failed, "
        f"{counts[UNSUPPORTED]} unsupported of {len(verdicts)}"
    )


def write_json(path: Path, verdicts: Sequence[Verdict], seconds: float) -> None:
    """The verdicts in the benchmarks' long form."""
    rows = [
        {"case": v.case, "provider": v.provider, "metric": "verdict", "value": v.verdict, "unit": "", "bound": None,
         "note": v.reason, **{k: w for k, w in asdict(v).items() if k in ("operator", "fallbacks")}}
        for v in verdicts
    ]  # fmt: skip
    document = {"benchmark": "conformance", "versions": {"onnx": onnx.__version__}, "seconds": seconds, "rows": rows}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def collect(pattern: str, limit: int | None) -> list[Any]:
    """The cases whose name matches ``pattern``, in onnx's order."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # onnx computes its expected values with overflowing casts
        cases = collect_testcases(None)
    return [case for case in cases if re.search(pattern, case.name)][:limit]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.conformance", description=__doc__.splitlines()[0])
    parser.add_argument("--filter", default="", help="only cases whose name matches this regular expression")
    parser.add_argument("--limit", type=int, help="at most this many cases")
    parser.add_argument("--json", type=Path, help="write the verdicts to this file")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and end")
    parser.add_argument("--without-onnxruntime", action="store_true", help="run opweave only")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases, print the table; the exit status."""
    options = parse(arguments)
    cases = collect(options.filter, options.limit)
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    if not cases:
        print(f"no case matches {options.filter!r}", file=sys.stderr)
        return 2
    runners: dict[str, Runner] = {"opweave": with_opweave}
    if not options.without_onnxruntime:
        runners["onnxruntime"] = with_onnxruntime
    started = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        verdicts = [judge(case, provider, runner) for case in cases for provider, runner in runners.items()]
    seconds = time.monotonic() - started
    ours = [v for v in verdicts if v.provider == "opweave"]
    print("\n".join([*table(verdicts, "opweave"), "", *reasons(ours), ""]))
    if options.json:
        write_json(options.json, verdicts, seconds)
    for provider in list(runners)[1:]:
        theirs = [v for v in verdicts if v.provider == provider]
        print(f"{provider}: {summary(theirs)}")
    print(f"{seconds:.0f} s")
    print(f"conformance: {summary(ours)}")
    return 1 if any(v.verdict == FAILED for v in ours) else 0


if __name__ == "__main__":
    sys.exit(main())
