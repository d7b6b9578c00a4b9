"""Where a LayoutMap could lay out an activation, and which contraction makes it."""

from collections.abc import Mapping, Sequence

from autoshard.graph.equations import Equation, FlatJaxpr
from autoshard.graph.grouping import Numbering
from autoshard.graph.link import PASSING
from autoshard.graph.program import LayerOutput, Op
from autoshard.model.outputs import MARK

__all__ = ["layer_outputs"]


def layer_outputs(
    flat: FlatJaxpr,
    ops: Sequence[Op],
    numbering: Numbering,
    templates: Mapping[str, str],
    for_tpu: bool,
) -> tuple[LayerOutput, ...]:
    """The marked arrays of a step.

    Args:
        flat: the step.
        ops: its ops.
        numbering: of its groups.
        templates: path of a layer output -> its template.
        for_tpu: whether a TPU compiler partitions the step.
    """
    made_by = flat.made_by()
    op_of: dict[int | None, int] = {
        array.identity: index for index, op in enumerate(ops) for array in op.results
    }
    outputs = []
    for mark in flat.marks:
        array, contraction = flat.arrays[mark.identity], _contraction(mark.identity, made_by, flat)
        # A TPU compiler drops dimensions of size 1 from a contraction, and reshapes its result.
        is_reshaped = for_tpu and 1 in array.shape
        outputs.append(
            LayerOutput(
                template=templates.get(mark.path, mark.path),
                identity=mark.identity,
                group=numbering.number(mark.identity),
                dims=numbering.grouping.dims[mark.identity],
                shape=array.shape,
                n_bytes=array.n_bytes,
                backward=mark.backward,
                made_by=op_of.get(contraction),
                as_made=not is_reshaped and contraction == _unmarked(mark.identity, made_by),
            )
        )
    return tuple(outputs)


def _unmarked(identity: int, made_by: Mapping[int, Equation]) -> int:
    """The array behind the marks of layers' outputs."""
    while identity in made_by and made_by[identity].primitive == MARK:
        (identity,) = made_by[identity].operands
    return identity


def _contraction(identity: int, made_by: Mapping[int, Equation], flat: FlatJaxpr) -> int | None:
    """The result of a contraction that an array is, moves, casts and a bias behind it aside."""
    equation = made_by.get(identity)
    while equation is not None and equation.link.kind in PASSING:
        size = flat.arrays[identity].n_elements
        wide = [i for i in equation.operands if flat.arrays[i].n_elements == size]
        wide = [i for i in wide if i in made_by and made_by[i].link.kind != "broadcast"]
        if len(wide) != 1:
            return None
        (identity,) = wide
        equation = made_by[identity]
    return identity if equation is not None and equation.link.kind == "contraction" else None
