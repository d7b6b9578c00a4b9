"""Plans a Transformer of one's own, and trains it with Keras' `fit` under the plan.

    python examples/own_model.py --mesh 2x4

Without eight chips: `XLA_FLAGS=--xla_force_host_platform_device_count=8`. The same plan from the
shell: `cd examples && autoshard plan own_model:make_model --mesh 2x4`.
"""

import argparse
import os
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
from keras import layers

import autoshard

VOCABULARY, WIDTH, HEADS, BLOCKS, SEQ_LEN, BATCH = 1024, 256, 8, 4, 64, 8


class Block(layers.Layer):
    """Attention and a feed-forward layer; rules go by names, so each layer has one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.attention_norm = layers.LayerNormalization(name="attention_norm")
        self.attention = layers.MultiHeadAttention(HEADS, WIDTH // HEADS, name="attention")
        self.norm = layers.LayerNormalization(name="norm")
        self.up = layers.Dense(4 * WIDTH, activation="gelu", name="up")
        self.down = layers.Dense(WIDTH, name="down")

    def build(self, shape: tuple[int | None, ...]) -> None:
        self.attention.build(shape, shape)
        for layer in (self.attention_norm, self.norm, self.up):
            layer.build(shape)
        self.down.build((*shape[:-1], 4 * WIDTH))

    def call(self, x: Any) -> Any:
        normal = self.attention_norm(x)
        x = x + self.attention(normal, normal, use_causal_mask=True)
        return x + self.down(self.up(self.norm(x)))


def make_model() -> keras.Model:
    """A small language model."""
    tokens = keras.Input((SEQ_LEN,), dtype="int32", name="tokens")
    x = layers.Embedding(VOCABULARY, WIDTH, name="embedding")(tokens)
    for k in range(BLOCKS):
        x = Block(name=f"block_{k}")(x)
    return keras.Model(tokens, layers.Dense(VOCABULARY, name="logits")(x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mesh", default="2x4")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()

    plan = autoshard.plan(make_model, mesh=arguments.mesh, batch=BATCH, optimizer="adam")
    print(plan)
    keras.distribution.set_distribution(plan.distribution())

    keras.utils.set_random_seed(0)
    model = make_model()
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer=keras.optimizers.Adam(1e-3),
    )
    # Each token is the one before, plus 1.
    starts = np.random.default_rng(0).integers(VOCABULARY, size=(arguments.steps * BATCH, 1))
    tokens = (starts + np.arange(SEQ_LEN + 1)) % VOCABULARY
    model.fit(tokens[:, :-1], tokens[:, 1:], batch_size=BATCH)


if __name__ == "__main__":
    main()
