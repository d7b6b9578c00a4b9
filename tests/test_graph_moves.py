"""Ops that move data: how they are laid out and what they move, held against XLA's partitioner."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from test_cost_step import MACHINE
from test_graph_rules import program_of

from autoshard.cost.machine import Machine
from autoshard.cost.step import StepPricer
from autoshard.graph.program import WHOLE
from autoshard.graph.propagation import Propagator, propagate
from autoshard.hardware.targets import parse_target
from autoshard.mesh import parse_mesh

KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
Move = Callable[[Any, Any], Any]

# What moves where x[4096, 512] is split on 4096 over eight devices, and the offset whole; or None:
# those kinds are not predicted. In any case the result is split as XLA splits it.
MOVES: dict[str, tuple[Move, list[str] | None]] = {
    "slice": (lambda x, at: x[:2048], ["collective-permute"]),
    "slice at a constant": (
        lambda x, at: jax.lax.dynamic_slice(x, (0, 0), (2048, 512)),
        ["collective-permute"],
    ),
    "slice at a variable": (
        lambda x, at: jax.lax.dynamic_slice(x, (at.astype(int)[0], 0), (2048, 512)),
        ["all-gather"],
    ),
    "every second row": (lambda x, at: x[::2], []),
    "second half": (lambda x, at: jnp.split(x, 2)[1], ["collective-permute"]),
    "pad": (lambda x, at: jnp.pad(x, ((0, 4096), (0, 0))), ["collective-permute"]),
    "reverse": (lambda x, at: x[::-1], ["collective-permute"]),
    "concatenate": (lambda x, at: jnp.concatenate([x, x * 2]), ["all-to-all"]),
    "sort": (lambda x, at: jnp.sort(x, axis=0), ["all-to-all"]),
    "running sum": (lambda x, at: jnp.cumsum(x, axis=0), None),
    "update at a variable": (
        lambda x, at: jax.lax.dynamic_update_slice(
            x, jnp.zeros((1, 512)) + at, (at.astype(int)[0], 0)
        ),
        [],
    ),
    "largest of each row": (lambda x, at: jax.lax.top_k(x, 2)[0], None),
    "largest of each column": (lambda x, at: jax.lax.top_k(x.T, 2)[0], ["all-gather"]),
}


# How often shards are passed on where x is cut or padded to another size, among devices enough.
PASSES: dict[str, tuple[Callable[[Any], Any], int]] = {
    "half": (lambda x: x[:2048], 2),
    "quarter": (lambda x: x[3072:], 4),
    "doubled": (lambda x: jnp.pad(x, ((0, 4096), (0, 0))), 2),
    "turned round": (lambda x: x[::-1], 1),
}


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("n_devices", [2, 8])
def test_shards_are_passed_on_as_often_as_by_xla(name: str, n_devices: int) -> None:
    move, ratio = PASSES[name]
    expected = min(ratio, n_devices - 1)
    machine = Machine.of(parse_mesh(f"1x{n_devices}"), parse_target(f"cpu:{n_devices}"))

    def function(x: Any) -> Any:
        return move(x) * 2

    program = program_of(function, (4096, 512))
    layouts = propagate(program, {program.arguments[0].group: (0,)}, (n_devices,))
    (passed,) = StepPricer(program, machine).price(layouts).traffic
    assert (passed.kind, passed.count) == ("collective-permute", expected)
    mesh = jax.sharding.Mesh(jax.devices()[:n_devices], ("model",))
    sharding = jax.NamedSharding(mesh, jax.P("model"))
    x = jax.ShapeDtypeStruct((4096, 512), jnp.float32, sharding=sharding)
    compiled = jax.jit(function).lower(x).compile().as_text()
    assert len(re.findall(r" collective-permute\(", compiled)) == expected


def test_parts_of_several_sizes_are_passed_on_each_as_often_as_its_size_asks() -> None:
    program = program_of(lambda x: [part * 2 for part in jnp.split(x, [0, 2048, 3072])], (4096, 8))
    layouts = propagate(program, {program.arguments[0].group: (0,)}, (8,))
    (passed,) = StepPricer(program, MACHINE).price(layouts).traffic
    # nothing of none, a half in two and two quarters in four times
    assert passed.count == 2 + 4 + 4
    shard = 4096 * 8 * 4 // 8
    assert passed.n_bytes == (2 * shard // 2 + 8 * shard // 4) // 10


@pytest.mark.parametrize("name", MOVES)
def test_what_moves_data_is_laid_out_and_moved_as_by_xla(name: str) -> None:
    move, expected = MOVES[name]

    def function(x: Any, at: Any) -> Any:
        return move(x, at) * 2

    program = program_of(function, (4096, 512), (1,))
    layouts = propagate(program, {program.arguments[0].group: (0,)}, (8,))
    mesh = jax.sharding.Mesh(jax.devices()[:8], ("model",))
    x, at = (
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.NamedSharding(mesh, spec))
        for shape, spec in (((4096, 512), jax.P("model")), ((1,), jax.P()))
    )
    compiled = jax.jit(function).lower(x, at).compile()

    (place,) = program.outputs
    (split,) = layouts[place.group]
    shape = jax.eval_shape(function, x, at).shape
    shard = tuple(size // 8 if dim == split != WHOLE else size for dim, size in enumerate(shape))
    assert compiled.output_shardings.shard_shape(shape) == shard
    if expected is not None:
        traffic = StepPricer(program, MACHINE).price(layouts).traffic
        assert sorted({moved.kind for moved in traffic}) == expected
        assert sorted(set(re.findall(rf" ({KINDS})\(", compiled.as_text()))) == expected


@pytest.mark.parametrize(("rows", "is_torn"), [(64, True), (32, False)])
def test_a_gradient_that_lies_otherwise_than_what_it_is_multiplied_with_is_dealt_out(
    rows: int, is_torn: bool
) -> None:
    """A gated layer, its gradient split by rows, its weights by hidden units.

    Where the gradient is no smaller than the weight, XLA lays their product out as the gradient.
    """

    def gated(x: Any, into: Any, out: Any) -> Any:
        both = jnp.einsum("bsd,dgh->bsgh", x, into)
        return (jax.nn.silu(both[:, :, 0]) * both[:, :, 1]) @ out

    def backward(x: Any, into: Any, out: Any, gradient: Any) -> Any:
        return jax.vjp(gated, x, into, out)[1](gradient)

    shapes = ((2, rows, 32), (32, 2, 128), (128, 32), (2, rows, 32))
    specs = (jax.P(None, "model"), jax.P(None, None, "model"), jax.P("model"), jax.P(None, "model"))
    program = program_of(backward, *shapes)
    fixed = {
        argument.group: (dim,)
        for argument, dim in zip(program.arguments, (1, 2, 0, 1), strict=True)
    }
    propagator = Propagator(program, (8,))
    layouts = propagator.propagate(fixed)
    traffic = StepPricer(program, MACHINE).price(layouts, propagator.apart).traffic
    dealt = sum(moved.count for moved in traffic if moved.kind == "all-to-all")

    mesh = jax.sharding.Mesh(jax.devices()[:8], ("model",))
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    compiled = jax.jit(backward).lower(*arrays).compile().as_text()
    found = len(re.findall(r" all-to-all\(", compiled))
    assert (found > 0) == (dealt > 0) == is_torn
    assert abs(found - dealt) <= 1
