"""What one step is fed: the model's inputs, the labels, the sample weights."""

from dataclasses import dataclass
from typing import Any

from autoshard.errors import ModelError
from autoshard.model.keras_import import import_keras
from autoshard.model.workload import Workload

__all__ = ["Input", "model_inputs", "output_structure"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """An array of data, split over the data axis on dimension 0.

    Attributes:
        name: the model's name for it.
        shape: with the global batch and the sequence filled in.
        dtype: numpy-style name.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str


def _functional(model: Any) -> Any:
    """The functional model that a `Sequential` keeps inside; any other model itself."""
    return getattr(model, "_functional", None) or model


def output_structure(model: Any) -> Any:
    """The symbolic outputs of a functional Keras model, in its own structure."""
    return _functional(model)._outputs_struct


def model_inputs(model: Any, workload: Workload) -> tuple[tuple[Input, ...], Any]:
    """The inputs of a functional Keras model for a workload.

    A dimension that the model leaves open is the batch where it comes first, the number of images
    (one) for data of rank 4 and more, the tokens that one image becomes for their indices, and the
    sequence otherwise.

    Args:
        model: a functional Keras model.
        workload: gives the batch and the sequence length.

    Returns:
        The inputs in flat order, and the structure that `keras.tree.pack_sequence_as` refills.

    Raises:
        ModelError: the model does not say what it takes.
    """
    keras = import_keras()
    structure = getattr(_functional(model), "_inputs_struct", None)
    if structure is None:
        raise ModelError(
            f"{type(model).__name__} '{model.name}' does not say what inputs it takes; give a "
            "functional model (keras.Input ... keras.Model) or a KerasHub backbone or task"
        )
    inputs = tuple(
        Input(
            name=tensor.name,
            shape=_shape(model, tensor.name, tuple(tensor.shape), workload),
            dtype=str(tensor.dtype),
        )
        for tensor in keras.tree.flatten(structure)
    )
    return inputs, structure


def _shape(
    model: Any, name: str, shape: tuple[int | None, ...], workload: Workload
) -> tuple[int, ...]:
    backbone = getattr(model, "backbone", model)
    open_size = 1 if len(shape) > 3 else workload.seq_len
    if name == "vision_indices":
        open_size = getattr(backbone, "num_vision_tokens_per_image", open_size)
    return (workload.batch, *(size or open_size for size in shape[1:]))
