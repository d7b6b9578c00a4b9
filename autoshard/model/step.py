"""The step: one flat function of arrays, the same for tracing, lowering and sharded execution."""

from dataclasses import replace
from typing import Any

from autoshard.errors import AutoshardError, ModelError
from autoshard.model.inference import decode_step, prefill_step
from autoshard.model.keras_import import import_keras_hub
from autoshard.model.outputs import OutputShapes, marking_scope
from autoshard.model.recipe import AbstractModel, layers_by_path, one_line
from autoshard.model.signature import Step
from autoshard.model.training import train_step
from autoshard.model.workload import Workload

__all__ = ["check_length", "generate_shapes", "make_step", "trace"]


def make_step(model: AbstractModel, workload: Workload) -> Step:
    """The step of a model under a workload.

    Args:
        model: built with the workload's dtype and LoRA rank.
        workload: what is asked of it.

    Raises:
        ModelError: the model does not say what inputs it takes, has no cache to decode with, or
            takes no sequence of that length.
    """
    check_length(model, workload.seq_len)
    if workload.trains:
        return train_step(model, workload)
    if workload.kind == "prefill":
        return prefill_step(model, workload)
    return decode_step(model, workload)


def check_length(model: AbstractModel, seq_len: int) -> None:
    """Make sure that a model's position embeddings have a row for each place of a sequence.

    Args:
        model: the model.
        seq_len: tokens a sequence.

    Raises:
        ModelError: they have fewer.
    """
    layer_class = import_keras_hub().layers.PositionEmbedding
    for path, layer in layers_by_path(model.model).items():
        if isinstance(layer, layer_class) and seq_len > layer.sequence_length:
            raise ModelError(
                f"{model.task} takes at most {layer.sequence_length} tokens a sequence, the rows "
                f"of '{path}', not {seq_len}: give a shorter sequence length"
            )


def trace(step: Step) -> Any:
    """Trace a step on shapes alone.

    Returns:
        A `jax.core.ClosedJaxpr` whose equations keep their name stacks, for example
        `jvp(gemma_backbone)/decoder_block_0/attention`, with a mark at every layer output.

    Raises:
        ModelError: the model refuses data of these shapes.
    """
    return _traced(step)[0]


def _traced(step: Step) -> tuple[Any, OutputShapes]:
    """The jaxpr, and the shapes at its marks."""
    import jax

    shapes = [jax.ShapeDtypeStruct(a.shape, jax.numpy.dtype(a.dtype)) for a in step.arguments]
    # A distribution of the caller's would put its constraints into the jaxpr.
    with marking_scope() as outputs:
        try:
            return jax.make_jaxpr(step.function)(*shapes), outputs
        except AutoshardError:
            raise
        except Exception as error:
            fed = ", ".join(f"{a.path}{list(a.shape)}" for a in step.arguments if a.role == "data")
            raise ModelError(
                f"{step.task} cannot be traced: {one_line(error)} (fed {fed})"
            ) from error


def generate_shapes(model: AbstractModel, workload: Workload) -> OutputShapes:
    """The shapes that layer outputs have while `generate` answers a single prompt.

    Args:
        model: a model that generates.
        workload: its sequence length is that of the cache.

    Returns:
        Template of a layer output -> the shapes at it, in the pass over the prompt and in decoding.

    Raises:
        ModelError: the model has no cache.
    """
    alone = replace(workload, kind="decode", batch=1)
    with marking_scope() as prompted:
        step = decode_step(model, alone)
    decoded = _traced(step)[1]
    templates = model.table().templates
    outputs = OutputShapes()
    for path, shapes in (*prompted.items(), *decoded.items()):
        outputs.setdefault(templates.get(path, path), set()).update(shapes)
    return outputs
