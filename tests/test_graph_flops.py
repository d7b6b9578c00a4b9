"""FLOPs of matmuls, counted before the program is split."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from autoshard.graph.flops import matmul_flops
from autoshard.model.build import build
from autoshard.model.fold import fold
from autoshard.model.folding import Folding
from autoshard.model.keras_import import import_keras
from autoshard.model.step import make_step, trace
from autoshard.model.workload import Workload
from autoshard.planner.tracing import make_program


def flops(function, *shapes):
    return matmul_flops(jax.make_jaxpr(function)(*(jnp.zeros(shape) for shape in shapes)))


def test_a_matmul_counts_two_for_each_multiply_and_add():
    assert flops(lambda a, b: a @ b, (2, 3), (3, 5)) == 2 * 2 * 3 * 5
    # A batch dimension of 7, and a call inside.
    assert flops(jax.jit(lambda a, b: a @ b + 1), (7, 2, 3), (7, 3, 5)) == 7 * 2 * 2 * 3 * 5


def test_gradients_and_loops_count_each_matmul_that_runs():
    loss = jax.value_and_grad(lambda a, b: (a @ b).sum(), argnums=(0, 1))
    # The product, and one for the gradient of each side.
    assert flops(loss, (2, 3), (3, 5)) == 3 * 60

    def loop(a):
        return jax.lax.scan(lambda carry, _: (carry @ carry, None), a, length=4)[0]

    assert flops(loop, (3, 3)) == 4 * 2 * 27


def test_a_convolution_counts_its_filter_at_each_output():
    def convolve(image, filters):
        return jax.lax.conv(image, filters, (1, 1), "SAME")

    # 6 output channels of 8 x 8, each a filter of 3 channels of 5 x 5.
    assert flops(convolve, (1, 3, 8, 8), (6, 3, 5, 5)) == 2 * 6 * 64 * 75


def test_the_zeros_in_a_strided_gradient_are_run_but_not_needed():
    def convolve(image):
        return jax.lax.conv(image, jnp.ones((6, 3, 4, 4)), (2, 2), "VALID").sum()

    image = jnp.zeros((1, 3, 10, 10))
    forward = 2 * 6 * 16 * 48
    closed = jax.make_jaxpr(jax.grad(convolve))(image)
    assert matmul_flops(closed) - forward == 2 * 3 * 100 * 96 // 4
    assert matmul_flops(closed, zeros=True) - forward == 2 * 3 * 100 * 96


def test_the_op_graph_counts_what_the_traced_program_does() -> None:
    workload = Workload(kind="prefill", batch=2)
    # Pictures come in by a convolution.
    model = fold(build("vit_base_patch16_224_imagenet"), periods=2)
    closed = trace(make_step(model, workload))
    program = make_program(replace(model, folding=Folding()), workload)
    assert sum(op.flops for op in program.ops) == matmul_flops(closed)


def test_the_op_graph_counts_the_matmuls_of_a_loop() -> None:
    def recurrent() -> Any:
        layers = import_keras().layers
        inputs = import_keras().Input((16, 8), name="sequence")
        return import_keras().Model(inputs, layers.LSTM(4, name="lstm")(inputs), name="recurrent")

    workload = Workload(kind="prefill", batch=2, seq_len=16)
    model = build(recurrent)
    program = make_program(model, workload)
    # 4 gates, of the input at once and of the state turn by turn.
    assert sum(op.flops for op in program.ops) == 2 * (2 * 16 * 8 * 16 + 2 * 16 * 4 * 16)
    assert sum(op.flops for op in program.ops) == matmul_flops(trace(make_step(model, workload)))
