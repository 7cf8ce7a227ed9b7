"""The zoo: every model builds, runs and differentiates alike twice, and the judge of results can say no."""

from __future__ import annotations

import importlib.util
import math
import re

import pytest
import torch
from benchmarks.numerics import compare, result, result64, tolerance
from benchmarks.zoo import MODELS, ZooModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from opweave.errors import OptionError

HERE = [
    pytest.param(entry, id=name, marks=pytest.mark.skipif(missing, reason=f"{entry.requires} is not installed"))
    for name, entry in MODELS.items()
    for missing in [bool(entry.requires) and importlib.util.find_spec(entry.requires) is None]
]
ISSUE = "gpt2 llama mixtral bert t5 vit swin resnet50 convnext mobilenet_v2 whisper unet uneven_experts inception"


def test_the_zoo_has_what_the_backend_must_work_on() -> None:
    assert {*ISSUE.split(), "mixtral_grouped", "transformer_12", "randomly_wired_0"} <= MODELS.keys()
    assert all(
        name == entry.name and set(entry.arguments) == {"tiny", "small", "full"} for name, entry in MODELS.items()
    )


@pytest.mark.parametrize("entry", HERE)
def test_tiny_models_train_alike_twice(entry: ZooModel) -> None:
    """Two builds from one seed are the same model, give the same gradients, and leave torch's generator alone."""
    before = torch.get_rng_state()
    first, second = (entry.build(train=True) for _ in range(2))
    inputs = entry.inputs()
    assert torch.equal(before, torch.get_rng_state())
    runs = [result(model, inputs, entry.loss) for model in (first, second)]
    assert all(tensor.isfinite().all() for tensor in runs[0].values())
    assert compare(runs[1], runs[0]).error < 1e-6  # with several threads sums of scattered values differ
    used = [name for name in runs[0] if name.startswith("gradient.")]
    assert len(used) > len(list(first.parameters())) / 3, "most parameters take part"
    assert any(runs[0][name].abs().max() > 1e-3 for name in used), "a step with gradients worth comparing"


@pytest.mark.parametrize("entry", HERE)
def test_other_seeds_are_other_models_and_inputs(entry: ZooModel) -> None:
    reference = result(entry.build(), entry.inputs())
    assert not compare(result(entry.build(seed=1), entry.inputs()), reference).equal
    assert not compare(result(entry.build(), entry.inputs(seed=1)), reference).equal


@pytest.mark.parametrize("entry", HERE)
def test_outputs_are_tensors_in_the_dtype_asked_for(entry: ZooModel) -> None:
    """bfloat16, as on a GPU: weights and outputs in it, finite, and near the float32 model's where nothing jumps."""
    model, inputs = entry.build(dtype=torch.bfloat16), entry.inputs(dtype=torch.bfloat16)
    outputs = model(*inputs)
    assert isinstance(outputs, tuple)
    assert {output.dtype for output in outputs} == {torch.bfloat16}
    low, high = result(model, inputs), result64(model, inputs)
    widened = {name: tensor.double() for name, tensor in low.items()}
    assert compare(widened, high).cosine > 0.95


@pytest.mark.parametrize("entry", HERE)
def test_no_randomness_in_training_unless_asked_for(entry: ZooModel) -> None:
    model, inputs = entry.build(train=True), entry.inputs()
    assert torch.equal(model(*inputs)[0], model(*inputs)[0])


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "mobilenet_v2", "swin"])
def test_dropout_is_the_published_one_when_asked_for(name: str) -> None:
    pytest.importorskip("transformers")
    model, inputs = MODELS[name].build(train=True, dropout=True), MODELS[name].inputs()
    runs = [result(model, inputs, MODELS[name].loss, seed=seed)["output.0"] for seed in range(20)]
    assert not all(torch.equal(run, runs[0]) for run in runs), "in Swin, only paths are dropped, and rarely"


def test_experts_are_computed_alike_by_both_implementations() -> None:
    """Mixtral by gathered and by grouped weights is one model: the same weights, tokens and outputs."""
    pytest.importorskip("transformers")
    batched, grouped = MODELS["mixtral"], MODELS["mixtral_grouped"]
    runs = [result(each.build(train=True), batched.inputs(), batched.loss) for each in (grouped, batched)]
    verdict = compare(*runs)
    assert verdict.equal, verdict.reason


@pytest.mark.slow
@pytest.mark.parametrize("entry", HERE)
def test_small_models_train(entry: ZooModel) -> None:
    step = result(entry.build("small", train=True), entry.inputs("small"), entry.loss)
    assert all(tensor.isfinite().all() for tensor in step.values())


@pytest.mark.parametrize("entry", HERE)
def test_full_models_are_published_ones(entry: ZooModel) -> None:
    """Built without memory: the number of parameters is the published one."""
    millions = sum(parameter.numel() for parameter in entry.build("full", device="meta").parameters()) / 1e6
    assert millions == pytest.approx(PUBLISHED[entry.name], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("entry", HERE)
def test_full_models_train_on_their_inputs(entry: ZooModel) -> None:
    """Without memory, in bfloat16; text is traced, because in eager mode transformers looks at the values of masks."""
    model = entry.build("full", device="meta", dtype=torch.bfloat16, train=True)
    traced = entry.requires == "transformers" and entry.arguments["full"][0].name != "pixel_values"
    outputs = (torch.compile(model, backend="eager") if traced else model)(
        *entry.inputs("full", device="meta", dtype=torch.bfloat16)
    )
    torch.autograd.backward(entry.loss(outputs))
    torch.compiler.reset()
    assert any(parameter.grad is not None for parameter in model.parameters())


#: Parameters in millions: the papers' and model cards' figures (Mixtral's with 4 of 32 layers), and our own networks'.
PUBLISHED = {
    "gpt2": 124.4,
    "llama": 1235.8,
    "mixtral": 6067,
    "mixtral_grouped": 6067,
    "bert": 109.5,
    "t5": 222.9,
    "vit": 86.6,
    "swin": 28.3,
    "resnet50": 25.6,
    "convnext": 28.6,
    "mobilenet_v2": 3.5,
    "whisper": 241.7,
    "unet": 859.5,
    "uneven_experts": 44.1,
    "inception": 0.163,
    "randomly_wired_0": 2.94,
    "randomly_wired_1": 4.1,
    "randomly_wired_3": 2.5,
    "transformer_12": 935.4,
}


def test_an_absent_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(OptionError, match=r"unet needs the package diffusers(.|\n)*pip install diffusers"):
        MODELS["unet"].build()


def test_an_unknown_size_is_named_with_those_there_are() -> None:
    with pytest.raises(OptionError, match=r"inception has no size 'huge'\nhint: sizes are tiny, small, full"):
        MODELS["inception"].build("huge")  # type: ignore[arg-type]


def test_tolerances_are_known_for_what_models_compute_in() -> None:
    assert tolerance(torch.float64) < tolerance(torch.float32) < tolerance(torch.float16) < tolerance(torch.bfloat16)
    assert tolerance(torch.int64) == tolerance(torch.bool) == 0
    with pytest.raises(OptionError, match=r"no tolerance for torch\.float8_e5m2"):
        tolerance(torch.float8_e5m2)


@settings(deadline=None, max_examples=50)
@given(exponent=st.integers(-30, 30), seed=st.integers(0, 100), size=st.integers(2, 50))
def test_judgement_does_not_depend_on_the_unit(exponent: int, seed: int, size: int) -> None:
    """An error of a tenth is found, and one of rounding passed, whatever power of two all values are scaled by."""
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    assert compare({"x": values * (1 + 1e-6)}, {"x": values}).equal
    verdict = compare({"x": values * 1.1}, {"x": values})
    assert not verdict.equal
    assert verdict.cosine == pytest.approx(1), "a wrong scale is what a cosine does not see"
    assert verdict.error == pytest.approx(0.1, rel=1e-3)


def test_one_wrong_value_among_many_is_found() -> None:
    right = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    wrong = right.clone()
    wrong[17] += 0.5
    verdict = compare({"y": wrong}, {"y": right})
    assert (verdict.equal, verdict.worst) == (False, "y")
    assert verdict.cosine > 0.99


def test_a_small_tensor_is_noise_beside_large_ones_of_its_group_only() -> None:
    """The bias before a normalisation has a gradient of rounding: it must not fail, and nothing else may hide in it."""
    noise, large = torch.tensor([1e-8, -2e-8]), torch.ones(100)
    expected = {"gradient.bias": noise, "gradient.weight": large}
    assert compare({"gradient.bias": -noise, "gradient.weight": large}, expected).equal
    assert not compare({"gradient.bias": noise + 1e-4, "gradient.weight": large}, expected).equal
    assert not compare({"output.0": -noise, "loss": large}, {"output.0": noise, "loss": large}).equal


def test_float64_settles_what_eager_itself_gets_wrong() -> None:
    """A result twice as near to the truth as eager's is right, however far it is from eager's; a worse one is not."""
    truth = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    eager = {"y": (truth + 0.02).float()}
    reference = {"y": truth}
    better, worse = ({"y": (truth - off).float()} for off in (0.01, 0.05))
    assert not compare(better, eager).equal
    assert compare(better, eager, reference).equal
    verdict = compare(worse, eager, reference)
    assert not verdict.equal
    assert "eager's own 0.02" in verdict.reason


def test_gradients_of_a_model_with_kinks_may_jump_a_little() -> None:
    right = torch.randn(100, generator=torch.Generator().manual_seed(0))
    names = ("output.0", "gradient.w")
    off = {name: {other: right * (1.01 if other == name else 1) for other in names} for name in names}
    exact = dict.fromkeys(names, right)
    assert compare(off["gradient.w"], exact, kinks=True).equal
    assert not compare(off["gradient.w"], exact).equal
    assert not compare(off["output.0"], exact, kinks=True).equal
    assert not compare({**exact, "gradient.w": right * 1.03}, exact, kinks=True).equal


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet50", "convnext", "vit", "inception", "randomly_wired_0"])
def test_rounding_of_the_inputs_is_no_difference(name: str) -> None:
    """The judge passes eager against eager on inputs changed by 1e-7, as another order of additions changes results."""
    entry = MODELS[name]
    if entry.requires:
        pytest.importorskip(entry.requires)
    inputs = entry.inputs()
    noise = torch.Generator().manual_seed(0)
    shaken = [t * (1 + 1e-7 * torch.randn(t.shape, generator=noise)) if t.is_floating_point() else t for t in inputs]
    actual, expected = (result(entry.build(train=True), each, entry.loss) for each in (shaken, inputs))
    verdict = compare(actual, expected, result64(entry.build(train=True), inputs, entry.loss), kinks=entry.kinks)
    assert verdict.error > 0
    assert verdict.equal, verdict.reason


@pytest.mark.parametrize(
    ("actual", "reason"),
    [
        (torch.zeros(3), r"float32 \(3,\) where torch.float32 \(2,\)"),
        (torch.zeros(2, dtype=torch.float64), "float64"),
        (torch.tensor([0.0, math.nan]), "the actual values are not all finite"),
        (torch.tensor([0.0, math.inf]), "the actual values are not all finite"),
    ],
)
def test_what_cannot_be_compared_is_unequal(actual: Tensor, reason: str) -> None:
    verdict = compare({"y": actual}, {"y": torch.zeros(2)})
    assert not verdict.equal
    assert verdict.reason.startswith("y: ")
    assert re.search(reason, verdict.reason)


def test_integers_must_be_equal_and_names_the_same() -> None:
    assert not compare({"n": torch.tensor([1])}, {"n": torch.tensor([2])}).equal
    verdict = compare({"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)})
    assert (verdict.equal, verdict.worst) == (False, "b")


def test_runs_start_from_cleared_gradients_and_report_moved_buffers() -> None:
    """A run is the model's state before it, not the runs before: only running statistics carry over, and are shown."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    inputs = [torch.randn(8, 4, generator=torch.Generator().manual_seed(0))]
    first, second = (result(model, inputs, lambda outputs: outputs[0].square().sum()) for _ in range(2))
    assert torch.equal(first["gradient.0.weight"], second["gradient.0.weight"])
    assert int(second["buffer.1.num_batches_tracked"]) == 2
    assert not torch.equal(first["buffer.1.running_var"], second["buffer.1.running_var"])
    assert result(model.eval(), inputs).keys() == {"output.0"}
