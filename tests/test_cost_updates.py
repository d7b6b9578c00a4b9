"""What updates of weights cost: passes over bytes, in the matmul of the gradient or apart."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from test_cost_memory import updated
from test_cost_step import MACHINE

from autoshard.cost.step import StepPricer
from autoshard.cost.updates import Updates
from autoshard.graph.build import StepInput, build_program
from autoshard.graph.jaxpr import read_jaxpr
from autoshard.graph.program import WHOLE, Program
from autoshard.graph.propagation import propagate

MATRIX = 2 * 4096 * 16_384
NOMINAL = MATRIX / MACHINE.chip.hbm_bytes_per_second


def priced(program: Program, *dims: int) -> list[float]:
    """What each argument costs beside the ops; these dimensions are split over eight chips."""
    fixed = {argument.group: (dim,) for argument, dim in zip(program.arguments, dims, strict=True)}
    layouts = propagate(program, fixed, (8,))
    pricer = StepPricer(program, MACHINE)
    pricer.price(layouts)
    found = []
    for argument in program.arguments:
        layout = layouts[argument.group]
        given = (argument, [layout], layouts, pricer._moving)
        is_fused = pricer.arguments.updates.is_fused(*given)
        found.append(pricer.arguments.seconds(argument, layout, is_fused=is_fused))
    assert pricer._arguments_seconds(layouts, pricer._moving) == pytest.approx(sum(found))
    return found


# Passes over the bytes of a matrix, whole or an eighth, times the time of each.
FUSED, FUSED_WHOLE, APART, APART_WHOLE = 2 * 0.25 / 8, 2 * 1.0, 3 * 1.3 / 8, 3 * 1.6


@pytest.mark.parametrize(
    ("dims", "of_a", "of_b"),
    [
        ((1, 0, WHOLE), FUSED, FUSED),  # hidden units are split, and a device's gradient with them
        ((WHOLE, WHOLE, WHOLE), FUSED_WHOLE, FUSED_WHOLE),  # they fill the vector memory
        ((WHOLE, WHOLE, 0), APART_WHOLE, APART_WHOLE),  # rows are split: gradients are summed
        ((WHOLE, 0, WHOLE), APART_WHOLE, FUSED),  # the gradient of `a` is split, `a` is not
        ((WHOLE, 1, 0), APART_WHOLE, APART),  # that of `b` is made piece by piece
    ],
)
def test_an_update_is_made_with_a_gradient_that_stays(
    dims: tuple[int, ...], of_a: float, of_b: float
) -> None:
    for count in (1, 3):
        expected = [count * of_a * NOMINAL, count * of_b * NOMINAL, 0.0]
        assert priced(updated(count), *dims) == pytest.approx(expected)


def test_no_matmul_updates_a_slot_that_lies_otherwise_than_the_gradient() -> None:
    program = stepped(with_momentum, ("weight", "slot", "data"))
    layouts = propagate(program, {argument.group: (1,) for argument in program.arguments[:2]}, (8,))
    updates = Updates(program, MACHINE)
    ((weight, slot),) = (each for each in updates.made_together(program.arguments) if each[1:])
    assert (weight.role, slot.role) == ("weight", "slot")
    for of_slot, is_fused in ((1, True), (0, False), (WHOLE, False)):
        assert updates.is_fused(weight, [(1,), (of_slot,)], layouts, {}) == is_fused


def test_other_compilers_are_taken_to_update_apart_at_the_nominal_bandwidth() -> None:
    program = updated(1)
    updates = Updates(program, replace(MACHINE, as_partitioned=True))
    assert not any(map(updates.may_be_fused, program.arguments))
    seconds = updates.seconds(program.arguments[0], MATRIX, is_fused=False)
    assert seconds == pytest.approx(3 * NOMINAL)


Step = Callable[..., Any]
WEIGHT = (512, 512)


def stepped(step: Step, roles: Sequence[str], trained: Sequence[bool] = ()) -> Program:
    """A step of square arrays of these roles, which returns those that it changes."""
    structs = [jax.ShapeDtypeStruct(WEIGHT, jnp.bfloat16) for _ in roles]
    inputs = [
        StepInput(role=role, family=role, trainable=not trained or trained[at])
        for at, role in enumerate(roles)
    ]
    closed = jax.make_jaxpr(step)(*structs)
    replaced = range(len(closed.jaxpr.outvars))
    return build_program(read_jaxpr(closed), inputs, list(replaced), for_tpu=True)


def gradient(model: Step, *arrays: Any) -> Any:
    return jax.grad(lambda *of: jnp.sum(jnp.tanh(model(*of))))(*arrays)


def with_momentum(w: Any, slot: Any, x: Any) -> Any:
    slot = 0.9 * slot + gradient(lambda w, x: x @ w, w, x)
    return w - slot, slot


def by_its_size(w: Any, x: Any) -> Any:
    made = gradient(lambda w, x: x @ w, w, x)
    return w - made / jnp.sqrt(jnp.mean(made**2))


def used_twice(w: Any, x: Any) -> Any:
    return w - gradient(lambda w, x: x @ w + x.T @ w, w, x)


def used_in_part(w: Any, x: Any) -> Any:
    return w - gradient(lambda w, x: x @ w + x[:, :8] @ w[:8], w, x)


def looked_up(w: Any, x: Any) -> Any:
    rows = x[0].astype(jnp.int32)
    return w - gradient(lambda w: jnp.take(w, rows, axis=0), w)


@pytest.mark.parametrize("step", [by_its_size, used_twice, used_in_part, looked_up])
def test_some_gradients_are_there_before_the_update(step: Step) -> None:
    program = stepped(step, ("weight", "data"))
    assert not Updates(program, MACHINE).may_be_fused(program.arguments[0])


def test_a_slot_is_passed_over_twice_and_what_is_not_trained_never() -> None:
    program = stepped(with_momentum, ("weight", "slot", "data"))
    updates = Updates(program, MACHINE)
    nominal = 1e6 / MACHINE.chip.hbm_bytes_per_second
    weight, slot, data = (
        [updates.seconds(one, 10**6, is_fused=is_fused) / nominal for is_fused in (True, False)]
        for one in program.arguments
    )
    assert weight == pytest.approx([2 * 0.25, 3 * 1.3])
    assert slot == pytest.approx([2 * 0.25, 2 * 1.3])
    assert data == [0, 0]
    assert updates.may_be_fused(program.arguments[1])
    frozen = stepped(with_momentum, ("weight", "slot", "data"), (False, True, True)).arguments[0]
    assert not updates.changes(frozen)


def test_the_bound_takes_no_update_for_dearer_than_it_may_be() -> None:
    for program in (updated(1), stepped(with_momentum, ("weight", "slot", "data"))):
        pricer = StepPricer(program, MACHINE).arguments
        for argument in program.arguments:
            for layout in ((WHOLE,), (0,), (1,)):
                both = [pricer.seconds(argument, layout, is_fused=one) for one in (True, False)]
                least = pricer.least_seconds(argument, layout)
                assert least == (min(both) if pricer.updates.may_be_fused(argument) else both[1])
