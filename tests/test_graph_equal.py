"""Equal equations: what a compiler for TPUs makes one array."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from test_graph_rules import program_of

from autoshard.graph.build import StepInput, build_program
from autoshard.graph.jaxpr import read_jaxpr
from autoshard.graph.program import Program


def turned(angles: Callable[[], jax.Array], *, for_tpu: bool, keys: int = 16) -> Program:
    """Queries and keys `[8, n]`, each multiplied by the angles `[8, 1]`."""

    def function(x, q, k):
        return (x @ q) * angles(), (x @ k) * angles()

    return program_of(function, (8, 32), (32, 16), (32, keys), for_tpu=for_tpu)


def positions() -> jax.Array:
    return jnp.arange(4.0)[:, None]


def joined() -> jax.Array:
    return jnp.concatenate([positions(), -positions()])


def constant() -> jax.Array:
    return jnp.cos(jnp.arange(8.0)[:, None])


@pytest.mark.parametrize(
    ("angles", "for_tpu", "keys", "n_groups"),
    [
        (joined, True, 16, 1),
        (joined, False, 16, 2),
        (joined, True, 24, 2),  # broadcast to another shape
        (constant, True, 16, 2),  # what is made of constants alone is made for each reader
    ],
)
def test_what_is_multiplied_by_one_array_is_laid_out_alike(
    angles: Callable[[], jax.Array], for_tpu: bool, keys: int, n_groups: int
) -> None:
    program = turned(angles, for_tpu=for_tpu, keys=keys)
    assert len({output.group for output in program.outputs}) == n_groups


def test_an_equal_equation_leaves_the_program() -> None:
    def twice(x, w):
        return x @ w, jnp.tanh(x @ w)

    def n_matmuls(for_tpu: bool) -> int:
        program = program_of(twice, (8, 16), (16, 32), for_tpu=for_tpu)
        return sum(op.kind == "contraction" for op in program.ops)

    assert (n_matmuls(for_tpu=True), n_matmuls(for_tpu=False)) == (1, 2)


@pytest.mark.parametrize(
    ("layers", "for_tpu", "counts"),
    [
        (("block_0", "block_1"), True, [1]),
        (("block_0", "block_1"), False, [9, 9]),
        (("encoder_0", "decoder_0"), True, [1, 1]),
    ],
)
def test_blocks_of_a_stack_have_in_common_what_reads_none_of_their_weights(
    layers: tuple[str, ...], for_tpu: bool, counts: list[int]
) -> None:
    def blocks(ids, *weights):
        x = 0.0
        for layer, weight in zip(layers, weights, strict=True):
            with jax.named_scope(layer):
                x = weight * (x + jnp.concatenate([ids, -ids])[:, None])
        return x

    closed = jax.make_jaxpr(blocks)(*(jnp.zeros(shape) for shape in ((4,), (8, 16), (8, 16))))
    inputs = [
        StepInput(role="data", family=None),
        *(StepInput(role="weight", family=name) for name in ("first", "second")),
    ]
    templates = {f"{layer}/kernel": f"{layer[:-2]}_*/kernel" for layer in layers}
    program = build_program(
        read_jaxpr(closed), inputs, [None], lambda layer: 9, templates, for_tpu=for_tpu
    )
    assert [op.count for op in program.ops if op.primitive == "concatenate"] == counts
