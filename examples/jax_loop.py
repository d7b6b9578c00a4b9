"""Trains a Keras model in a loop of JAX's own, its arrays laid out by a plan's partition specs.

    python examples/jax_loop.py --mesh 2x4

Keras' distribution is not used: the weights are put where the plan says, and `jax.jit` does the
rest. Without eight chips: `XLA_FLAGS=--xla_force_host_platform_device_count=8`.
"""

import argparse
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import keras
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from own_model import BATCH, SEQ_LEN, VOCABULARY, make_model

import autoshard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mesh", default="2x4")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()

    keras.utils.set_random_seed(0)
    model = make_model()
    plan = autoshard.plan(model, mesh=arguments.mesh, batch=BATCH, optimizer="sgd")
    print(plan)
    # The specs leave all that lies between the weights to XLA, so the axes are no explicit ones.
    axis_types = (AxisType.Auto,) * len(plan.mesh.shape)
    mesh = jax.make_mesh(plan.mesh.shape, plan.mesh.axis_names, axis_types)
    specs = plan.partition_specs(model)

    def placed(variables: list[keras.Variable]) -> list[jax.Array]:
        return [
            jax.device_put(variable.value, NamedSharding(mesh, specs[variable.path]))
            for variable in variables
        ]

    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @jax.jit
    def step(
        weights: list[jax.Array], others: list[jax.Array], tokens: jax.Array
    ) -> tuple[jax.Array, list[jax.Array]]:
        def loss(weights: list[jax.Array]) -> jax.Array:
            logits, _ = model.stateless_call(weights, others, tokens[:, :-1], training=True)
            return loss_of(tokens[:, 1:], logits)

        value, gradients = jax.value_and_grad(loss)(weights)
        return value, [
            weight - 0.1 * slope for weight, slope in zip(weights, gradients, strict=True)
        ]

    weights = placed(model.trainable_variables)
    others = placed(model.non_trainable_variables)
    data = NamedSharding(mesh, PartitionSpec(plan.mesh.data_axis))
    random = np.random.default_rng(0)
    for k in range(arguments.steps):
        starts = random.integers(VOCABULARY, size=(BATCH, 1))
        tokens = (starts + np.arange(SEQ_LEN + 1)) % VOCABULARY
        value, weights = step(weights, others, jax.device_put(tokens, data))
        print(f"step {k}: loss {value:.4f}")


if __name__ == "__main__":
    main()
