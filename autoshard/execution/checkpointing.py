"""Recomputes blocks in the backward pass, so that training a deep model needs little memory.

Without it XLA's CPU backend keeps the float32 copies it makes of all bfloat16 weights from the
forward pass to the backward one. `keras.RematScope` fails on KerasHub's blocks, whose `training`
becomes a traced value there; so each block's `call` runs under `jax.checkpoint` with only its
arrays traced.
"""

from collections.abc import Callable
from typing import Any

from autoshard.model.blocks import blocks_of
from autoshard.model.keras_import import import_keras
from autoshard.model.recipe import AbstractModel
from autoshard.model.signature import training_mode

__all__ = ["checkpoint_blocks"]


def checkpoint_blocks(model: AbstractModel, data: Any) -> int:
    """Run the repeated blocks of a model under `jax.checkpoint`.

    A block that holds state (the seeds of dropout) stays as it is, and so do all of them where a
    layer adds losses: neither may leave a recomputed function.

    Args:
        model: with values.
        data: its inputs, for a trace that finds the losses.

    Returns:
        How many blocks are recomputed.
    """
    if _adds_losses(model.model, data):
        return 0
    blocks = [block for stack in blocks_of(model) for block in stack]
    free = [block for block in blocks if len(block.variables) == len(block.weights)]
    for block in free:
        block.call = _recomputed(block.call)
    return len(free)


def _adds_losses(model: Any, data: Any) -> bool:
    import jax

    def losses(trainable: Any, other: Any, inputs: Any) -> Any:
        mode = training_mode(model, True)
        return model.stateless_call(trainable, other, inputs, return_losses=True, **mode)[2]

    state = [
        [variable.value for variable in variables]
        for variables in (model.trainable_variables, model.non_trainable_variables)
    ]
    return bool(jax.eval_shape(losses, *state, data))


def _recomputed(call: Callable[..., Any]) -> Callable[..., Any]:
    import jax

    tree = import_keras().tree

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        leaves = tree.flatten((args, kwargs))
        is_array = [isinstance(leaf, jax.Array) for leaf in leaves]

        def of_arrays(*arrays: Any) -> Any:
            given = iter(arrays)
            merged = [
                next(given) if array else leaf for leaf, array in zip(leaves, is_array, strict=True)
            ]
            again, named = tree.pack_sequence_as((args, kwargs), merged)
            return call(*again, **named)

        arrays = [leaf for leaf, array in zip(leaves, is_array, strict=True) if array]
        return jax.checkpoint(of_arrays)(*arrays)

    return recomputed
