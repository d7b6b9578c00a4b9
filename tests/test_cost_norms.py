"""Norms of rows that devices share."""

from typing import Any

import jax.numpy as jnp
import pytest
from test_cost_step import MACHINE, cost_of
from test_graph_rules import program_of

from autoshard.cost.single_rows import matrix_seconds
from autoshard.graph.program import WHOLE

ONCE = matrix_seconds(4096 * 4096 / 8, MACHINE)


def norm(x: Any) -> Any:
    return x * jnp.sum(x * x, axis=-1, keepdims=True)


@pytest.mark.parametrize(("dim", "times"), [(1, 2), (0, 1)])
def test_rows_that_devices_share_are_read_again_once_their_sums_are_there(
    dim: int, times: int
) -> None:
    cost = cost_of(program_of(norm, (4096, 4096), dtype="bfloat16"), dim)
    assert [t.kind for t in cost.traffic] == ["all-reduce"] * (times - 1)
    assert cost.compute_seconds == pytest.approx(times * ONCE)


def test_of_a_mean_and_a_variance_the_last_alone_is_waited_for() -> None:
    def standardised(x: Any) -> Any:
        made = jnp.tanh(x)
        mean = jnp.sum(made, axis=-1, keepdims=True)
        return (made - mean) * jnp.sum((made - mean) ** 2, axis=-1, keepdims=True)

    cost = cost_of(program_of(standardised, (4096, 4096)), 1)
    assert cost.compute_seconds == pytest.approx(3 * ONCE)


# The columns of the weight are split, as the stream is, or what it contracts: then its sums are
# scattered before they are added to the stream.
@pytest.mark.parametrize(("dims", "is_added_up"), [((WHOLE, 1), True), ((1, 0), False)])
def test_a_matmul_adds_up_what_it_makes(dims: tuple[int, int], is_added_up: bool) -> None:
    def block(stream: Any, x: Any, weight: Any) -> Any:
        return norm(stream + x @ weight)

    def without(stream: Any, x: Any, weight: Any) -> Any:
        return jnp.tanh(stream + x @ weight)

    # So many rows that the vector memory holds none of the results.
    shapes = (16 * 4096, 4096), (16 * 4096, 512), (512, 4096)
    costs = [
        cost_of(program_of(function, *shapes, dtype="bfloat16"), 1, *dims)
        for function in (block, without)
    ]
    kinds = {traffic.kind for traffic in costs[1].traffic}
    assert kinds == (set() if is_added_up else {"reduce-scatter"})
    more = costs[0].compute_seconds - costs[1].compute_seconds
    assert more == pytest.approx(16 * (1 if is_added_up else 2) * ONCE, rel=0.01)
