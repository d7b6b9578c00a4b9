"""The step: one flat function of arrays, the same for tracing, lowering and sharded execution.

Its arguments are the model's variables, the optimizer's and the data, each with the path that lays
it out; its results say which argument each replaces, and so what may be donated. The mathematics
is Keras' own: `stateless_call`, its loss, `stateless_apply`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from autoshard.model.abstract import recording_scope
from autoshard.model.inputs import Input, model_inputs
from autoshard.model.keras_import import import_keras
from autoshard.model.recipe import AbstractModel
from autoshard.model.slots import Slot, make_slots
from autoshard.model.workload import Workload

__all__ = ["Argument", "Result", "Step", "make_step", "trace"]

Array = Any
Arrays = tuple[Array, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Argument:
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
class Result:
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
    arguments: tuple[Argument, ...]
    results: tuple[Result, ...]
    task: str
    loss: str | None

    @property
    def donated(self) -> tuple[int, ...]:
        """Indices of the arguments that a result replaces: `donate_argnums`."""
        return tuple(r.argument for r in self.results if r.argument is not None)


def make_step(model: AbstractModel, workload: Workload) -> Step:
    """The step of a model under a workload.

    Args:
        model: built with the workload's dtype and LoRA rank.
        workload: what is asked of it.

    Raises:
        ModelError: the model does not say what inputs it takes, or cannot decode.
    """
    if workload.trains:
        return _train_step(model, workload)
    return _prefill_step(model, workload)


def trace(step: Step) -> Any:
    """Trace a step on shapes alone.

    Returns:
        A `jax.core.ClosedJaxpr` whose equations keep their name stacks, for example
        `jvp(gemma_backbone)/decoder_block_0/attention`.
    """
    import jax

    shapes = [jax.ShapeDtypeStruct(a.shape, jax.numpy.dtype(a.dtype)) for a in step.arguments]
    # A distribution of the caller's would put its constraints into the jaxpr.
    with recording_scope():
        return jax.make_jaxpr(step.function)(*shapes)


def variable_arguments(model: Any) -> tuple[tuple[Argument, ...], int]:
    """The trainable variables, then the others, as `stateless_call` takes them, and their border."""
    weights = {id(variable) for variable in model.weights}
    trainable, other = model.trainable_variables, model.non_trainable_variables
    arguments = tuple(
        Argument(
            role="weight" if id(v) in weights else "state",
            path=v.path,
            shape=tuple(v.shape),
            dtype=str(v.dtype),
            layout_path=v.path if id(v) in weights else None,
        )
        for v in (*trainable, *other)
    )
    return arguments, len(trainable)


def _slot_argument(slot: Slot) -> Argument:
    return Argument(
        role="slot", path=slot.path, shape=slot.shape, dtype=slot.dtype, layout_path=slot.owner
    )


def _data_argument(data: Input) -> Argument:
    return Argument(role="data", path=data.name, shape=data.shape, dtype=data.dtype)


def _replaced(arguments: Sequence[Argument]) -> list[Result]:
    """Results that replace these first arguments one by one."""
    return [
        Result(role=argument.role, path=argument.path, argument=index)
        for index, argument in enumerate(arguments)
        if argument.role != "data"
    ]


def _training(model: Any, value: bool) -> dict[str, bool]:
    return {"training": value} if model._call_has_training_arg else {}


def _prefill_step(model: AbstractModel, workload: Workload) -> Step:
    keras = import_keras()
    inputs, structure = model_inputs(model.model, workload)
    variables, n_trainable = variable_arguments(model.model)
    names = [path for path, _ in keras.tree.flatten_with_path(model.model._outputs_struct)]

    def prefill(*arrays: Array) -> Arrays:
        outputs, _ = model.model.stateless_call(
            arrays[:n_trainable],
            arrays[n_trainable : len(variables)],
            keras.tree.pack_sequence_as(structure, arrays[len(variables) :]),
            **_training(model.model, False),
        )
        return tuple(keras.tree.flatten(outputs))

    return Step(
        function=prefill,
        arguments=(*variables, *map(_data_argument, inputs)),
        results=tuple(
            Result(role="logits" if model.generates else "output", path="/".join(map(str, name)))
            for name in names
        ),
        task=model.task,
        loss=None,
    )


def _train_step(model: AbstractModel, workload: Workload) -> Step:
    import jax

    keras = import_keras()
    inputs, structure = model_inputs(model.model, workload)
    variables, n_trainable = variable_arguments(model.model)
    slots = make_slots(workload.optimizer, model.model.trainable_variables)
    loss, targets = _loss(model, inputs, workload)
    ends = [n_trainable, len(variables), len(variables) + len(slots.slots)]
    ends.append(ends[-1] + len(inputs))

    def train(*arrays: Array) -> Arrays:
        trainable, other, opt = (
            list(arrays[start:end]) for start, end in zip([0, *ends[:2]], ends[:3], strict=True)
        )
        data = keras.tree.pack_sequence_as(structure, arrays[ends[2] : ends[3]])

        def total_loss(trainable: list[Array]) -> tuple[Array, list[Array]]:
            outputs, updated, extra = model.model.stateless_call(
                trainable, other, data, return_losses=True, **_training(model.model, True)
            )
            return sum(extra, loss(outputs, *arrays[ends[3] :])), updated

        (value, other), gradients = jax.value_and_grad(total_loss, has_aux=True)(trainable)
        trainable, opt = slots.optimizer.stateless_apply(opt, gradients, trainable)
        return (*trainable, *other, *opt, value)

    replaced = (*variables, *map(_slot_argument, slots.slots))
    return Step(
        function=train,
        arguments=(*replaced, *map(_data_argument, (*inputs, *targets))),
        results=(*_replaced(replaced), Result(role="loss", path="loss")),
        task=model.task,
        loss=loss.__doc__,
    )


def _loss(
    model: AbstractModel, inputs: Sequence[Input], workload: Workload
) -> tuple[Callable[..., Array], tuple[Input, ...]]:
    """The loss of a task, described by its docstring, and the data it compares the outputs with."""
    keras = import_keras()
    if not model.generates:

        def mean_square(outputs: Any) -> Array:
            """mean square of the outputs"""
            parts = [keras.ops.cast(o, "float32") for o in keras.tree.flatten(outputs)]
            return sum(keras.ops.mean(keras.ops.square(part)) for part in parts)

        return mean_square, ()

    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def token_loss(logits: Any, labels: Array, sample_weight: Array) -> Array:
        """sparse categorical cross-entropy of the next token, padding left out"""
        return cross_entropy(labels, logits, sample_weight)

    # As CausalLM.fit is fed by its preprocessor: labels are the tokens one place on, weights their
    # padding mask.
    logits_shape = (workload.batch, workload.seq_len)
    return token_loss, (
        Input(name="labels", shape=logits_shape, dtype="int32"),
        Input(name="sample_weight", shape=logits_shape, dtype="bool"),
    )
