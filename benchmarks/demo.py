"""The main job, end to end, on two real networks: import, plan, verify, execute, compare, draw.

Run as ``python -m benchmarks.demo [--out DIR] [--time-limit SECONDS]``; exits non-zero when anything does not hold.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import onnx

from opweave.api import compile as compile_model
from opweave.api import load_plan
from opweave.compiler.compiled import CompiledModel
from opweave.compiler.frontend.onnx import randomize_weights
from opweave.compiler.report.progress import watched
from opweave.compiler.runtime.reference import compare, run_onnxruntime

from .networks import darts_cifar

LIGHT_MODELS = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
SEED = 0


def main() -> int:
    """Run both networks; 0 when every plan verifies and every output equals onnxruntime's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--time-limit", type=float, default=30.0, help="seconds of planning for each network")
    arguments = parser.parse_args()

    # Whole-tensor weights are what makes ResNet-50 tight: beside its largest one, the residual no longer fits.
    resnet50 = onnx.load(LIGHT_MODELS / "light_resnet50.onnx")
    equal = [
        demonstrate("light_resnet50", resnet50, arguments, weights="resident", scratchpad="9.5MiB"),
        demonstrate("darts_cifar", darts_cifar(), arguments, weights="streamed", scratchpad="544KiB"),
    ]
    return 0 if all(equal) else 1


def demonstrate(name: str, model: onnx.ModelProto, arguments: argparse.Namespace, **options: str) -> bool:
    """Compile, execute and draw one network; whether its outputs equal the reference runtime's."""
    folder = arguments.out / name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.onnx"
    onnx.save(model, path)
    print(f"=== {name}: scratchpad {options['scratchpad']}, weights {options['weights']}", flush=True)
    with watched() as (listen, stop):
        limit = arguments.time_limit
        compiled = compile_model(path, on_progress=listen, stop=stop, time_limit=limit, fill_seed=SEED, **options)
    print(compiled.summary())
    compiled.report(folder)
    equal = execute(load_plan(folder / "plan.json", path), path)
    print(f"report: {folder / 'index.html'}\n", flush=True)
    return equal


def execute(model: CompiledModel, path: Path) -> bool:
    """Execute the plan that was saved, in a scratchpad of exactly its size, and compare with onnxruntime."""
    inputs = model.random_inputs(SEED)
    begin = time.perf_counter()
    result = model.execute(inputs)
    capacity = model.plan.machine.scratchpad_memory.capacity_bytes
    print(f"executed in {time.perf_counter() - begin:.2f} s in a scratchpad of {capacity:,} bytes, exactly")
    reference = randomize_weights(onnx.load(path), SEED)
    comparisons = compare(model.plan.graph.outputs, result.outputs, run_onnxruntime(reference, inputs))
    for c in comparisons:
        verdict = "equals" if c.equal else "DIFFERS from"
        print(f"output {c.name} {verdict} onnxruntime: largest error {c.max_error:.2g}, allowed {c.allowed:.2g}")
    return all(c.equal for c in comparisons)


if __name__ == "__main__":
    sys.exit(main())
