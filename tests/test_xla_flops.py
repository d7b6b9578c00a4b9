"""FLOPs of matmuls, counted before the program is split; out-of-memory messages, in a sentence."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from autoshard.model.build import build
from autoshard.model.fold import fold
from autoshard.model.folding import Folding
from autoshard.model.step import make_step, trace
from autoshard.model.workload import Workload
from autoshard.planning import make_program
from autoshard.xla.exhausted import exhausted_sentence
from autoshard.xla.flops import matmul_flops


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


LISTED = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory \
space hbm. Used 17.00G of 15.75G hbm. Exceeded hbm capacity by 1.25G.

Total hbm usage >= 17.50G:
    reserved        512.00M
    program          17.00G

Largest program allocations in hbm:

  1. Size: 3.91G
     Operator: op_name="jit(step)/jvp(net)/logits/dot_general" source_file="a.py"
     Shape: f32[8,512,256000]{2,1,0:T(8,128)}
     Unpadded size: 3.91G
     ==========================

  2. Size: 512.00M
     Shape: bf16[8,512,65536]{2,1,0}
     ==========================
"""


def test_the_largest_buffers_are_named_in_one_line():
    assert exhausted_sentence(LISTED, "tpu:v5e:2x4") == (
        "the step does not fit tpu:v5e:2x4: a device needs 17.00 GiB and has 15.75 GiB, 1.25 GiB "
        "less; the largest buffers: 3.91 GiB f32[8,512,256000] of jvp(net)/logits/dot_general, "
        "512.0 MiB bf16[8,512,65536] of an unnamed one"
    )


def test_a_message_of_another_form_is_quoted():
    assert exhausted_sentence("RESOURCE_EXHAUSTED: too much.\nmore", "tpu:v4:2x2x1") == (
        "the step does not fit tpu:v4:2x2x1: too much."
    )


def test_the_op_graph_counts_what_the_traced_program_does() -> None:
    workload = Workload(kind="prefill", batch=2)
    # Pictures come in by a convolution.
    model = fold(build("vit_base_patch16_224_imagenet"), periods=2)
    closed = trace(make_step(model, workload))
    program = make_program(replace(model, folding=Folding()), workload)
    assert sum(op.flops for op in program.ops) == matmul_flops(closed)
