"""Casts of what matmuls make: TPU compilers write and sum no more than what is read."""

import jax
import jax.numpy as jnp
import pytest
from test_graph_rules import program_of

INT32, BFLOAT16 = 4, 2


def scaled(x, w):
    """A matmul in int8, scaled in bfloat16."""
    sums = jax.lax.dot(x, w, preferred_element_type=jnp.int32)
    return sums.astype(jnp.bfloat16) * jnp.bfloat16(0.5)


def scaled_and_kept(x, w):
    sums = jax.lax.dot(x, w, preferred_element_type=jnp.int32)
    return sums.astype(jnp.bfloat16), sums


def test_a_sum_of_experts_is_added_up_as_it_is_read() -> None:
    program = program_of(lambda x: jnp.sum(x, axis=0), (4, 8, 16), dtype="bfloat16", for_tpu=True)
    (total,) = [op for op in program.ops if op.kind == "reduction"]
    assert total.results[0].itemsize == BFLOAT16


@pytest.mark.parametrize(
    ("function", "for_tpu", "itemsize"),
    [(scaled, True, BFLOAT16), (scaled, False, INT32), (scaled_and_kept, True, INT32)],
)
def test_a_matmul_writes_what_alone_is_read_of_it(function, for_tpu: bool, itemsize: int) -> None:
    program = program_of(function, (8, 16), (16, 32), dtype="int8", for_tpu=for_tpu)
    (matmul,) = [op for op in program.ops if op.kind == "contraction"]
    assert matmul.results[0].itemsize == itemsize
    assert matmul.results[0].n_bytes == 8 * 32 * itemsize
