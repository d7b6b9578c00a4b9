"""A step's signature: what each array it takes and returns is, and the path that lays it out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from autoshard.model.inputs import Input
from autoshard.model.slots import Slot

__all__ = [
    "StepArgument",
    "Arrays",
    "StepResult",
    "Step",
    "data_argument",
    "replaced",
    "slot_argument",
    "training_mode",
    "variable_arguments",
]

Arrays = tuple[Any, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepArgument:
    """One array that the step takes.

    Attributes:
        role: `weight`; `state` (seeds and the like); `slot` (optimizer); `cache` (keys and values
            of decode); `data` (dimension 0 lies on the data axis).
        path: the variable's path, or the name of the data.
        shape, dtype: of the whole array.
        layout_path: the path whose layout it takes, a slot its owner's; None for replicated (and
            for data).
    """

    role: Literal["weight", "state", "slot", "cache", "data"]
    path: str
    shape: tuple[int, ...]
    dtype: str
    layout_path: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """One array that the step returns.

    Attributes:
        role: the role of the argument it replaces, or `loss`, `logits` or `output`.
        path: the path of that argument, or a name.
        argument: index of the argument it replaces, which may be donated; None where it is new.
    """

    role: Literal["weight", "state", "slot", "cache", "loss", "logits", "output"]
    path: str
    argument: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A step as one function.

    Attributes:
        function: takes the arguments' arrays positionally, returns the results' arrays.
        arguments: in order.
        results: in order.
        task: the Keras class that is called.
        loss: what training minimises, in words; None where nothing is trained.
    """

    function: Callable[..., Arrays]
    arguments: tuple[StepArgument, ...]
    results: tuple[StepResult, ...]
    task: str
    loss: str | None

    @property
    def donated(self) -> tuple[int, ...]:
        """Indices of the arguments that a result replaces: `donate_argnums`."""
        return tuple(r.argument for r in self.results if r.argument is not None)


def variable_arguments(model: Any) -> tuple[tuple[StepArgument, ...], int]:
    """The variables as `stateless_call` takes them, and how many of them, first, are trainable."""
    weights = {id(variable) for variable in model.weights}
    trainable, other = model.trainable_variables, model.non_trainable_variables
    arguments = tuple(
        StepArgument(
            role="weight" if id(v) in weights else "state",
            path=v.path,
            shape=tuple(v.shape),
            dtype=str(v.dtype),
            layout_path=v.path if id(v) in weights else None,
        )
        for v in (*trainable, *other)
    )
    return arguments, len(trainable)


def slot_argument(slot: Slot) -> StepArgument:
    """An optimizer's variable: laid out as its owner is."""
    return StepArgument(
        role="slot", path=slot.path, shape=slot.shape, dtype=slot.dtype, layout_path=slot.owner
    )


def data_argument(data: Input) -> StepArgument:
    """An array of data."""
    return StepArgument(role="data", path=data.name, shape=data.shape, dtype=data.dtype)


def replaced(arguments: Sequence[StepArgument]) -> list[StepResult]:
    """Results that replace these arguments, a step's first, one by one."""
    return [
        StepResult(role=argument.role, path=argument.path, argument=index)
        for index, argument in enumerate(arguments)
        if argument.role != "data"
    ]


def training_mode(model: Any, value: bool) -> dict[str, bool]:
    """The keyword that tells a model whether it trains, if it has one."""
    return {"training": value} if model._call_has_training_arg else {}
