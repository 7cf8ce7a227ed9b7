"""The output layer on the last stage, made up for, and in shards: against measured times and the paper's words."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opweave.compiler.pipeline import Budget
from opweave.compiler.pipelining.problem import Stage
from opweave.compiler.pipelining.simulate import timed
from opweave.errors import OptionError
from opweave.passes.pipeline_parallel.named import named
from opweave.passes.pipeline_parallel.vocabulary import (
    LanguageModel,
    OutputLayer,
    choose_output,
    output_problems,
    shards_of,
)

# Stage times in microseconds and iteration times in ms that the authors of Vocabulary Parallelism measured on 8 A100:
# 32 layers, 128 microbatches of 2k tokens, a vocabulary of 256k (artifact/exp_one_host.csv of their repository).
FORWARD = (10572, 10591, 10475, 10725, 10360, 10444, 10381, 36818)
BACKWARD = (25185, 21108, 20737, 21143, 20805, 21030, 20827, 52363)
MEASURED_MS = {"last stage": 11722.2, "fewer layers": 7599.2}


def measured_model() -> LanguageModel:
    """Layers from the stages in the middle; what the first and the last take more is embedding and output layer."""
    forward, backward = sum(FORWARD[1:7]) // 6, sum(BACKWARD[1:7]) // 6
    output, embedding = BACKWARD[7] - backward, BACKWARD[0] - backward
    return LanguageModel(
        Stage(0, forward // 4, backward // 8, backward // 8, until_weight_gradient_bytes=1),
        32,
        OutputLayer(FORWARD[7] - forward, output // 2, output // 2),
        Stage(0, FORWARD[0] - forward, 0, embedding),
    )


@pytest.mark.parametrize("name", ["last stage", "fewer layers"])
def test_measured_iterations_are_predicted_from_measured_stages(name: str) -> None:
    """1F1B within 1.6 %. Layer, embedding and head are fitted to the first's stages; the second is predicted."""
    problem = output_problems(measured_model(), 8, 128)[name]
    predicted = timed(named("1f1b", problem)).makespan_ns / 1000
    assert predicted == pytest.approx(MEASURED_MS[name], rel=0.016)


def test_layers_are_taken_from_the_last_stage_as_the_authors_took_them() -> None:
    """Their last stage has the output layer alone, and the others 4 or 5 layers; found again from the times."""
    problem = output_problems(measured_model(), 8, 1)["fewer layers"]
    layers = [round(stage.forward_ns / (FORWARD[2] / 4)) for stage in problem.stages[:7]]
    assert Counter(layers) == {4: 3, 5: 4}
    assert layers[0] == 4  # which has the embedding
    assert problem.stages[7].forward_ns == pytest.approx(26_019, rel=0.02)  # as they measured it


def test_shards_are_better_than_fewer_layers_and_those_than_none() -> None:
    """In the order of the paper's figure, and with what each takes named in the attempts."""
    solution = choose_output(measured_model(), 8, 12, Budget.of_seconds(1))
    values = {attempt.method: attempt.value or 0 for attempt in solution.attempts}
    assert solution.value == min(values.values())
    assert max(values["vocab-1"], values["vocab-2"]) < values["fewer layers"] < values["last stage"]
    assert solution.timed.schedule.problem.vocabulary is not None
    assert solution.gap < 0.02


@settings(deadline=None)
@given(
    st.integers(0, 50),
    st.integers(0, 50),
    st.integers(0, 50),
    st.integers(0, 9),
    st.integers(1, 9),
    st.sampled_from([1, 2]),
)
def test_shards_do_all_that_the_layer_does(
    forward: int, gradient: int, weights: int, logits: int, ranks: int, barriers: int
) -> None:
    """Rounded up, so together not less, and not more by a unit and more on each rank and pass."""
    shards = shards_of(OutputLayer(forward, gradient, weights, logits), ranks, barriers=barriers)
    total = sum(shards.output_ns) + sum(shards.gradient_ns)
    assert forward + gradient + weights <= total < forward + gradient + weights + 2 * ranks
    before = forward + gradient if barriers == 1 else forward
    assert before <= sum(shards.output_ns) < before + ranks
    assert logits <= shards.shard_bytes * ranks < logits + ranks


def test_shards_that_are_slower_than_their_part_take_longer() -> None:
    """At half the speed twice as long."""
    assert shards_of(OutputLayer(8, 4, 4, shard_efficiency=0.5), 4).output_ns == (6, 6, 6, 6)
    for efficiency in (0.0, 1.5):
        with pytest.raises(OptionError, match="efficiency"):
            shards_of(OutputLayer(8, 4, 4, shard_efficiency=efficiency), 4)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 40), st.integers(0, 40))
def test_all_arrangements_hold_the_whole_model(ranks: int, layers: int, head: int, first: int) -> None:
    """No layer is lost or doubled, and what is resident is there once, shards rounded up."""
    layer = Stage(0, 1, 2, 3, until_weight_gradient_bytes=5, resident_bytes=7)
    output = OutputLayer(head, head, head, 2, resident_bytes=11)
    model = LanguageModel(layer, layers, output, Stage(0, 0, 0, first, resident_bytes=13))
    for name, problem in output_problems(model, ranks, 2).items():
        shards = "vocab" in name
        whole = layers * layer.work_ns + first + 3 * head
        assert whole <= sum(problem.work_ns) / 2 <= whole + (3 * ranks if shards else 0), name
        resident = 7 * layers + 13 + 11
        assert resident <= sum(problem.resident_bytes) <= resident + (2 * ranks if shards else 0), name
        held = sum(stage.until_weight_gradient_bytes for stage in problem.stages)
        assert held == 5 * layers + (0 if shards else 2), name


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 30), st.integers(0, 30))
def test_fewer_layers_make_the_longest_stage_as_short_as_can_be(ranks: int, layers: int, head: int, first: int) -> None:
    """Compared with every way to divide the layers over the ranks."""
    model = LanguageModel(Stage(0, 1, 1, 1), layers, OutputLayer(head, 0, 0), Stage(0, first, 0, 0))
    found = output_problems(model, ranks, 1)["fewer layers"]
    best = min(_longest(counts, head, first) for counts in _divided(layers, ranks))
    assert max(found.work_ns) == best


def _longest(counts: tuple[int, ...], head: int, first: int) -> int:
    work = [3 * count for count in counts]
    work[0] += first
    work[-1] += head
    return max(work)


def _divided(layers: int, ranks: int) -> list[tuple[int, ...]]:
    if ranks == 1:
        return [(layers,)]
    return [(own, *rest) for own in range(layers + 1) for rest in _divided(layers - own, ranks - 1)]


@pytest.mark.parametrize(("name", "more"), [("vocab-1", 2), ("vocab-2", 1)])
def test_1f1b_with_shards_holds_one_microbatch_more_for_each_barrier(name: str, more: int) -> None:
    """The paper's activation memory: p + 2 microbatches with two barriers, p + 1 with one, where 1F1B has p."""
    model = LanguageModel(Stage(0, 1, 1, 1, until_weight_gradient_bytes=1), 4, OutputLayer(4, 4, 4))
    line = timed(named("1f1b-vocabulary", output_problems(model, 4, 16)[name]))
    assert max(line.peak_bytes) == 4 + more


def test_a_model_without_layers_is_refused() -> None:
    """As one without ranks is."""
    with pytest.raises(OptionError, match="0 layers on 2 ranks"):
        output_problems(LanguageModel(Stage(0, 1, 1, 1), 0, OutputLayer(1, 1, 1)), 2, 1)
    with pytest.raises(OptionError, match="3 layers on 0 ranks"):
        output_problems(LanguageModel(Stage(0, 1, 1, 1), 3, OutputLayer(1, 1, 1)), 0, 1)
