"""What updates of weights cost: passes over bytes, in the matmul of the gradient or apart."""

from dataclasses import replace

import pytest
from test_cost_memory import updated
from test_cost_step import MACHINE

from autoshard.cost.step import StepPricer
from autoshard.cost.updates import Updates
from autoshard.graph.program import WHOLE
from autoshard.graph.propagation import propagate

MATRIX = 2 * 4096 * 16_384


def updating_seconds(pricer: StepPricer, *dims: int) -> float:
    """Of two matrices, where the arguments split these dimensions over eight chips."""
    arguments = pricer.program.arguments
    fixed = {argument.group: (dim,) for argument, dim in zip(arguments, dims, strict=True)}
    layouts = propagate(pricer.program, fixed, (8,))
    pricer.price(layouts)
    return pricer._arguments_seconds(layouts, pricer._moving)


@pytest.mark.parametrize(
    ("dims", "n_bytes", "passes", "share"),
    [
        ((1, 0, WHOLE), MATRIX // 8, 2, 0.25),  # hidden units are split: each device's gradient
        ((WHOLE, WHOLE, WHOLE), MATRIX, 2, 1.0),  # which fills the vector memory
        ((WHOLE, WHOLE, 0), MATRIX, 3, 1.6),  # rows are split: gradients are summed, and read
    ],
)
def test_an_update_is_made_with_a_gradient_that_stays(
    dims: tuple[int, ...], n_bytes: int, passes: int, share: float
) -> None:
    for count in (1, 3):
        seconds = updating_seconds(StepPricer(updated(count), MACHINE), *dims)
        ideal = 2 * count * passes * n_bytes / MACHINE.chip.hbm_bytes_per_second
        assert seconds == pytest.approx(share * ideal)


def test_other_compilers_are_taken_to_update_apart_at_the_nominal_bandwidth() -> None:
    machine = replace(MACHINE, as_partitioned=True)
    seconds = updating_seconds(StepPricer(updated(1), machine), 1, 0, WHOLE)
    assert seconds == pytest.approx(2 * 3 * MATRIX / 8 / machine.chip.hbm_bytes_per_second)


def test_a_weight_of_two_matmuls_is_updated_apart() -> None:
    program = updated(1)
    (shared, *_), made = program.arguments, [op for op in program.ops if op.backward]
    twice = replace(program, ops=(*program.ops, *made))
    for one, may in ((program, True), (twice, False)):
        assert Updates(one, MACHINE).may_be_fused(shared) is may
