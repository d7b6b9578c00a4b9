"""Seeded data to run a model on: its inputs, and what `fit` holds its outputs against."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from autoshard.model.inputs import Input, model_inputs, output_structure
from autoshard.model.keras_import import import_keras
from autoshard.model.recipe import AbstractModel, layers_by_path
from autoshard.model.workload import Workload

__all__ = ["Targets", "prompt_data", "run_data", "targets_of", "token_name"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What `keras.Model.fit` needs beside the inputs.

    Attributes:
        loss: a Keras loss, or one for each output.
        values: what the outputs are held against.
        words: the loss in words.
    """

    loss: Any
    values: Any
    words: str


def run_data(model: AbstractModel, workload: Workload, seed: int) -> Any:
    """Inputs of a model, in its own structure, as numpy arrays.

    Tokens are drawn from the vocabulary without its first, which pads; masks let everything
    through; images are uniform in [0, 1); other indices are 0.

    Args:
        model: the model.
        workload: gives the batch and the sequence length.
        seed: of the draws.

    Raises:
        ModelError: the model does not say what it takes.
    """
    inputs, structure = model_inputs(model.model, workload)
    draw = np.random.default_rng(seed)
    n_tokens = _n_tokens(model)
    arrays = [_drawn(data, draw, n_tokens, alone=len(inputs) == 1) for data in inputs]
    return import_keras().tree.pack_sequence_as(structure, arrays)


def _n_tokens(model: AbstractModel) -> int:
    """The size of the vocabulary: what the model says, or what all its embeddings know."""
    said: int | None = getattr(model.backbone, "vocabulary_size", None)
    if said is not None:
        return said
    embedding = import_keras().layers.Embedding
    layers = layers_by_path(model.model).values()
    return min((layer.input_dim for layer in layers if isinstance(layer, embedding)), default=2)


def prompt_data(model: AbstractModel, workload: Workload, n_prompt: int, seed: int) -> Any:
    """Inputs of `generate`: `n_prompt` tokens, and room for the rest of the sequence.

    What an encoder reads stays as it is.
    """
    data = run_data(model, workload, seed)
    for name, array in data.items():
        is_cut = array.shape[:2] == (workload.batch, workload.seq_len)
        if is_cut and not name.startswith("encoder_"):
            array[:, n_prompt:] = 0
    return data


def token_name(data: Mapping[str, Any]) -> str:
    """Which of a model's inputs are the tokens that `generate` goes on with.

    >>> token_name({"encoder_token_ids": 0, "decoder_token_ids": 0}), token_name({"token_ids": 0})
    ('decoder_token_ids', 'token_ids')
    """
    return "decoder_token_ids" if "decoder_token_ids" in data else "token_ids"


def targets_of(model: AbstractModel, data: Any, seed: int) -> Targets:
    """The loss of `fit`, and what it compares outputs with.

    Without a cross-entropy the targets are drawn, not 0 as in the compiled training step: outputs
    that a layer has normalised have a mean square of 1 whatever the weights before it, so that all
    their gradients would be rounding, which Adam makes as large as any.

    Args:
        model: the model.
        data: what `run_data` gave.
        seed: of the targets.
    """
    keras = import_keras()
    if model.generates:
        tokens = data[token_name(data)]
        return Targets(
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            values=np.roll(tokens, -1, axis=1),
            words="cross-entropy of the next token",
        )
    outputs = output_structure(model.model)
    batch = len(keras.tree.flatten(data)[0])
    flat = keras.tree.flatten(outputs)
    shapes = [_filled(tuple(output.shape), batch, data) for output in flat]
    draw = np.random.default_rng((seed, 1))
    targets = [draw.standard_normal(shape, "float32") for shape in shapes]
    return Targets(
        loss=keras.tree.map_structure(lambda _: keras.losses.MeanSquaredError(), outputs),
        values=keras.tree.pack_sequence_as(outputs, targets),
        words="mean square of the distance to random targets",
    )


def _filled(shape: tuple[int | None, ...], batch: int, data: Any) -> tuple[int, ...]:
    """The shape of an output: what it leaves open is the batch, then the sequence or 1."""
    keras = import_keras()
    lengths = [array.shape[1] for array in keras.tree.flatten(data) if array.ndim == 2]
    return (batch, *(size or next(iter(lengths), 1) for size in shape[1:]))


def _drawn(data: Input, draw: np.random.Generator, n_tokens: int, alone: bool) -> Any:
    if data.dtype.startswith(("float", "bfloat")):
        return draw.random(data.shape, "float32")
    if "mask" in data.name:
        return np.ones(data.shape, data.dtype)
    if alone or "token" in data.name:
        return draw.integers(1, max(2, n_tokens), data.shape).astype(data.dtype)
    return np.zeros(data.shape, data.dtype)
