"""The optimizer: Keras' own, built without values, and which variable each slot belongs to."""

from dataclasses import dataclass
from typing import Any

from autoshard.model.abstract import abstract_scope, recording_scope
from autoshard.model.keras_import import import_keras

__all__ = ["Slot", "Slots", "make_slots"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One optimizer variable.

    Attributes:
        path: its own path.
        owner: path of the weight whose layout it takes; None where it takes none.
        shape, dtype: of the whole array.
    """

    path: str
    owner: str | None
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """A Keras optimizer and its variables in the order of `stateless_apply`."""

    optimizer: Any
    slots: tuple[Slot, ...]


def make_slots(name: str, trainable: list[Any]) -> Slots:
    """Build an optimizer for the given variables.

    Args:
        name: of the Keras optimizer; its other settings are Keras' defaults.
        trainable: Keras variables, abstract or not.
    """
    keras = import_keras()
    with recording_scope():
        optimizer = keras.optimizers.get(name)
        before = [variable._layout for variable in trainable]
        # Keras hands a weight's `_layout` on to the slots it makes for it: a mark put there says
        # whose each slot is, without guessing from names.
        for variable in trainable:
            variable._layout = variable.path
        try:
            with abstract_scope():
                optimizer.build(trainable)
            owners = [slot._layout for slot in optimizer.variables]
        finally:
            for variable, layout in zip(trainable, before, strict=True):
                variable._layout = layout
    for slot in optimizer.variables:
        slot._layout = None
    return Slots(
        optimizer=optimizer,
        slots=tuple(
            Slot(path=slot.path, owner=owner, shape=tuple(slot.shape), dtype=str(slot.dtype))
            for slot, owner in zip(optimizer.variables, owners, strict=True)
        ),
    )
