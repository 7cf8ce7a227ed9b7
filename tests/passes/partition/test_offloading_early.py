"""Values of one size change places until the earliest are the ones that leave."""

from __future__ import annotations

from opweave.compiler.partition import Partition, PartitionProblem, SavedValue, Step
from opweave.passes.partition._early import offloading_early


def layers(sizes: list[int]) -> PartitionProblem:
    """Each step makes a value that the backward half needs in the opposite order."""
    steps = [Step(f"f{i}", (i - 1,) if i else (), ps=100, again_ps=100) for i in range(len(sizes))]
    backward = [Step(f"b{i}", (i,), ps=200) for i in reversed(range(len(sizes)))]
    values = [SavedValue(f"v{i}", i, nbytes, store_ps=nbytes, load_ps=nbytes) for i, nbytes in enumerate(sizes)]
    return PartitionProblem(tuple(steps), tuple(backward), tuple(values))


def test_the_first_of_a_size_leaves() -> None:
    problem = layers([10, 20, 10, 20, 10])
    answer = Partition(problem, 50, frozenset({0, 1, 2}), frozenset({3, 4}), bound_ps=0)
    found = offloading_early(answer)
    assert found.offloaded == {0, 1}
    assert found.kept == {2, 3, 4}
    assert found.recount.kept_bytes == answer.recount.kept_bytes
    assert found.recount.total_ps <= answer.recount.total_ps


def test_nothing_changes_where_sizes_differ() -> None:
    problem = layers([10, 20, 30])
    answer = Partition(problem, 40, frozenset({0, 1}), frozenset({2}), bound_ps=0)
    assert offloading_early(answer) == answer
