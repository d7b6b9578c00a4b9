"""Small models of several kinds, by whose names a child builds them too."""

import os
import signal
from typing import Any

from autoshard.model.keras_import import import_keras, import_keras_hub

__all__ = [
    "bert",
    "dies_in_the_second_process",
    "gemma",
    "gemma4",
    "llama",
    "mixtral",
    "too_big",
    "vit",
]

VOCABULARY = 64

# Of each Gemma here.
GEMMA = {
    "vocabulary_size": VOCABULARY,
    "num_layers": 2,
    "num_query_heads": 8,
    "num_key_value_heads": 8,
    "hidden_dim": 32,
    "intermediate_dim": 64,
    "head_dim": 8,
}


# Of what reads with an encoder.
ENCODER = {
    "vocabulary_size": VOCABULARY,
    "num_layers": 2,
    "num_heads": 8,
    "hidden_dim": 64,
    "intermediate_dim": 128,
    "max_sequence_length": 32,
}


def gemma() -> Any:
    return import_keras_hub().models.GemmaBackbone(**GEMMA)


def llama() -> Any:
    """Eight query heads share two of keys and values."""
    return import_keras_hub().models.Llama3Backbone(
        vocabulary_size=VOCABULARY,
        num_layers=2,
        num_query_heads=8,
        num_key_value_heads=2,
        hidden_dim=64,
        intermediate_dim=64,
    )


def mixtral() -> Any:
    """Four experts, two for each token, and a loss that balances them."""
    return import_keras_hub().models.MixtralBackbone(
        vocabulary_size=VOCABULARY,
        num_layers=2,
        num_query_heads=8,
        num_key_value_heads=2,
        hidden_dim=64,
        intermediate_dim=64,
        num_experts=4,
        top_k=2,
        router_aux_loss_coefficient=0.02,
        sliding_window=16,
    )


def bert() -> Any:
    """Not causal, and with dropout, whose seeds are state."""
    return import_keras_hub().models.BertBackbone(**ENCODER)


def bart() -> Any:
    """Encoder and decoder."""
    return import_keras_hub().models.BartBackbone(**ENCODER)


def vit() -> Any:
    return import_keras_hub().models.ViTBackbone(
        image_shape=(32, 32, 3),
        patch_size=8,
        num_layers=2,
        num_heads=8,
        hidden_dim=64,
        mlp_dim=128,
    )


def gemma4() -> Any:
    """It may see pictures, but does not say how large."""
    models = import_keras_hub().models
    return models.Gemma4Backbone(
        **GEMMA,
        image_size=16,
        vision_encoder=models.Gemma4VisionEncoder(
            image_size=16,
            patch_size=4,
            pool_size=2,
            num_layers=2,
            num_heads=8,
            head_dim=8,
            num_key_value_heads=8,
            hidden_dim=64,
            intermediate_dim=64,
            output_dim=32,
        ),
    )


def depthwise() -> Any:
    """A convolution in groups, whose gradients XLA's partitioner may make too large."""
    keras = import_keras()
    pictures = keras.Input((16, 16, 8))
    found = keras.layers.DepthwiseConv2D(3, name="middle")(pictures)
    found = keras.layers.GlobalAveragePooling2D()(found)
    return keras.Model(pictures, keras.layers.Dense(8, name="last")(found))


def dies_in_the_second_process() -> Any:
    """What the others then wait for never comes."""
    import jax

    if jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return gemma()


def too_big() -> Any:
    """Its embedding alone, with gradient and two slots in bfloat16, is 32 GiB on each of four."""
    return import_keras_hub().models.GemmaBackbone(
        vocabulary_size=2**21,
        num_layers=2,
        num_query_heads=8,
        num_key_value_heads=8,
        hidden_dim=2**13,
        intermediate_dim=2**13,
        head_dim=128,
    )
