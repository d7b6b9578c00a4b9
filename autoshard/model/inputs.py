"""What a functional Keras model takes in one step: its inputs, with open sizes filled in."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autoshard.errors import ModelError
from autoshard.model.keras_import import import_keras
from autoshard.model.workload import Workload

__all__ = [
    "Input",
    "has_open_length",
    "model_inputs",
    "open_inputs",
    "output_structure",
    "own_batch",
]

# As Keras gives shapes: None for a dimension that is open.
SymbolicShape = tuple[int | None, ...]

# How KerasHub names the inputs that place other tokens among those of the text.
_PLACES = "_indices"
_PICTURE_PLACES = "vision_indices"


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
    """The symbolic outputs of a functional Keras model, in its own structure.

    Raises:
        ModelError: the model does not say what it takes and returns.
    """
    return _structure(model, "_outputs_struct")


def _structure(model: Any, kept_as: str) -> Any:
    structure = getattr(_functional(model), kept_as, None)
    if structure is None:
        raise ModelError(
            f"{type(model).__name__} '{model.name}' does not say what inputs it takes; give a "
            "functional model, as keras.Model(inputs, model(inputs)) with a keras.Input makes one, "
            "or a KerasHub backbone or task"
        )
    return structure


def model_inputs(
    model: Any, workload: Workload, *, pictures: bool = True
) -> tuple[tuple[Input, ...], Any]:
    """The inputs of a functional Keras model for a workload.

    A dimension that the model leaves open is the batch where it comes first and the sequence
    otherwise; 1 in data of rank 4 and more. A model that has its tokens beside pictures or sound
    gets one picture a sequence where it says how large one is, and nothing of what it does not.

    Args:
        model: a functional Keras model.
        workload: gives the batch and the sequence length.
        pictures: whether such a model sees one.

    Returns:
        The inputs in flat order, and the structure that `keras.tree.pack_sequence_as` refills.

    Raises:
        ModelError: the model does not say what it takes, or takes strings.
    """
    keras = import_keras()
    structure = _structure(model, "_inputs_struct")
    tensors = keras.tree.flatten(structure)
    symbolic = _symbolic_shapes(model, structure)
    shapes = _filled(symbolic, getattr(model, "backbone", model), workload, pictures)
    for tensor in tensors:
        if str(tensor.dtype) == "string":
            raise ModelError(
                f"input '{tensor.name}' of '{model.name}' holds strings, which no step on JAX "
                "takes: plan the model behind the layer that looks them up"
            )
    inputs = tuple(
        Input(name=tensor.name, shape=shapes[tensor.name], dtype=str(tensor.dtype))
        for tensor in tensors
    )
    return inputs, structure


def has_open_length(model: Any) -> bool:
    """Whether some input of a model is as long as the workload's sequence, as tokens are.

    Args:
        model: a Keras model; one that does not say what it takes is taken to have one.
    """
    shapes = _stated_shapes(model)
    if shapes is None:
        return True
    # Of pictures and the like that are open one pixel is taken.
    return any(len(shape) < 4 and None in shape[1:] for shape in shapes.values())


def own_batch(model: Any) -> int | None:
    """The batch that a model's inputs state; None where they leave it open, or do not agree.

    Args:
        model: a Keras model.
    """
    sizes = {shape[0] for shape in (_stated_shapes(model) or {}).values() if shape}
    return sizes.pop() if len(sizes) == 1 else None


def open_inputs(model: Any) -> tuple[str, ...]:
    """Names of the inputs of rank 4 and more that leave sizes open, of which 1 is taken.

    Those beside the tokens of a model apart: how many pictures it sees is another question.

    Args:
        model: a Keras model.
    """
    symbolic = _stated_shapes(model) or {}
    if any(name.endswith(_PLACES) for name in symbolic):
        return ()
    return tuple(name for name, shape in symbolic.items() if len(shape) >= 4 and None in shape[1:])


def _stated_shapes(model: Any) -> dict[str, SymbolicShape] | None:
    """The shape of each input by name; None for a model that does not say what it takes."""
    structure = getattr(_functional(model), "_inputs_struct", None)
    return None if structure is None else _symbolic_shapes(model, structure)


def _symbolic_shapes(model: Any, structure: Any) -> dict[str, SymbolicShape]:
    """The shape of each input of a functional model, by name, in flat order."""
    nested = _nested_shapes(model)
    return {
        tensor.name: _merged(tensor, nested.get(tensor.name, ()))
        for tensor in import_keras().tree.flatten(structure)
    }


def _nested_shapes(model: Any) -> dict[str, SymbolicShape]:
    """What the functional models inside of one say of their inputs, by name."""
    keras = import_keras()
    return {
        tensor.name: tuple(tensor.shape)
        for layer in _functional(model)._flatten_layers(include_self=False)
        for tensor in keras.tree.flatten(getattr(layer, "_inputs_struct", ()))
    }


def _merged(tensor: Any, nested: SymbolicShape) -> SymbolicShape:
    """The shape of an input, with what only a nested model says of it."""
    shape = tuple(tensor.shape)
    if len(nested) != len(shape):
        return shape
    return tuple(size or inner for size, inner in zip(shape, nested, strict=True))


def _filled(
    symbolic: Mapping[str, SymbolicShape], backbone: Any, workload: Workload, pictures: bool
) -> dict[str, tuple[int, ...]]:
    """Sizes for all that the shapes leave open."""
    # Where in the sequence the tokens of a picture or of a sound go.
    places = {name for name in symbolic if name.endswith(_PLACES)}
    pictured = pictures and any(_is_picture(shape) for shape in symbolic.values())
    filled = {}
    for name, shape in symbolic.items():
        open_size = workload.seq_len if len(shape) < 4 else 1
        if name in places:
            seen = pictured and name == _PICTURE_PLACES
            open_size = getattr(backbone, "num_vision_tokens_per_image", 0) if seen else 0
        elif places and len(shape) > 2:
            open_size = 1 if pictures and _is_picture(shape) else 0
        filled[name] = (workload.batch, *(size or open_size for size in shape[1:]))
    return filled


def _is_picture(shape: SymbolicShape) -> bool:
    """Whether it is a number of pictures of known height, width and channels."""
    return len(shape) == 5 and shape[1] is None and None not in shape[2:]
